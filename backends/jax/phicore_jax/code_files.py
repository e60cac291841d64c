"""Files of machine code that phicore keeps: damaged code would crash the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

from phicore.disk.replacing import replacing

DIGEST_BYTES = 32
NEWEST = 16
"""How many files of JAX's own cache are checked: more are not written at the moment of a kill."""
ZSTD = b"\x28\xb5\x2f\xfd"


def read(path: Path) -> bytes | None:
    """Return what `write` stored, or None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    """Write a file and its hash, atomically; do nothing if the folder is not writable."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, is_synced=False) as new:
            new.write_bytes(hashlib.sha256(content).digest() + content)


def remove_damaged(folder: Path) -> None:
    """Remove what a process that was killed has written half into the folder of JAX's own cache.

    JAX writes under the final name, does not replace a file that is there, and compiles the program
    of a damaged one at each start. The process was killed while it wrote the newest files.
    """
    with contextlib.suppress(OSError):
        found = [each for each in os.scandir(folder) if each.name.endswith("-cache")]
        times = {each.path: each.stat().st_mtime_ns for each in found}
        for path in sorted(times, key=lambda path: times[path])[-NEWEST:]:
            data = Path(path).read_bytes()
            if data.startswith(ZSTD):  # Python before 3.14 cannot tell
                continue
            try:
                zlib.decompress(data)
            except zlib.error:
                Path(path).unlink()
