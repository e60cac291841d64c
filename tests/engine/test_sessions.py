"""Tests of session files: another process goes on, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import make_backend
from safetensors import safe_open
from safetensors.numpy import save_file

import phicore
from phicore.backend import Backend
from phicore.engine import Engine, Request, sessions
from phicore.errors import SessionError
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

DRAWN = Sampling(temperature=1.2, top_k=30, repeat_penalty=1.1)
CASES = {case.name: case for case in [*tiny_models.cases(), tiny_models.windowed()]}


def remembering(ops: Backend, path: Path) -> Engine:
    engine = engine_of(ops, path)
    engine.prefixes.most_bytes = 10**9
    return engine


def run(engine: Engine, prompt: list[int], count: int = 20) -> tuple[list[int], int]:
    sequence = engine.add(Request(prompt, DRAWN, max_tokens=count, seed=3))
    tokens = [token for output in engine.outputs(sequence) for token in output.tokens]
    return tokens, sequence.timings.cached_tokens


def random_tokens(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 80, count).tolist()


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["windowed", "long_factors", "llama3"])
def test_another_process_goes_on_with_the_same_text(name: str, ops: Backend, tmp_path: Path):
    file, session = CASES[name].write(tmp_path / "m.gguf"), tmp_path / "s"
    engine = remembering(ops, file)
    prompt = random_tokens(600 if name == "windowed" else 20)
    answer, _ = run(engine, prompt, 5)
    text = [*prompt, *answer]
    assert engine.save_session(session, text, "a model") == len(text) - 1
    expected = run(engine, [*text, 1, 2])
    other = remembering(ops, file)
    assert other.load_session(session, "a model") == text[:-1]
    assert run(other, [*text, 1, 2]) == expected
    assert expected[1] == len(text) - 1
    assert run(engine_of(ops, file), [*text, 1, 2])[0] == expected[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


@pytest.fixture
def session(path: Path, tmp_path: Path) -> Path:
    engine = remembering(make_backend("numpy"), path)
    prompt = random_tokens(30)
    run(engine, prompt)
    assert engine.save_session(tmp_path / "s", [*prompt, 5], "a model") == 0  # not these tokens
    assert not (tmp_path / "s").exists()
    assert engine.save_session(tmp_path / "s", [*prompt, *run(engine, prompt)[0]], "a model")
    return tmp_path / "s"


def changed(session: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    with safe_open(session, framework="numpy") as file:
        metadata = dict(file.metadata())
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    change(arrays, metadata)
    save_file(arrays, session, metadata)


def cut(session: Path) -> None:
    session.write_bytes(session.read_bytes()[:-100])


def flip(session: Path) -> None:
    data = bytearray(session.read_bytes())
    data[-50] ^= 1
    session.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "there is no such file"),
        (cut, "not a session file, or damaged: "),
        (flip, "damaged: its checksum is wrong"),
        (lambda s: s.write_bytes(b"GGUF" * 9), "not a session file, or damaged: "),
        (lambda s: s.write_bytes(b""), "not a session file, or damaged: "),
        (lambda s: changed(s, lambda a, m: m.update(phicore_session="9")), "version 1, found 9"),
        (lambda s: changed(s, lambda a, m: m.clear()), "version 1, found none"),
        (lambda s: changed(s, lambda a, m: a.pop("0.k")), "damaged: its checksum is wrong"),
        (lambda s: changed(s, lambda a, m: m.update(model="b")), "was saved for another model"),
        (lambda s: changed(s, lambda a, m: m.update(form="f64")), "another cache type or backend"),
    ],
)
def test_file_that_is_damaged_or_does_not_fit_is_refused(
    damage: Callable[[Path], None], message: str, session: Path, path: Path
):
    damage(session)
    engine = remembering(make_backend("numpy"), path)
    with pytest.raises(SessionError, match=message) as caught:
        engine.load_session(session, "a model")
    assert str(caught.value).startswith(f"{session}: ")
    assert "\n" not in str(caught.value)
    assert len(engine.prefixes) == 0


def made_by_hand(
    session: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]
) -> None:
    """Change a session as somebody would who means it: the checksum is right."""

    def with_checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        change(arrays, metadata)
        metadata["checksum"] = sessions._checksum(arrays, metadata)

    changed(session, with_checksum)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    def changing(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        arrays[name] = np.ascontiguousarray(change(arrays[name]))

    return changing


@pytest.mark.parametrize(
    "change",
    [
        lambda a, m: a.pop("tokens"),
        lambda a, m: a.pop("1.v"),
        lambda a, m: m.pop("first"),
        lambda a, m: m.update(first="-1"),
        lambda a, m: m.update(first="1"),
        lambda a, m: m.update(first="9" * 30),
        lambda a, m: m.update(first="²"),
        put("tokens", lambda x: x[:0]),
        put("tokens", lambda x: x[:-1]),
        put("tokens", lambda x: x[None]),
        put("tokens", lambda x: x.astype(np.float32)),
        put("tokens", lambda x: x + 80),
        put("tokens", lambda x: x - 100),
        put("tokens", lambda x: np.resize(x, 10**6)),
        put("0.k", lambda x: x[:, :, :-1]),
        put("0.k", lambda x: x[:, :1]),
        put("0.k", lambda x: x.astype(np.float64)),
    ],
)
def test_file_that_somebody_has_made_is_refused(change: Any, session: Path, path: Path):
    made_by_hand(session, change)
    engine = remembering(make_backend("numpy"), path)
    with pytest.raises(SessionError, match="not a session of this model: ") as caught:
        engine.load_session(session, "a model")
    assert "\n" not in str(caught.value)
    assert len(engine.prefixes) == 0


def test_file_with_a_new_checksum_and_no_change_is_read(session: Path, path: Path):
    made_by_hand(session, lambda a, m: None)
    assert remembering(make_backend("numpy"), path).load_session(session, "a model")


def test_file_that_cannot_be_written_leaves_the_old_one(session: Path, path: Path, tmp_path: Path):
    engine = remembering(make_backend("numpy"), path)
    prompt = random_tokens(30)
    text = [*prompt, *run(engine, prompt)[0]]
    with pytest.raises(SessionError, match="cannot be written"):
        engine.save_session(tmp_path / "missing" / "s", text, "a model")
    engine.save_session(session, text, "a model")
    assert engine.load_session(session, "a model") == text[:-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_models_are_told_apart_by_their_weights(tmp_path: Path):
    first, same, other = (tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf"))
    write_tiny(first)
    same.write_bytes(first.read_bytes())
    data = bytearray(first.read_bytes())
    quarter = len(data) // 4 * 3
    data[quarter:] = bytes(byte ^ 1 for byte in data[quarter:])  # the last bits of weights
    other.write_bytes(data)
    with phicore.load(first, "numpy") as model:
        generation = model.generate("Tell me of the sea and of ships.", max_tokens=5)
        generation.text()
        assert model.save_session(tmp_path / "s", generation) > 0
    with phicore.load(same, "numpy") as model:
        tokens = model.load_session(tmp_path / "s")
        assert tokens == generation.token_ids[: len(tokens)]
    with phicore.load(other, "numpy") as model, pytest.raises(SessionError, match="another model"):
        model.load_session(tmp_path / "s")
