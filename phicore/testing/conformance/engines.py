"""Tests of what the engine does with a backend: crowds, slots, sessions and guesses.

The text of a request must be the one that it has alone: whoever else is computed, whichever row of
a batch and whichever slots of the cache it has, whatever was read before, and however many of its
tokens are checked in one step. Each test compares the backend with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import DEFAULTS, Backend
from phicore.engine import Engine, Request
from phicore.engine import Sequence as Running
from phicore.engine.drafts import Draft, Drafter, Outlook
from phicore.engine.scheduler import Scheduler
from phicore.errors import SessionError
from phicore.network.sampling import Sampling
from phicore.testing import tolerances
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import Conformance, Make
from phicore.testing.conformance.models import PHI3, PROMPT, engine_of
from phicore.testing.tiny_models import write_model

ROWS = 4
CHECKED = 4
"""Number of tokens of each row in a step that checks guesses."""
LENGTHS = ((3, 14), (20, 9), (1, 11), (9, 6), (17, 12))
"""The tokens of each request's prompt and answer: rows end and begin at other times."""


def requests() -> list[Request]:
    """Return requests with other prompts, lengths, seeds and parameters, which share each step."""
    return [
        Request(
            [(token + 7 * number) % PHI3.vocab_size for token in PROMPT[:count]],
            Sampling(temperature=0.5 + 0.2 * number, top_k=20 + number, repeat_penalty=1.1),
            max_tokens=limit,
            seed=number,
            logprobs=1,
        )
        for number, (count, limit) in enumerate(LENGTHS)
    ]


class Answer(NamedTuple):
    """The tokens of an answer, and the log probability of each of them."""

    tokens: list[int]
    logprobs: list[float]


def run(engine: Engine, made: Sequence[Request], every: int = 0) -> list[Answer]:
    """Run requests and return their answers.

    Args:
        every: After how many steps the next request comes. 0 lets all of them come at once.
    """
    waiting, step = list(made), 0
    found: list[Running] = []
    while waiting or not engine.is_idle:
        while waiting and (not every or step >= every * len(found)):
            found.append(engine.add(waiting.pop(0)))
        engine.step()
        step += 1
    return [answer_of(sequence) for sequence in found]


def answer_of(sequence: Running) -> Answer:
    """Return the answer of a sequence that has ended.

    Raises:
        Exception: The error that has ended it.
    """
    for output in sequence.outputs:
        if output.error is not None:
            raise output.error
    likely = [one.logprob for output in sequence.outputs for one in output.logprobs]
    return Answer(list(sequence.answer), likely)


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Check that texts are the same, and that log probabilities are within float32's errors."""
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    got, wanted = (np.concatenate([a.logprobs for a in each]) for each in (found, expected))
    assert_close(got, wanted, tolerances.FLOAT32_LOGITS)


def alone(engine: Engine, made: Sequence[Request]) -> list[Answer]:
    return [run(engine, [request])[0] for request in made]


class Guesses(Drafter):
    """Knows the answers, and guesses every third token of them wrongly.

    Attributes:
        right, wrong: How many guesses of either kind were checked.
    """

    def __init__(self, made: Sequence[Request], answers: Sequence[Answer]) -> None:
        self._answers = {r.seed: a.tokens for r, a in zip(made, answers, strict=True)}
        self.right = self.wrong = 0

    def draft(self, sequences: Sequence[Running], most: int) -> list[Draft]:
        return [self._draft(sequence, most) for sequence in sequences]

    def _draft(self, sequence: Running, most: int) -> Draft:
        start = len(sequence.answer)
        answer = self._answers[sequence.request.seed][start : start + most]
        return Draft(
            tuple(
                token if (start + i) % 3 else (token + 1) % PHI3.vocab_size
                for i, token in enumerate(answer)
            ),
            0.7,
        )

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        self.right += accepted
        self.wrong += drafted - accepted


class Checks(Scheduler):
    """Checks guesses whenever there are some, `CHECKED` tokens of each row at a time."""

    def step_wanted(
        self,
        rows: int,
        most: int,
        drafts: Sequence[Draft | Outlook],
        *,
        token_s: float = 0.0,
        is_drawn: bool = False,
    ) -> int:
        has_some = any(draft.length for draft in drafts)
        return CHECKED if has_some and most >= CHECKED else 1


