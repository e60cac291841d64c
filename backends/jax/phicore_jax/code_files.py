"""Files of machine code that phicore keeps: damaged code would crash the process."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from phicore.disk.replacing import replacing

DIGEST_BYTES = 32


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
