"""Tests of logits processors: in the compiled step of every backend, and on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from unit.throwaway import Install, install

import phicore
from phicore import ArgumentError, LogitsProcessor, Model, PhicoreError
from phicore.network.processors import AnswerPenalty, LogitBias
from phicore.plugins import Plugins

__all__ = ["install"]

PROMPT = [1, 276, 310, 281, 275, 291]


def greedy(model: Model, prompt: Sequence[int] = PROMPT, n: int = 12, **options: Any) -> list[int]:
    plain = {"temperature": 0, "repeat_penalty": 1, "ignore_eos": True}
    return [p.token_id for p in model.generate(prompt, max_tokens=n, **plain | options)]


class Dictated(LogitsProcessor):
    """A logits processor that allows one token at each step, which the host chooses."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = list(tokens)
        self.told: list[int] = []

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        return {"token": np.array([self._tokens.pop(0)], np.int32)}

    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        xp = ops.xp
        numbers = xp.arange(logits.shape[1], dtype=xp.int32)[None, :]
        return xp.where(numbers == state["token"], logits, -float("inf"))

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        self.told.append(token)
        return {"token": np.array([self._tokens.pop(0)], np.int32)} if self._tokens else {}


def test_bias_makes_a_token_come_or_stay_away(on_backend: Model):
    usual = greedy(on_backend)
    without = greedy(on_backend, processors=[LogitBias({usual[0]: -float("inf")})])
    assert usual[0] not in without
    assert without[0] == int(
        np.argsort(np.where(np.arange(352) == usual[0], -np.inf, on_backend.logits(PROMPT)[-1]))[-1]
    )
    assert greedy(on_backend, processors=[LogitBias({7: 1e6})]) == [7] * 12
    assert greedy(on_backend) == usual  # a processor leaves nothing behind


@pytest.mark.parametrize("length", [6, 290])  # one chunk, and several
def test_answer_penalty_counts_the_answer(on_backend: Model, length: int):
    prompt = [PROMPT[i % 6] for i in range(length)]
    factors = {"frequency": 1.5, "presence": 0.75}
    found = greedy(on_backend, prompt, n=20, processors=[AnswerPenalty(**factors)])
    expected: list[int] = []
    for _ in range(20):
        counts = np.bincount(expected, minlength=352)
        scores = on_backend.logits([*prompt, *expected])[-1]
        scores = scores - counts * factors["frequency"] - (counts > 0) * factors["presence"]
        expected.append(int(scores.argmax()))
    assert found == expected


def test_host_decides_from_each_token(on_backend: Model):
    tokens = [5, 9, 300, 9, 9, 41]
    processor = Dictated(tokens)
    assert greedy(on_backend, n=6, processors=[processor]) == tokens
    assert processor.told == tokens
    drawn = on_backend.generate(
        PROMPT, max_tokens=6, temperature=3, top_p=0.9, processors=[Dictated(tokens)]
    )
    assert [p.token_id for p in drawn] == tokens


def test_several_come_one_after_the_other(on_backend: Model):
    """A bias cannot bring back a token that another processor forbade."""
    bias = LogitBias({7: 1e6, 8: 1e5})
    both = [bias, LogitBias({7: -float("inf")})]
    assert greedy(on_backend, n=3, processors=both) == [8] * 3
    assert greedy(on_backend, n=3, processors=both[::-1]) == [8] * 3


def test_none_that_is_left_is_an_error(on_backend: Model):
    forbid = LogitBias(dict.fromkeys(range(352), -float("inf")))
    with pytest.raises(PhicoreError, match=r"^no token can be chosen: the logits"):
        greedy(on_backend, processors=[forbid])