Shared = tuple[Engine, list[Answer]]


class EnginesConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def file(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("engines") / "m.gguf"
        return write_model(path, PHI3, Type.F32, tokenizer=False)

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, ops: Backend, file: Path) -> Shared:
        """Return an engine, and the answers that it gives to each of `requests` alone."""
        engine = engine_of(ops, file)
        engine.scheduler = Scheduler(max_sequences=ROWS)
        return engine, alone(engine, requests())

    @pytest.mark.parametrize("every", [0, 3], ids=["at-once", "one-by-one"])
    def test_text_in_a_crowd_equals_the_text_alone(self, shared: Shared, every: int) -> None:
        """More requests than rows come and go, so rows are inserted, moved and used again."""
        engine, expected = shared
        assert_same(run(engine, requests(), every), expected)

    def test_text_after_others_have_left_their_slots_equals_the_text_alone(
        self, shared: Shared
    ) -> None:
        engine, expected = shared
        made = requests()
        sequences = [engine.add(request) for request in made[:ROWS]]
        for step in range(6):
            engine.step()
            if step == 3:
                engine.abort(sequences[0])
                engine.abort(sequences[2])
                sequences.append(engine.add(made[4]))
        while not engine.is_idle:
            engine.step()
        left = (1, 3, 4)
        assert_same([answer_of(sequences[n]) for n in left], [expected[n] for n in left])

    def test_text_with_guesses_equals_the_text_without(
        self, shared: Shared, ops: Backend, file: Path
    ) -> None:
        """Steps of several tokens check guesses, of which some are wrong and are overwritten."""
        if ops.capabilities.steps > 1:
            pytest.skip("guesses are not checked where a call runs several steps")
        made, expected = requests()[:3], shared[1][:3]
        engine = engine_of(ops, file)
        engine.scheduler = Checks(max_sequences=2)
        engine.drafter = guesses = Guesses(made, expected)
        assert_same(run(engine, made, every=2), expected)
        assert guesses.right > 0
        assert guesses.wrong > 0

    def test_text_after_a_known_beginning_equals_the_text_alone(
        self, ops: Backend, file: Path
    ) -> None:
        """The prefix cache keeps rows, and copies them when a prompt begins in the same way."""
        engine = engine_of(ops, file)
        drawn = Sampling(temperature=0.9)
        request = Request([*PROMPT, *PROMPT, 1, 2], drawn, max_tokens=8, seed=4, logprobs=1)
        expected = run(engine, [request])
        engine.prefixes.most_bytes = 10**9
        for ending in ([5, 6, 7], [1, 2]):
            run(engine, [Request([*PROMPT, *PROMPT, *ending], drawn, max_tokens=2, logprobs=1)])
        assert_same(run(engine, [request]), expected)

    def test_session_of_another_process_goes_on_with_the_same_text(
        self, make: Make, file: Path, tmp_path: Path
    ) -> None:
        """A saved session is read by a new backend, which has not computed any of its slots."""
        first = engine_of(make(DEFAULTS), file)
        first.prefixes.most_bytes = 10**9
        prompt = [*PROMPT, *PROMPT]
        [answer] = run(first, [Request(prompt, Sampling(temperature=0.9), max_tokens=4, seed=2)])
        text = [*prompt, *answer.tokens]
        try:
            saved = first.save_session(tmp_path / "s", text, "a model")
        except SessionError as error:
            pytest.skip(str(error))
        assert saved == len(text) - 1
        drawn = Sampling(temperature=0.9)
        request = Request([*text, 1, 2], drawn, max_tokens=8, seed=3, logprobs=1)
        expected = run(first, [request])
        other = engine_of(make(DEFAULTS), file)
        other.prefixes.most_bytes = 10**9
        assert other.load_session(tmp_path / "s", "a model") == text[:-1]
        sequence = other.add(request)
        while not other.is_idle:
            other.step()
        assert_same([answer_of(sequence)], expected)
        assert sequence.timings.cached_tokens == saved
