"""What functions of plugins answer: an error of one short line, or right, and others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from hostile.conftest import tries, watched
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore.backend import Backend
from phicore.errors import BackendError, PhicoreError, SourceError
from phicore.plugins.manager import BackendInfo, _guarded_source
from phicore.sources import ModelFiles


class OddError(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


LONG = "long " * 400
ERRORS = (
    *(ValueError("a\nb"), OSError(2, "none"), KeyError(3), OddError(), SystemExit(3)),
    *(MemoryError(), RecursionError(), StopIteration(), ValueError(LONG), ValueError("\ud800")),
)
ARRAYS = st.builds(
    lambda shape, kind: np.zeros(shape, kind),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["float32", "float64", "int32", "int64", "bool", "complex64", "S3", "O"]),
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\ud800", LONG, b"bytes", Path("x"), object, ...])
    | ARRAYS
)
VALUES = st.recursive(
    PLAIN,
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.sampled_from(["bias", "", 3]), each, max_size=2)
        | st.lists(each, max_size=3).map(tuple)
        | st.lists(each, max_size=3).map(iter)
    ),
    max_leaves=6,
)
ANSWERS = VALUES | st.sampled_from(ERRORS)


def answering(answer: Any) -> Callable[..., Any]:
    """Return a function that returns an answer, or raises it if it is an error."""

    def answers(*args: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return answers


def checked(function: Callable[[], Any], refusal: type[PhicoreError]) -> Any:
    """Return what a function returns; None if it refuses that in one short line."""
    try:
        with watched("plugins"):
            return function()
    except refusal as error:
        message = str(error)
    message.encode()
    assert "\n" not in message
    assert len(message) < 1000
    return None


@tries()
@given(ANSWERS, st.sampled_from(["create", "devices", "notes"]))
def test_backend_that_answers_anything_is_right_or_refused_in_a_line(answer: Any, name: str):
    functions = {each: answering("") for each in ("create", "devices", "notes")}
    functions[name] = answering(answer)
    info = BackendInfo("odd", "phicore-odd", "1", *functions.values())
    found = checked(getattr(info, name), BackendError)
    if found is None:
        return
    if name == "create":
        assert isinstance(found, Backend)
    elif name == "devices":
        assert isinstance(found, list)
        assert all(isinstance(each, str) for each in found)
    else:
        assert isinstance(found, str)


@tries()
@given(ANSWERS | st.builds(ModelFiles, VALUES, VALUES, VALUES))
def test_source_that_answers_anything_is_right_or_refused_in_a_line(answer: Any):
    resolve = _guarded_source(answering(answer), "phicore-odd")
    found = checked(lambda: resolve("odd:x"), SourceError)
    if found is None:
        return
    assert isinstance(found.path, Path)
    assert found.tokenizer is None or isinstance(found.tokenizer, Path)
    assert isinstance(found.reference, str)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phicore.Model]:
    with phicore.load(write_tiny(tmp_path_factory.mktemp("m") / "tiny.gguf"), "numpy") as model:
        yield model


METHODS = ("start", "update", "ahead", "forced", "neutral")
OPTIONS: Mapping[str, Any] = {"max_tokens": 3, "seed": 1, "ignore_eos": True}


@tries()
@given(ANSWERS, st.sampled_from(METHODS))
def test_processor_that_answers_anything_disturbs_no_other_answer(
    model: phicore.Model, answer: Any, name: str
):
    def apply(cls: Any, ops: Any, logits: Any, state: Mapping[str, Any]) -> Any:
        return logits + state["bias"] if "bias" in state else logits

    answers = answering(answer)
    method = classmethod(answers) if name == "neutral" else answers
    odd = type("Odd", (phicore.LogitsProcessor,), {"apply": classmethod(apply), name: method})()
    expected = model.generate([5, 6, 7], **OPTIONS).text()
    with watched("plugins"):
        requests = [model.request([5, 6, 7], processors=each, **OPTIONS) for each in ([], [odd])]
        plain, _ = model.generate_many(requests, ordered=True)
    assert (plain.text, plain.error) == (expected, None)
    assert model.generate([5, 6, 7], **OPTIONS).text() == expected
