"""Memory that a server gives back while nobody asks for anything."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server.conftest import ready

import phicore
from phicore.server import worker

ONLY_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with free memory"
)
ARENAS = """
import ctypes, sys, threading
from phicore.server.memory import use_few_arenas

use_few_arenas()
library = ctypes.CDLL(None)
for name in ("malloc", "fopen"):
    getattr(library, name).restype = ctypes.c_void_p
all_at_once = threading.Barrier(6)

def take():
    library.malloc(100)
    all_at_once.wait()

threads = [threading.Thread(target=take) for _ in range(6)]
for each in threads:
    each.start()
for each in threads:
    each.join()
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
"""


@ONLY_GLIBC
@pytest.mark.parametrize(("given", "fewest", "most"), [(None, 1, 2), ("5", 3, 5)])
def test_threads_share_two_arenas_unless_the_user_has_decided(
    given: str | None, fewest: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if given is None:
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    path = tmp_path / "info.xml"
    subprocess.run([sys.executable, "-c", ARENAS, path], check=True, timeout=300)
    assert fewest <= path.read_text().count("<heap nr=") <= most


MANY = """
import ctypes
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
pieces = []
for number in range(200_000):
    pieces.append(library.malloc(1000))
    ctypes.memset(pieces[-1], 1, 1000)
for number, piece in enumerate(pieces):
    if number % 32:
        library.free(ctypes.c_void_p(piece))
del pieces
before = resident()
from phicore.server.memory import give_back
give_back()
print(before - resident())
"""


@ONLY_GLIBC
def test_pages_between_pieces_that_stay_are_given_back():
    done = subprocess.run(
        [sys.executable, "-c", MANY], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) > 100_000_000  # of 200 MB


def test_server_gives_memory_back_once_after_each_time_of_work(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rests: list[float] = []
    monkeypatch.setattr(worker, "REST_S", 0.2)
    monkeypatch.setattr(worker, "give_back", lambda: rests.append(time.monotonic()))
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
    with phicore.load(tiny_path, "numpy") as model, ready(model) as served:
        served.wait_until(lambda: len(rests) == 1, "the rest after loading")
        for count in (2, 3):
            assert served.post("/v1/completions", body)[0] == 200
            served.wait_until(lambda count=count: len(rests) == count, "the rest")
            served.service.worker.wake()  # nobody asked for anything
            time.sleep(0.5)
            assert len(rests) == count