class Narrow(LogitsProcessor):
    """A logits processor with a fault: `wide`, `name` or `shape` of its state is wrong."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        dtype = np.int64 if self._fault == "wide" else np.float32
        return {"n": np.zeros(1, dtype)}

    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        return logits

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        return {"m" if self._fault == "name" else "n": np.zeros(2, np.float32)}


class FewScores(LogitsProcessor):
    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        return logits[:, :300]


class Booleans(LogitsProcessor):
    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        return logits > 0


class LongerState(AnswerPenalty):
    @classmethod
    def advance(cls, ops: Any, state: Any, token: Any) -> Any:
        return {**state, "counts": ops.xp.concat([state["counts"]] * 2, axis=1)}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (FewScores(), r"FewScores\.apply: scores: expected .*float32 \[1, 352\], got .*\[1, 300\]"),
        (Booleans(), r"Booleans\.apply: scores: expected .*float32 \[1, 352\], got .*bool"),
        (LongerState(), r"LongerState\.advance: counts: expected .*352\], got .*\[1, 704\]"),
        (Narrow("shape"), r"Narrow\.update: n: expected .*\[1, 1\], got .*\[1, 2\]"),
        (Narrow("name"), r"Narrow\.update: m: expected None, got"),
        (
            Narrow("wide"),
            r"Narrow: 'n' of its state is int64, expected numbers of 32 bits or fewer",
        ),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, LogitsProcessor) else "",
)
def test_arrays_of_another_kind_are_refused(on_backend: Model, processor: Any, message: str):
    with pytest.raises(PhicoreError, match=message):
        greedy(on_backend, processors=[processor])


def test_list_of_processors_is_needed(model: Model):
    for wrong in ("logit-bias=1:2", LogitBias({})):
        with pytest.raises(ArgumentError, match="processors: expected a list, got "):
            model.generate(PROMPT, processors=wrong)


def test_step_is_compiled_once_a_class(tiny: Path, backend_name: str, ops: object):
    compiled: list[str] = []
    with phicore.load(tiny, backend_name, progress=lambda what, *_: compiled.append(what)) as model:
        greedy(model, processors=[LogitBias({7: 1.0})])
        compiled.clear()
        greedy(model, processors=[LogitBias({8: 2.0, 9: 1.0})])
        assert "compiling" not in compiled


@pytest.mark.parametrize(
    ("processor", "same"),
    [
        ("logit-bias=7:1e6,8:-inf", LogitBias({7: 1e6, 8: -np.inf})),
        ("frequency-penalty=1.5", AnswerPenalty(frequency=1.5)),
        ("presence-penalty=-0.5", AnswerPenalty(presence=-0.5)),
    ],
)
def test_by_name(model: Model, processor: str, same: LogitsProcessor):
    assert greedy(model, processors=[processor]) == greedy(model, processors=[same])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("logit-bias", "logit-bias: expected ID:BIAS,... such as 42:-inf; got ''"),
        ("logit-bias=1:2,x", "logit-bias: expected ID:BIAS,... such as 42:-inf; got 'x'"),
        ("logit-bias=1:1e39", "logit-bias: expected ID:BIAS,... such as 42:-inf; got '1:1e39'"),
        ("logit-bias=1:nan", "logit-bias: expected ID:BIAS,... such as 42:-inf; got '1:nan'"),
        ("logit-bias=352:1", "logit-bias: token id 352: expected 0 to 351"),
        ("presence-penalty=much", "presence-penalty: expected a number, got 'much'"),
        ("frequency-penalty=nan", "frequency-penalty: expected a number, got 'nan'"),
        (
            "nope=1",
            "processor: expected one of logit-bias, frequency-penalty, presence-penalty, "
            "got 'nope'",
        ),
        (3, "processor: expected a LogitsProcessor or NAME=ARGUMENT, got 3"),
    ],
)
def test_bad_ones_are_refused(model: Model, processor: Any, message: str):
    with pytest.raises(ArgumentError) as caught:
        greedy(model, processors=[processor])
    assert str(caught.value) == message


def test_processor_of_a_plugin(install: Install, tmp_path: Path):
    install(
        "phicore-only",
        "only",
        """
        import numpy as np
        from phicore import ArgumentError, LogitsProcessor, hookimpl

        class Only(LogitsProcessor):
            def __init__(self, piece, model):
                [self.token] = [i for i in range(model.vocab_size)
                                if model.tokenizer.piece(i) == piece]

            def start(self, prompt, vocab_size):
                mask = np.full(vocab_size, -np.inf, np.float32)
                mask[self.token] = 0
                return {"mask": mask}

            @classmethod
            def apply(cls, ops, logits, state):
                return logits + state["mask"]

        @hookimpl
        def phicore_register_logits_processors(register):
            register("only", create=Only)
            register("logit-bias", create=Only)
            register("nothing", create=lambda argument, model: None)
        """,
    )
    [info] = [i for i in Plugins().installed() if i.name == "only"]
    assert info.provides == ("logits processors only, nothing",)
    with phicore.load(write_tiny(tmp_path / "m.gguf"), "numpy") as model:
        [piece] = model.generate("Hi", max_tokens=1, processors=["only=q"])
        assert model.tokenizer.piece(piece.token_id) == "q"
        # the plugin's `logit-bias` does not replace phicore's
        assert greedy(model, n=1, processors=["logit-bias=7:1e6"]) == [7]
        with pytest.raises(PhicoreError, match="'nothing': made None, expected a LogitsProcessor"):
            greedy(model, processors=["nothing"])
