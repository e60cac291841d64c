"""Files that others may bring: sessions, batches, configurations and tokenizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import write_tiny
from hostile.conftest import tries, watched
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import phicore
from phicore.cli.batch import Batch
from phicore.engine import sessions
from phicore.errors import ArgumentError, PhicoreError, SessionError, SourceError, TokenizerError
from phicore.gguf.reader import open_gguf
from phicore.sources.references import default_reference
from phicore.text.tokenizer import Tokenizer

PROMPT = "Tell me of the sea, of the ships and of the islands."
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400]),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\x00", "\ud800", "<|end|>", "▁", "a" * 999])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


@dataclass
class Saved:
    """A model with a session of it.

    Attributes:
        session: The bytes of the session.
        text: What the model says with the session, and without it.
        folder: Where the files of the tests lie.
    """

    model: phicore.Model
    path: Path
    session: bytes
    text: str
    folder: Path

    def says(self) -> str:
        return self.model.generate(PROMPT, max_tokens=4, temperature=0).text()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("m")
    path = write_tiny(folder / "tiny.gguf")
    with phicore.load(path, "numpy") as model:
        generation = model.generate(PROMPT, max_tokens=4, temperature=0)
        text = generation.text()
        assert model.save_session(folder / "session", generation)
        yield Saved(model, path, (folder / "session").read_bytes(), text, folder)


def in_a_line(error: PhicoreError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1500


DAMAGES = st.tuples(
    st.sampled_from(["change", "cut", "insert"]),
    st.integers(0, 600) | st.integers(0, 2**20),
    st.binary(min_size=1, max_size=9),
    st.integers(1, 100_000),
)


@tries(40)
@given(damages=st.lists(DAMAGES, min_size=1, max_size=3))
def test_damaged_session_is_refused_in_a_line(saved: Saved, damages: list[Any]):
    damaged = bytearray(saved.session)
    for how, place, data, size in damages:
        at = place % (len(damaged) + 1)
        if how == "change":
            damaged[at : at + len(data)] = data
        elif how == "cut":
            del damaged[at : at + size]
        else:
            damaged[at:at] = data
    path = saved.folder / "damaged"
    path.write_bytes(damaged)
    with watched("sessions"):
        try:
            saved.model.load_session(path)
        except SessionError as error:
            in_a_line(error)
        else:  # what was damaged has no meaning, such as a space in the header
            assert saved.says() == saved.text
            saved.model.engine.prefixes.clear()


@tries(40)
@given(
    metadata=st.dictionaries(
        st.sampled_from(["phicore_session", "model", "form", "is_long", "first", "x"]),
        st.one_of(
            st.text("0123456789-T", max_size=12), st.sampled_from(["True", "False", "1", "3"])
        ),
        max_size=2,
    ),
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 300), max_size=30)
    | st.none(),
    left_out=st.lists(st.integers(0, 20), max_size=2),
    dtype=st.sampled_from(["float32", "float64", "int8", "bool", "float16"]) | st.none(),
)
def test_session_that_somebody_has_made_is_refused_or_used(
    saved: Saved, metadata: Any, tokens: Any, left_out: list[int], dtype: str | None
):
    from safetensors import safe_open

    path = saved.folder / "made"
    path.write_bytes(saved.session)
    with safe_open(path, framework="numpy") as file:
        told = {**file.metadata(), **metadata}
    arrays = load_file(path)
    names = sorted(arrays)
    if tokens is not None:
        import numpy as np

        arrays[sessions._TOKENS] = np.array(tokens, np.int32)
    for i in left_out:
        arrays.pop(names[i % len(names)], None)
    if dtype is not None and (some := [n for n in arrays if n != sessions._TOKENS]):
        arrays[some[0]] = arrays[some[0]].astype(dtype)
    told["checksum"] = sessions._checksum(arrays, told)
    save_file(arrays, path, told)
    with watched("sessions"):
        try:
            saved.model.load_session(path)
        except SessionError as error:
            in_a_line(error)
        else:
            saved.says()
            saved.model.engine.prefixes.clear()


@tries(60)
@given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=20),
            VALUES.map(lambda v: json.dumps(v)),
            st.dictionaries(
                st.sampled_from(
                    [
                        *("id", "prompt", "messages", "max_tokens", "temperature", "seed", "stop"),
                        *("logprobs", "json_schema", "regex", "top_k", "processors", "tools", "x"),
                    ]
                ),
                VALUES,
                max_size=4,
            ).map(lambda v: json.dumps({"prompt": "Hi", **v})),
            st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}"]),
        ),
        max_size=4,
    )
)
def test_lines_of_a_batch_are_requests_or_problems_in_a_line(saved: Saved, lines: list[str]):
    source = saved.folder / "requests.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    with watched("batches"):
        try:
            batch = Batch(source, None)
        except ArgumentError as error:  # not UTF-8
            in_a_line(error)
            return
        for _ in batch.requests(saved.model.request, []):
            pass
    for problem in batch.problems:
        assert "\n" not in problem
        assert len(problem) < 1500


@tries(40)
@given(
    text=st.one_of(
        st.binary(max_size=60),
        st.lists(VALUES, max_size=3).map(lambda vs: "\n".join(map(json.dumps, vs)).encode()),
        st.sampled_from(
            [b"[" * 100_000, b'{"a":' * 100_000 + b"\n", b'{"id":1,"model":"m"}\n{"id"']
        ),
    )
)
def test_file_of_answers_is_gone_on_with_or_refused_in_a_line(saved: Saved, text: bytes):
    source, out = saved.folder / "requests.jsonl", saved.folder / "answers.jsonl"
    source.write_text('{"prompt": "Hi"}')
    out.write_bytes(text)
    with watched("batches"):
        try:
            Batch(source, out).prepare("m")
        except ArgumentError as error:
            in_a_line(error)
            assert out.read_bytes() == text


@tries(40)
@given(
    text=st.one_of(
        st.binary(max_size=60),
        VALUES.map(lambda v: f"model = {json.dumps(v)}".encode()),
        st.text(max_size=30).map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"model = " + b"[" * 5000, b"[a]\n" * 1000, b"x = 1", b"model.x = 1"]),
    )
)
def test_configuration_is_used_or_refused_in_a_line(
    saved: Saved, monkeypatch_module: pytest.MonkeyPatch, text: bytes
):
    path = saved.folder / "config.toml"
    path.write_bytes(text)
    monkeypatch_module.setenv("PHICORE_CONFIG", str(path))
    monkeypatch_module.delenv("PHICORE_MODEL", raising=False)
    with watched("configurations"):
        try:
            default_reference()
        except SourceError as error:
            in_a_line(error)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("text", ['modle = "smollm2"\n', 'model = "smollm2"\n[server]\nport = 1\n'])
def test_unknown_key_of_the_configuration_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
):
    path = tmp_path / "config.toml"
    path.write_text(text)
    monkeypatch.setenv("PHICORE_CONFIG", str(path))
    monkeypatch.delenv("PHICORE_MODEL", raising=False)
    with pytest.raises(SourceError, match=r"unknown key '(modle|server)'; the key is model"):
        default_reference()


def changed(tree: Any, draw: Any) -> Any:
    """Return data of JSON with one value replaced, doubled or left out, at a random place."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return tree
        key = draw(st.sampled_from(keys[:40]))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
            node = inner
            continue
        how = draw(st.sampled_from(["replace", "remove", "name"]))
        if how == "replace":
            node[key] = draw(VALUES)
        elif how == "remove" or isinstance(node, list):
            del node[key]
        else:
            node[draw(TEXTS)] = node.pop(key)
        return tree


@tries(60)
@given(data=st.data())
def test_damaged_tokenizer_json_is_refused_in_a_line_or_used(saved: Saved, data: st.DataObject):
    path = saved.folder / "tokenizer.json"
    saved.model.tokenizer._backend.save(str(path))
    tree = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 2))):
        tree = changed(tree, data.draw)
    path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    with open_gguf(saved.path) as file, watched("tokenizers"):
        try:
            tokenizer = Tokenizer.from_file(path, file.metadata)
            ids = tokenizer.encode(PROMPT)
            tokenizer.decode(ids)
        except TokenizerError as error:
            in_a_line(error)
