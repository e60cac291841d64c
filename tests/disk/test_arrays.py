"""Tests of files of arrays: what is mapped has the bits that were written, or there is nothing."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.disk import arrays, paging
from phicore.disk.arrays import ALIGNMENT, PREFIX, file_bytes, map_arrays, write_arrays

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these files are mapped on POSIX alone")

IDENTITY = {"file": ["abc", [1, 2]], "layout": "x"}
SHAPES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=6)


def made(shapes: list[tuple[int, int]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"m{i}": rng.integers(1, 256, s, dtype=np.uint8) for i, s in enumerate(shapes)}


def write(path: Path, contents: dict[str, np.ndarray]) -> bytes:
    with path.open("wb") as file:
        write_arrays(file.fileno(), IDENTITY, contents)
    return path.read_bytes()


@given(shapes=SHAPES, piece=st.integers(1, 3000))
def test_mapped_arrays_have_the_bits_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], piece: int
) -> None:
    path, contents = tmp_path_factory.mktemp("arrays") / "a", made(shapes)
    with patch.object(arrays, "PIECE_BYTES", piece):
        data = write(path, contents)
    assert len(data) == file_bytes(IDENTITY, contents)
    found = map_arrays(path, IDENTITY)
    assert found is not None
    assert list(found) == list(contents)
    for name, array in contents.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable
        assert found[name].ctypes.data % ALIGNMENT == 0


def test_file_of_something_else_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, made([(3, 5)]))
    assert map_arrays(path, IDENTITY | {"layout": "y"}) is None
    assert map_arrays(tmp_path / "missing", IDENTITY) is None
    assert map_arrays(tmp_path, IDENTITY) is None
    path.write_bytes(b"")
    assert map_arrays(path, IDENTITY) is None


def test_every_other_length_is_refused(tmp_path: Path) -> None:
    """A map that is longer than its file would end the process when it is read."""
    path = tmp_path / "a"
    data = write(path, made([(3, 5), (20, 40)]))
    lengths = [*range(0, len(data), 7), len(data) - 1, len(data) + 1, len(data) + 4096]
    for length in lengths:
        path.write_bytes(data[:length].ljust(length, b"\0"))
        assert map_arrays(path, IDENTITY) is None, length
    path.write_bytes(data)
    assert map_arrays(path, IDENTITY) is not None


def test_every_damaged_byte_of_the_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = write(path, made([(3, 5)]))
    length = PREFIX.unpack(data[: PREFIX.size])[1]
    for at in range(PREFIX.size + length):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert map_arrays(path, IDENTITY) is None, at


def test_disk_that_is_full_is_an_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("the system has no /dev/full")
    with full.open("wb") as file, pytest.raises(OSError, match="No space left"):
        write_arrays(file.fileno(), IDENTITY, made([(3, 5)]))


def test_mapped_file_survives_its_replacement(tmp_path: Path) -> None:
    path, old, new = tmp_path / "a", made([(20, 40)]), made([(20, 40)], seed=1)
    write(path, old)
    found = map_arrays(path, IDENTITY)
    assert found is not None
    write(tmp_path / "b", new)
    (tmp_path / "b").replace(path)
    assert found["m0"].tobytes() == old["m0"].tobytes()
    path.unlink()
    assert found["m0"].tobytes() == old["m0"].tobytes()


def test_file_that_is_read_ahead_has_the_same_bits(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", made([(300, 4000)])
    write(path, contents)
    before = set(threading.enumerate())
    with patch.object(paging, "STEP_BYTES", 1 << 16):
        found = map_arrays(path, IDENTITY, is_read_ahead=True)
        for thread in set(threading.enumerate()) - before:
            thread.join(600)
            assert not thread.is_alive()
    assert found is not None
    assert found["m0"].tobytes() == contents["m0"].tobytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what is mapped on Linux")
def test_read_ahead_maps_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    size = len(write(path, made([(300, 4000)])))
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    thread = paging.read_ahead(view)
    assert thread is not None
    thread.join(600)
    _, _, after = Path("/proc/self/smaps").read_text().partition(f"{path}\n")
    resident = dict(line.split(":") for line in after.splitlines()[:10] if ":" in line)["Rss"]
    assert int(resident.split()[0]) * 1024 >= size
