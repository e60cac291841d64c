"""Tests of the memory for keys and values: who waits, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import make_backend

import phicore
from phicore.backend import Backend, host
from phicore.engine import Engine, Request
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def rows_of(engine: Engine) -> int:
    return sum(len(rows.sequences) for rows in engine._places.batches)


def limited(path: Path, slots: int) -> Engine:
    engine = engine_of(make_backend("numpy"), path)
    engine._memory.most_bytes = slots * engine.runner.slot_bytes
    return engine


def test_bytes_of_a_slot_are_those_of_a_cache(ops: Backend, path: Path):
    runner = engine_of(ops, path).runner
    cache = runner.new_cache(300)
    assert cache.bytes == cache.capacity * runner.slot_bytes


def test_sequences_wait_until_they_fit(path: Path):
    alone = engine_of(make_backend("numpy"), path)
    requests = [Request([1 + i, 2, 3], GREEDY, max_tokens=9) for i in range(5)]
    expected = [list(alone.generate(request)) for request in requests]
    engine = limited(path, 2 * 256)
    sequences, most = [engine.add(request) for request in requests], 0
    while not engine.is_idle:
        engine.step()
        most = max(most, rows_of(engine))
    assert most == 2
    assert [sequence.answer for sequence in sequences] == expected


def test_long_sequence_waits_for_the_others_and_runs_alone(path: Path):
    engine = limited(path, 2 * 256)
    first = engine.add(Request([1, 2], GREEDY, max_tokens=9))
    long = engine.add(Request([3], GREEDY, max_tokens=300))  # 512 slots
    last = engine.add(Request([4], GREEDY, max_tokens=2))
    ended = []
    while not engine.is_idle:
        ended += [o.sequence for o in engine.step() if o.finish_reason]
        assert rows_of(engine) <= 1
    assert ended == [first, long, last]  # first come, first served


def test_prefix_cache_makes_way(path: Path):
    engine = limited(path, 2 * 256)
    engine.prefixes.most_bytes = 10**9
    list(engine.generate(Request([1] * 20, GREEDY, max_tokens=2)))
    assert len(engine.prefixes) == 1
    list(engine.generate(Request([2] * 20, GREEDY, max_tokens=2)))
    assert len(engine.prefixes) == 2
    list(engine.generate(Request([3] * 20, GREEDY, max_tokens=300)))
    assert engine.prefixes.bytes <= 10**9
    assert [e.tokens[0] for e in engine.prefixes._entries] == [3]


def test_limit_holds_with_prefixes_that_are_copied_and_kept(path: Path):
    engine = limited(path, 2048)
    engine.prefixes.most_bytes = 10**9
    start = np.random.default_rng(0).integers(0, 80, 300).tolist()
    list(engine.generate(Request(start, GREEDY, max_tokens=90)))

    def held() -> int:
        all_rows = engine._places.all_rows
        return sum(rows.cache.bytes for rows in all_rows) + engine.prefixes.bytes

    for seed in range(6):
        engine.add(Request([*start[:20], seed], GREEDY, max_tokens=9 + seed))
        engine.add(Request([seed, *start[:30]], GREEDY, max_tokens=5))
    while not engine.is_idle:
        engine.step()
        assert held() <= 2048 * engine.runner.slot_bytes


def test_prefix_that_the_next_sequence_needs_does_not_make_way(path: Path):
    engine = limited(path, 1024)
    engine.prefixes.most_bytes = 10**9
    first = np.random.default_rng(0).integers(0, 80, 300).tolist()
    list(engine.generate(Request(first, GREEDY, max_tokens=3)))
    sequence = engine.add(Request([*first, 1, 2], GREEDY, max_tokens=-1))
    while not sequence.answer:
        engine.step()
    assert sequence.timings.cached_tokens == 300
    engine.abort(sequence)
    engine.scheduler.max_sequences = 1
    running = engine.add(Request([5] * 20, GREEDY, max_tokens=30))
    engine.step()
    kept = len(engine.prefixes)
    engine.add(Request([6] * 20, GREEDY, max_tokens=600))  # waits for a row
    for _ in range(5):
        engine.step()
    assert running.finish_reason is None
    assert len(engine.prefixes) == kept > 0


def test_model_with_a_window_needs_no_more_than_the_window(tmp_path: Path):
    engine = engine_of(make_backend("numpy"), tiny_models.windowed().write(tmp_path / "m.gguf"))
    whole = engine.runner.capacity_for(10**6)
    assert engine.runner.positions_in(whole * engine.runner.slot_bytes) is None
    assert engine.runner.positions_in((whole - 1) * engine.runner.slot_bytes) is not None


def test_context_is_what_fits_and_too_little_is_refused(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    with phicore.load(path, "numpy") as model:
        context, slot = model.context, model.engine.runner.slot_bytes
    assert context > 256
    with phicore.load(path, "numpy", kv_memory=300 * slot) as model:
        assert model.context == 256
        with pytest.raises(phicore.ContextError, match="the context holds 256"):
            model.generate([1] * 256)
    message = f"^kv_memory: expected {256 * slot} bytes or more for this model, got 10$"
    for count, expected in (
        (10, message),
        (0, "^kv_memory: expected 1 or more bytes"),
        ("1G", "^kv_memory: "),
    ):
        with pytest.raises(phicore.ArgumentError, match=expected):
            phicore.load(path, "numpy", kv_memory=count)  # type: ignore[arg-type]


def test_single_sequence_may_outgrow_the_default(path: Path):
    engine = limited(path, 256)
    assert len(list(engine.generate(Request([1], GREEDY, max_tokens=300)))) == 300


def test_free_memory_is_what_the_system_and_the_container_leave(monkeypatch: pytest.MonkeyPatch):
    files = {
        "/proc/meminfo": ["MemTotal: 100 kB", "MemAvailable:    50 kB"],
        "/sys/fs/cgroup/memory.max": ["max"],
        "/sys/fs/cgroup/memory.current": ["10000"],
    }
    monkeypatch.setattr(host, "_read", lambda path: files.get(path, []))
    assert host.free_memory_bytes() == 51200
    files["/sys/fs/cgroup/memory.max"] = ["30000"]
    assert host.free_memory_bytes() == 20000
    files.clear()
    assert host.free_memory_bytes() is None
