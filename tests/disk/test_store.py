"""Tests of the folder of array files: limits, several processes, and processes that are killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from phicore.disk import store as stores
from phicore.disk.arrays import file_bytes
from phicore.disk.store import ArrayStore, Key

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these files are mapped on POSIX alone")

ARRAYS = {"m": np.arange(256, dtype=np.uint8).repeat(40).reshape(64, -1)}
# A process that writes an array of 10 pieces, and says when it has begun.
SLOW_WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from phicore.disk import arrays
from phicore.disk.store import ArrayStore, Key

folder, pause_s = Path(sys.argv[1]), float(sys.argv[2])
arrays.PIECE_BYTES = 1024
pauses = iter(range(1000))

def pause():
    if next(pauses) == 5:
        print("writing", flush=True)
        time.sleep(pause_s)

contents = {"m": np.arange(256, dtype=np.uint8).repeat(40).reshape(64, -1)}
print(ArrayStore(folder, 10**9).put(Key("model", {"file": 1}), contents, pause), flush=True)
"""


def key(number: int) -> Key:
    return Key("model", {"file": number})


def size() -> int:
    return file_bytes(key(1).identity, ARRAYS)


def slow_writer(folder: Path, pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def use(store: ArrayStore, number: int, at_s: int) -> None:
    """Use a file, and put the time of this to `at_s`."""
    assert store.find(key(number)) is not None
    os.utime(store.folder / key(number).file_name, (at_s, at_s))


def test_what_was_put_is_found(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path / "new" / "packed", 10**9)
    assert store.find(key(1)) is None
    assert store.put(key(1), ARRAYS)
    found = store.find(key(1))
    assert found is not None
    assert found["m"].tobytes() == ARRAYS["m"].tobytes()
    assert store.find(key(2)) is None
    assert [path.name for path in store.folder.iterdir()] == [key(1).file_name]


def test_names_of_files_are_safe() -> None:
    assert Key("../a b/ü:*", {}).file_name.startswith("a-b-ü-")
    assert "/" not in Key("../a b", {}).file_name
    assert key(1).file_name != key(2).file_name
    assert len(Key("x" * 1000, {}).file_name) < 120


def test_file_that_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, 3 * size())
    for number in (1, 2, 3):
        assert store.put(key(number), ARRAYS)
        os.utime(tmp_path / key(number).file_name, (number, number))
    assert [p.name for p in store.files()] == [key(n).file_name for n in (1, 2, 3)]
    before_s = time.time()
    assert store.find(key(1)) is not None  # a use
    assert (tmp_path / key(1).file_name).stat().st_mtime >= before_s - 1
    assert store.put(key(4), ARRAYS)
    assert {p.name for p in store.files()} == {key(n).file_name for n in (1, 3, 4)}


def test_file_that_is_written_again_needs_no_room_of_others(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, 2 * size())
    assert store.put(key(1), ARRAYS)
    assert store.put(key(2), ARRAYS)
    (tmp_path / key(2).file_name).write_bytes(b"damaged")
    assert store.find(key(2)) is None
    assert store.put(key(2), ARRAYS)
    assert store.find(key(1)) is not None
    assert store.find(key(2)) is not None


def test_file_over_the_limit_is_not_written_and_removes_nothing(tmp_path: Path) -> None:
    assert ArrayStore(tmp_path, size()).put(key(1), ARRAYS)
    assert not ArrayStore(tmp_path, size() - 1).put(key(2), ARRAYS)
    assert not ArrayStore(tmp_path / "off", 0).put(key(2), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == [key(1).file_name]


def test_disk_with_little_room_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArrayStore(tmp_path, 10**9)
    for free, is_written in ((3 * size() - 1, False), (3 * size(), True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(stores.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert store.put(key(1), ARRAYS) is is_written
        assert len(list(tmp_path.iterdir())) == is_written


def test_folder_that_cannot_be_made_or_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not ArrayStore(tmp_path / "file", 10**9).put(key(1), ARRAYS)
    assert ArrayStore(tmp_path / "file", 10**9).find(key(1)) is None


@pytest.mark.skipif(os.geteuid() == 0 if os.name == "posix" else True, reason="root may write")
def test_read_only_folder_is_used(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, 10**9)
    assert store.put(key(1), ARRAYS)
    tmp_path.chmod(0o500)
    try:
        assert store.find(key(1)) is not None
        assert not store.put(key(2), ARRAYS)
    finally:
        tmp_path.chmod(0o700)


def test_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def pause() -> None:
        assert len(list(tmp_path.iterdir())) == 1  # the partial file
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ArrayStore(tmp_path, 10**9).put(key(1), ARRAYS, pause)
    assert list(tmp_path.iterdir()) == []


def test_process_killed_while_it_writes_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, 10**9)
    with slow_writer(tmp_path, 60) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    (partial,) = tmp_path.iterdir()
    assert 0 < partial.stat().st_size < size()
    assert store.find(key(1)) is None
    assert store.put(key(1), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == [key(1).file_name]
    assert store.find(key(1)) is not None


def test_second_process_does_not_write_what_another_is_writing(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, 10**9)
    with slow_writer(tmp_path, 3) as process:
        assert process.stdout.readline() == "writing\n"
        assert not store.put(key(1), ARRAYS)
        assert store.put(key(2), ARRAYS)  # another file
        assert process.stdout.read() == "True\n"
    assert store.find(key(1)) is not None
    assert {p.name for p in tmp_path.iterdir()} == {key(n).file_name for n in (1, 2)}


def test_processes_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    processes = [slow_writer(tmp_path, 0) for _ in range(4)]
    answers = [process.communicate()[0].split()[-1] for process in processes]
    assert set(answers) <= {"True", "False"}
    assert "True" in answers
    assert [path.name for path in tmp_path.iterdir()] == [key(1).file_name]
    found = ArrayStore(tmp_path, 10**9).find(key(1))
    assert found is not None
    assert found["m"].tobytes() == ARRAYS["m"].tobytes()


def test_folder_removed_while_it_is_written_to_is_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    with slow_writer(folder, 1) as process:
        assert process.stdout.readline() == "writing\n"
        shutil.rmtree(folder)
        assert process.stdout.read() == "False\n"
    assert not folder.exists()
