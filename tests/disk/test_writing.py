"""Tests of writing in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from phicore.disk import writing
from phicore.disk.store import ArrayStore, Key

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these files are mapped on POSIX alone")

ARRAYS = {"m": np.arange(256, dtype=np.uint8).reshape(16, 16)}
KEY = Key("model", {"file": 1})


def test_nothing_is_written_while_the_process_is_busy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "WAIT_S", 0.001)
    store, asked, is_idle = ArrayStore(tmp_path, 10**9), threading.Event(), threading.Event()
    calls = []

    def is_busy() -> bool:
        calls.append(store.find(KEY))
        if len(calls) > 20:
            asked.set()
        return not is_idle.is_set()

    thread = writing.write_later(store, KEY, ARRAYS, is_busy)
    assert asked.wait(600)
    assert writing.is_writing()
    assert store.find(KEY) is None
    is_idle.set()
    thread.join(600)
    assert store.find(KEY) is not None
    assert not writing.is_writing()
    assert calls == [None] * len(calls)


def test_process_that_is_always_busy_writes_in_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "WAIT_S", 0.001)
    monkeypatch.setattr(writing, "PATIENCE_S", 0.01)
    store = ArrayStore(tmp_path, 10**9)
    writing.write_later(store, KEY, ARRAYS, lambda: True).join(600)
    assert store.find(KEY) is not None


def test_short_process_writes_before_it_ends(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from phicore.disk import writing\n"
        "from phicore.disk.store import ArrayStore, Key\n"
        "contents = {'m': np.arange(256, dtype=np.uint8).reshape(16, 16)}\n"
        "store, key = ArrayStore(Path(sys.argv[1]), 10**9), Key('model', {'file': 1})\n"
        "writing.write_later(store, key, contents, lambda: True)\n"
        "print(store.find(key))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("None\n", "")
    found = ArrayStore(tmp_path, 10**9).find(KEY)
    assert found is not None
    assert found["m"].tobytes() == ARRAYS["m"].tobytes()
