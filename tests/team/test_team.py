"""Tests that engines which follow another make the same calls to their devices.

The engines compute with NumPy in one process, each with a device of its own, so that their calls
can be compared. `test_processes.py` has real processes with one model.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine.scheduler import Scheduler
from phicore.errors import ArgumentError, BusyError, SessionError
from phicore.loading import load
from phicore.model import Model
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.progress import silent
from phicore.team import ending
from phicore.team.follower import Follower
from phicore.team.leader import Leader
from phicore.team.protocol import KEY, checked_address, packed, unpacked

STEPS = ("read", "decode", "verify", "scores", "logprobs")


def noted(engine: Engine) -> list[tuple[Any, ...]]:
    """Return the list of an engine's calls to its device, which grows."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, [_about(arg) for arg in (*args, *kwargs.values())]))
            return function(*args, **kwargs)

        return called

    for name in STEPS:
        setattr(engine.runner, name, note(name, getattr(engine.runner, name)))
    return calls


def _about(arg: Any) -> Any:
    rows = getattr(arg, "sequences", None)
    if rows is not None:  # of a batch
        return [None if s is None else (s.request.prompt_ids, s.request.seed) for s in rows]
    return repr(arg)[:200] if not hasattr(arg, "tokens") else repr(arg.tokens)


@contextmanager
def team(tiny: Any, address: str) -> Iterator[tuple[Model, Model, threading.Thread]]:
    """Yield the model that leads, the one that follows, and the thread in which it does."""
    options: dict[str, Any] = {"max_sequences": 3, "prefix_cache_bytes": 100_000}
    with load(tiny, "numpy", **options) as first, load(tiny, "numpy", **options) as second:
        met: list[Follower] = []
        meet = threading.Thread(target=lambda: met.append(Follower(address, 30)))
        meet.start()
        first.engine.team = Leader(address, 2, {}, silent)
        meet.join()
        second.engine.team = follower = met[0]
        follow = threading.Thread(
            target=follower.follow, args=(second.engine, lambda: second.grammar_vocabulary)
        )
        follow.start()
        try:
            yield first, second, follow
        finally:
            first.close()
            follow.join(30)
        assert not follow.is_alive()


requests = st.builds(
    Request,
    prompt_ids=st.lists(st.integers(0, 70), min_size=1, max_size=60),
    sampling=st.builds(Sampling, temperature=st.sampled_from([0.0, 1.0])),
    max_tokens=st.integers(1, 12),
    seed=st.integers(0, 99),
    logprobs=st.sampled_from([None, None, 2]),
)
commands = st.lists(
    st.one_of(requests, st.integers(0, 5), st.just("step"), st.just("step"), st.just("score")),
    max_size=25,
)


@settings(max_examples=15, deadline=None)
@given(commands=commands, times=st.lists(st.floats(1e-5, 0.2), min_size=1, max_size=5))
def test_followers_make_the_calls_of_the_leader(
    tiny: Any, find_address: Callable[[], str], commands: list[Any], times: list[float]
) -> None:
    """Whatever comes and goes, and however long things take for the leader alone."""
    with team(tiny, find_address()) as (first, second, _):
        engine, other = first.engine, second.engine
        first.engine.scheduler.chunk_s = 0.05
        calls, others = noted(engine), noted(other)
        added = []
        for n, command in enumerate(commands):
            engine.scheduler.measured(1, times[n % len(times)])
            if command == "step":
                engine.step()
            elif command == "score":
                engine.score([1, 2, 3])
            elif isinstance(command, int):
                if command < len(added):
                    engine.abort(added[command])
            else:
                added.append(engine.add(command))
        while not engine.is_idle:
            engine.step()
    assert others == calls
    assert other.is_idle


