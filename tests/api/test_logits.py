"""Tests of `Model.logits` and of greedy generation, its argmax, for all chunk and cache sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from api.tiny_models import spoilt, write_tiny

import phicore
from phicore import ArgumentError, ContextError, Model, PhicoreError
from phicore.testing.compare import assert_close
from phicore.testing.tolerances import SAME_GRAPH

LENGTHS = [1, 15, 16, 17, 64, 65, 256, 257, 300]


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 340, length).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_generation_is_the_argmax_of_the_logits(on_backend: Model, length: int) -> None:
    ids = prompt(length)
    for piece in on_backend.generate(
        ids, max_tokens=3, temperature=0, repeat_penalty=1, ignore_eos=True
    ):
        assert piece.token_id == int(np.argmax(on_backend.logits(ids)[-1]))
        ids.append(piece.token_id)
    assert len(ids) == length + 3


def test_generation_across_the_growth_of_the_cache(on_backend: Model) -> None:
    ids = prompt(253)
    pieces = list(
        on_backend.generate(ids, max_tokens=8, temperature=0, repeat_penalty=1, ignore_eos=True)
    )
    new = [piece.token_id for piece in pieces]
    logits = on_backend.logits(ids + new)
    assert new == np.argmax(logits[252:-1], axis=-1).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_a_prefix_are_the_first_rows(on_backend: Model, length: int) -> None:
    ids = prompt(300)
    whole = on_backend.logits(ids)
    assert whole.shape == (300, 352)
    assert whole.dtype == np.float32
    assert_close(on_backend.logits(ids[:length]), whole[:length], SAME_GRAPH)


def test_logits_of_an_array_of_ids(model: Model) -> None:
    ids = prompt(20)
    assert np.array_equal(model.logits(np.array(ids)), model.logits(ids))


def test_logits_of_as_many_tokens_as_the_context(model: Model) -> None:
    assert model.logits([1] * 320).shape == (320, 352)
    with pytest.raises(ContextError, match="321"):
        model.logits([1] * 321)


@pytest.mark.parametrize("ids", [[], [352], [-1], ["a"], "text", None, [1.0]])
def test_logits_of_no_token_ids_are_refused(model: Model, ids: object) -> None:
    with pytest.raises(ArgumentError):
        model.logits(ids)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(
    tmp_path: Path, backend_name: str, ops: object, value: float
) -> None:
    """Such logits were once returned. A NumPy warning on the way would be an error too."""
    path = spoilt(write_tiny(tmp_path / "m.gguf"), "blk.0.ffn_down.weight", value)
    message = "scores are not finite numbers: the file"
    with phicore.load(path, backend_name) as model, pytest.raises(PhicoreError, match=message):
        model.logits([5, 6, 7])
