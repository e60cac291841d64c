"""Pieces of work that write files, for `driver.py`: what they do, and what must be there after."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from api.tiny_models import write_tiny

import phicore


class Victim(ABC):
    """Work that is stopped at some point, and done again.

    Args:
        home: A folder in which nothing is stopped.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def begin(self, folder: Path) -> None:  # noqa: B027 - most begin with nothing
        """Put what is there before into the empty folder."""

    @abstractmethod
    def work(self, folder: Path) -> None:
        """Write something."""

    @abstractmethod
    def check(self, folder: Path, *, is_done: bool) -> None:
        """Check what is there.

        Args:
            is_done: Whether the work came to its end. Nothing else may then lie there.
        """


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Modelled(Victim):
    """Work with a tiny model."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.model = phicore.load(write_tiny(home / "tiny.gguf"), "numpy")

    def text(self, prompt: list[int], count: int) -> list[int]:
        generation = self.model.generate(prompt, max_tokens=count, seed=1, ignore_eos=True)
        list(generation)
        return generation.token_ids


class Session(Modelled):
    """A session file is replaced by a longer one."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.known = []
        for name, count in (("old", 20), ("new", 40)):
            self.new = self.text([5, 6, 7], count)
            self.model.save_session(home / name, self.new)
            self.known.append(self.model.load_session(home / name))

    def begin(self, folder: Path) -> None:
        shutil.copy(self.home / "old", folder / "s")

    def work(self, folder: Path) -> None:
        self.model.save_session(folder / "s", self.new)

    def check(self, folder: Path, *, is_done: bool) -> None:
        found = self.model.load_session(folder / "s")
        assert found in self.known
        if is_done:
            assert found == self.known[1]
            assert names(folder) == {"s"}


class Talk(Modelled):
    """A conversation gets a further turn, and its rows are saved."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.tokens = self.text([5, 6, 7], 30)

    def _say(self, folder: Path) -> int:
        from chat.test_conversation import say

        from phicore.chat.conversation import Conversation
        from phicore.chat.store import Store

        store = Store(folder / "chats", 10**9)
        talk = store.load("talk") if "talk" in store.names() else Conversation("talk")
        say(talk, "Grüße 🦖 " * 300)
        store.save(talk)
        store.save_rows("talk", lambda path: self.model.save_session(path, self.tokens))
        return len(talk.turns)

    def begin(self, folder: Path) -> None:
        for _ in range(2):
            self._say(folder)

    def work(self, folder: Path) -> None:
        self._say(folder)

    def check(self, folder: Path, *, is_done: bool) -> None:
        from phicore.chat.store import Store

        store = Store(folder / "chats", 10**9)
        assert store.names() == ["talk"]
        turns = store.load("talk").turns
        assert len(turns) >= 2 + is_done
        assert all(turn.user == "Grüße 🦖 " * 300 for turn in turns)
        if store.rows_path("talk").exists():
            self.model.load_session(store.rows_path("talk"))
        if is_done:
            assert names(folder) == {"chats/talk.json", "chats/talk.rows"}


class Packed(Victim):
    """Packed weights are kept."""

    def __init__(self, home: Path) -> None:
        from phicore.disk.store import Key

        super().__init__(home)
        self.key = Key("model", {"file": 1})
        rng = np.random.default_rng(1)
        self.arrays = {n: rng.integers(0, 256, (50, 999), np.uint8) for n in ("a", "b")}

    def work(self, folder: Path) -> None:
        self._store(folder).put(self.key, self.arrays)

    def _store(self, folder: Path) -> Any:
        from phicore.disk.store import ArrayStore

        return ArrayStore(folder / "packed", 10**9)

    def check(self, folder: Path, *, is_done: bool) -> None:
        found = self._store(folder).find(self.key)
        for name, array in (found or {}).items():
            np.testing.assert_array_equal(array, self.arrays[name])
        if is_done:
            assert found is not None
            assert names(folder) == {f"packed/{self.key.file_name}"}


class Code(Victim):
    """Machine code is kept; see `phicore_jax.code_files`."""

    contents = (b"one" * 9000, b"two" * 9000)

    def work(self, folder: Path) -> None:
        from phicore_jax import code_files

        for number, content in enumerate(self.contents):
            path = folder / "kernels" / str(number)
            if code_files.read(path) is None:
                code_files.write(path, content)

    def check(self, folder: Path, *, is_done: bool) -> None:
        from phicore_jax import code_files

        for number, content in enumerate(self.contents):
            assert code_files.read(folder / "kernels" / str(number)) in (
                (content,) if is_done else (content, None)
            )
        if is_done:
            assert names(folder) == {"kernels/0", "kernels/1"}


class Synthetic(Victim):
    """A model of random weights is written into the cache folder."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        os.environ["XDG_CACHE_HOME"] = str(home / "other")
        self.digest = self._digest()

    def _digest(self) -> str:
        from phicore.lab.synthetic import synthetic_model

        return hashlib.sha256(synthetic_model("tiny").read_bytes()).hexdigest()

    def work(self, folder: Path) -> None:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        assert self._digest() == self.digest

    def check(self, folder: Path, *, is_done: bool) -> None:
        found = [path for path in folder.rglob("*.gguf") if not path.parent.name.startswith(".")]
        assert len(found) <= 1
        for path in found:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == self.digest
        if is_done:
            assert len(names(folder)) == 1


class Batch(Modelled):
    """Requests of a file are answered, and the command is given again after it was stopped."""

    ids = ("ü" * 5000, "é", "3", "🦖" * 100, "5")

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        lines = [{"id": id, "prompt": "Hi", "max_tokens": 30, "seed": 4} for id in self.ids]
        self.source = home / "in.jsonl"
        self.source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        out = home / "out"
        out.mkdir()
        self.work(out)
        self.expected = set((out / "out.jsonl").read_text().splitlines())
        assert len(self.expected) == len(self.ids)

    def work(self, folder: Path) -> None:
        from phicore.cli.batch import Batch as Requests
        from phicore.cli.batch import run
        from phicore.cli.terminal import ProgressLine

        out = folder / "out.jsonl"
        before = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
        line = ProgressLine(None, lambda text: None, lambda: True)
        run(Requests(self.source, out), self.model, {}, ordered=False, line=line)
        after = out.read_bytes().split(b"\n")[:-1]
        assert after[: len(before)] == before  # what was there is there, and comes first

    def check(self, folder: Path, *, is_done: bool) -> None:
        out = folder / "out.jsonl"
        lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
        assert {line.decode() for line in lines} <= self.expected
        assert len(lines) == len(set(lines))
        if is_done:
            assert {line.decode() for line in lines} == self.expected
            assert names(folder) == {"out.jsonl"}


class Download(Victim):
    """A model is downloaded from the Hub at HF_ENDPOINT; HF_HOME is in the folder."""

    reference = "hf:owner/repo/model.gguf"

    def work(self, folder: Path) -> None:
        from phicore.sources import hub

        path, tokenizer = hub.fetch(self.reference)
        assert path.read_bytes() == (self.home / "model.gguf").read_bytes()
        assert tokenizer is not None
        json.loads(tokenizer.read_text())

    def check(self, folder: Path, *, is_done: bool) -> None:
        from phicore.sources import hub

        found = hub.cached_models()
        for _, path, _ in found:
            assert path.read_bytes() == (self.home / "model.gguf").read_bytes()
        if is_done:
            assert len(found) == 1