def test_warm_up_and_constraints_are_followed(tiny: Any, address: str) -> None:
    with team(tiny, address) as (first, second, _):
        calls, others = noted(first.engine), noted(second.engine)
        request = first.request("the sea", regex="[a-z]{3}", max_tokens=8, seed=1)
        first.engine.warm_up([Sampling(), Sampling(temperature=0)], processors=request.processors)
        text = list(first.engine.generate(request))
    assert len(calls) > 20
    assert others == calls
    with load(tiny, "numpy") as alone:
        again = alone.request("the sea", regex="[a-z]{3}", max_tokens=8, seed=1)
        assert list(alone.engine.generate(again)) == text


def test_queue_of_followers_has_no_limit(tiny: Any, address: str) -> None:
    """Only the leader turns requests away."""
    with team(tiny, address) as (first, second, _):
        first.engine.scheduler = Scheduler(max_sequences=3, max_waiting=1)
        calls, others = noted(first.engine), noted(second.engine)
        first.engine.add(Request([1], max_tokens=2, seed=1))
        with pytest.raises(BusyError, match="waiting already"):
            first.engine.add(Request([2], max_tokens=2, seed=1))
        while not first.engine.is_idle:
            first.engine.step()
    assert others == calls


class Local(LogitsProcessor):
    """A processor that cannot be told to others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    @classmethod
    def apply(cls, ops: Backend, logits: Any, state: Any) -> Any:
        return logits


def test_request_that_cannot_be_told_is_refused(tiny: Any, address: str) -> None:
    with team(tiny, address) as (first, _, _):
        with pytest.raises(ArgumentError, match="cannot be told to other processes"):
            first.engine.add(Request([1], processors=[Local()], seed=1))
        assert first.engine.is_idle
        assert list(first.engine.generate(Request([1], max_tokens=2, seed=1)))


def test_sessions_are_refused(tiny: Any, address: str, tmp_path: Any) -> None:
    refused = pytest.raises(SessionError, match="keep no sessions")
    with team(tiny, address) as (first, _, _), refused:
        first.save_session(tmp_path / "s", [1, 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_other_tokens_end_the_team(tiny: Any, address: str, monkeypatch: Any) -> None:
    """A device that computes something else is noticed after the step."""
    ends: list[str] = []
    came = threading.Event()

    def end(problem: str) -> None:
        ends.append(problem)
        came.set()
        raise SystemExit  # of the thread

    monkeypatch.setattr(ending, "end", end)
    with team(tiny, address) as (first, second, follow):
        second.engine.team._leave = lambda: None  # as if its devices had joined the others
        decode = second.engine.runner.decode
        monkeypatch.setattr(second.engine.runner, "decode", lambda *a: decode(*a) * 0 + 7)
        first.engine.add(Request([1], max_tokens=4, seed=1))
        for _ in range(3):
            first.engine.step()
        assert came.wait(30)
        follow.join(30)
    assert any("other tokens than the leader's" in problem for problem in ends)


def test_vocabularies_are_not_sent(tiny: Any) -> None:
    with load(tiny, "numpy") as model:
        request = model.request("the sea", json_schema=True, seed=1)
        data = packed(("add", request))
        assert len(data) < 20_000
        (_, found) = unpacked(data, lambda: model.grammar_vocabulary)
        assert found.processors[0]._vocabulary is model.grammar_vocabulary
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(data)


@pytest.mark.parametrize("text", ["", "7000", "host", "host:", "host:0", "host:65535", ":7000"])
def test_addresses_are_checked(text: str) -> None:
    with pytest.raises(ArgumentError, match="HOST:PORT"):
        checked_address(text)
    assert checked_address("[::1]:7000") == ("::1", 7000)


def test_a_key_is_needed(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv(KEY)
    with pytest.raises(ArgumentError, match=KEY):
        Leader(address, 2, {}, silent)
    with pytest.raises(ArgumentError, match=KEY):
        Follower(address, 0)


def test_absent_leader_is_told(address: str) -> None:
    with pytest.raises(ArgumentError, match="no leader at"):
        Follower(address, 0)
