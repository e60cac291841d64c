"""A file of arrays, which processes map into memory and share.

The file begins with `MAGIC`, the length of the header in bytes (uint64) and the header's SHA-256.
The header is JSON. It has the identity of the contents, the size of the whole file, and the name,
the start and the shape of each array. The arrays are uint8, and each begins at a multiple of
`ALIGNMENT` bytes. Zeros follow the last one.

A file is never changed once it has its name, so a map of it stays valid: a newer file replaces the
name, and the older contents exist until nobody maps them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from phicore.disk import paging

MAGIC = b"phicore\x01"
PREFIX = struct.Struct("<8sQ32s")
MOST_HEADER_BYTES = 64 << 20
ALIGNMENT = 64  # JAX does not copy arrays that are aligned so
TAIL_BYTES = 4096
"""Number of zeros at the end, so that code may load a whole vector at the end of the last array."""
PIECE_BYTES = 16 << 20
"""Number of bytes that are written at a time. Linux keeps what is written in whole multiples of 2
MiB in huge pages, if the file system can (ext4 since 6.16, XFS): maps of the file then have them
too."""

Arrays = Mapping[str, np.ndarray]
Identity = Mapping[str, Any]


def file_bytes(identity: Identity, arrays: Arrays) -> int:
    """Return the size that a file of these arrays has."""
    return _layout(identity, arrays)[1]


def write_arrays(
    fd: int, identity: Identity, arrays: Arrays, pause: Callable[[], None] = lambda: None
) -> None:
    """Write a file from its beginning, and wait until the disk has it.

    Args:
        fd: The descriptor of an empty file.
        identity: What the contents are made from, in values that JSON has.
        arrays: The arrays by name, contiguous and of uint8.
        pause: Called before each piece of the file. An exception of it ends the writing.
    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    head, size, starts = _layout(identity, arrays)
    parts = [(0, np.frombuffer(head, np.uint8))]
    parts += [(starts[name], array.reshape(-1)) for name, array in arrays.items()]
    for start, piece in _pieces(parts, size):
        pause()
        left, at = piece.data, start
        while left:
            written = os.pwrite(fd, left, at)
            left, at = left[written:], at + written
        paging.begin_to_write_back(fd, start, piece.size)
    os.fsync(fd)


def _pieces(parts: list[tuple[int, np.ndarray]], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a file in pieces of `PIECE_BYTES`, each in the same memory.

    Args:
        parts: The start of each part in the file and its bytes, in order. Zeros lie between them.
    """
    memory = np.empty(min(PIECE_BYTES, size), np.uint8)
    index = 0
    for first in range(0, size, PIECE_BYTES):
        piece = memory[: min(PIECE_BYTES, size - first)]
        end = first + piece.size
        piece.fill(0)
        while index < len(parts):
            start, part = parts[index]
            begin, stop = max(start, first), min(start + part.size, end)
            if begin < stop:
                np.copyto(piece[begin - first : stop - first], part[begin - start : stop - start])
            if start + part.size > end:
                break
            index += 1
        yield first, piece


def _layout(identity: Identity, arrays: Arrays) -> tuple[bytes, int, dict[str, int]]:
    """Return the first bytes of a file, its size, and the start of each array."""
    table: list[list[Any]] = []
    at = 0  # from the end of the header, so that the header's length does not depend on it
    for name, array in arrays.items():
        table.append([name, at, list(array.shape)])
        at = _aligned(at + array.nbytes)
    at += TAIL_BYTES
    header = {"identity": identity, "arrays_bytes": at, "arrays": table}
    text = json.dumps(header, sort_keys=True).encode()
    head = PREFIX.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text
    first = _aligned(len(head))
    return head, first + at, {name: first + start for name, start, _ in table}


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def map_arrays(
    path: Path, identity: Identity, *, is_read_ahead: bool = False
) -> dict[str, np.ndarray] | None:
    """Map the arrays of a file, read-only.

    Args:
        is_read_ahead: Whether a thread reads the file into memory. If False, the parts of the file
            are read when they are used.
    Returns:
        The arrays by name, or None if the file is missing, damaged, cut short, of another version
        of this format, or of something else.
    """
    try:
        with path.open("rb") as file:
            header, first = _read_header(file.fileno())
            if header["identity"] != identity:
                return None
            size = first + header["arrays_bytes"]
            if os.fstat(file.fileno()).st_size != size:  # a map of less would end the process
                return None
            view = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        paging.prefer_huge_pages(view)
        found = {
            name: _array(view, first, size, start, shape) for name, start, shape in header["arrays"]
        }
        if is_read_ahead:
            paging.read_ahead(view)
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_header(fd: int) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and the start of the arrays.

    Raises:
        ValueError: If the header is damaged, or of another version.
    """
    prefix = os.pread(fd, PREFIX.size, 0)
    if len(prefix) < PREFIX.size:
        raise ValueError("too short")
    magic, length, digest = PREFIX.unpack(prefix)
    if magic != MAGIC or length > MOST_HEADER_BYTES:
        raise ValueError("not a file of arrays")
    text = os.pread(fd, length, PREFIX.size)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("damaged")
    return json.loads(text), _aligned(PREFIX.size + length)


def _array(view: mmap.mmap, first: int, size: int, start: int, shape: list[int]) -> np.ndarray:
    count = prod(shape)
    if start < 0 or count < 0 or first + start + count > size:
        raise ValueError("an array outside of the file")
    return np.frombuffer(view, np.uint8, count, first + start).reshape(shape)
