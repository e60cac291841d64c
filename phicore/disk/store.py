"""A folder of array files with a limit, which several processes use at a time.

A file gets its name when it is complete and on the disk. A process that is killed leaves only a
partial file, which the next one that writes removes. The files that were not used for the longest
time make room for new ones; a process that has mapped such a file keeps its contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phicore.disk.arrays import Arrays, file_bytes, map_arrays, write_arrays

if sys.platform != "win32":
    import fcntl

SUFFIX, PARTIAL = ".arrays", ".partial"
FREE_FILES = 3
"""A file is written if the disk has this many times its size free."""


@dataclass(frozen=True)
class Key:
    """What the arrays of a file are made from.

    Attributes:
        title: What people call it, for the name of the file.
        identity: All that the arrays depend on, in values that JSON has. Files with another
            identity are others.
    """

    title: str
    identity: dict[str, Any] = field(hash=False)

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        title = re.sub(r"[^\w.-]+", "-", self.title)[:80].strip(".-")
        return f"{title}-{digest[:16]}{SUFFIX}"


@dataclass(frozen=True)
class ArrayStore:
    """A folder of array files.

    Attributes:
        folder: The folder, which is made when it is needed.
        limit_bytes: The most bytes that all files together may have.
    """

    folder: Path
    limit_bytes: int

    def find(self, key: Key, *, is_read_ahead: bool = False) -> dict[str, np.ndarray] | None:
        """Map the arrays of a key, or return None if there is no usable file.

        This counts as a use of the file.

        Args:
            is_read_ahead: Whether a thread reads the file into memory.
        """
        path = self.folder / key.file_name
        found = map_arrays(path, key.identity, is_read_ahead=is_read_ahead)
        if found is not None:
            with suppress(OSError):  # a read-only folder
                os.utime(path)
        return found

    def put(self, key: Key, arrays: Arrays, pause: Callable[[], None] = lambda: None) -> bool:
        """Write the arrays of a key, unless there is no room or another process is doing so.

        Args:
            pause: Called before each piece of the file. An exception of it ends the writing, and
                leaves no file.
        Returns:
            Whether the file was written. It was not if the folder cannot be written to.
        """
        size = file_bytes(key.identity, arrays)
        if sys.platform == "win32" or size > self.limit_bytes:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._is_being_written(key.file_name):
                return False
            self._make_room(self.limit_bytes - size, key.file_name)
            if shutil.disk_usage(self.folder).free < FREE_FILES * size:
                return False
            fd, name = tempfile.mkstemp(PARTIAL, f".{key.file_name}.", self.folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write_arrays(fd, key.identity, arrays, pause)
                Path(name).replace(self.folder / key.file_name)
                self._sync()
            finally:
                Path(name).unlink(missing_ok=True)
                os.close(fd)
        except OSError:
            return False
        return True

    def files(self) -> list[Path]:
        """Return the complete files, those first that were not used for the longest time."""
        found = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process removed it
                found[path] = path.stat().st_mtime_ns
        return sorted(found, key=lambda path: found[path])

    def _make_room(self, left_bytes: int, replaced: str) -> None:
        """Remove files until the others have at most this size, without the one to be replaced."""
        files = [path for path in self.files() if path.name != replaced]
        sizes = {path: path.stat().st_size for path in files}
        total = sum(sizes.values())
        for path in files:
            if total <= left_bytes:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path]

    def _is_being_written(self, file_name: str) -> bool:
        """Return whether a process is writing a file; remove what killed processes have left."""
        is_written = False
        for path in self._partial_files():
            with suppress(OSError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:  # its writer lives
                    is_written |= path.name.startswith(f".{file_name}.")
        return is_written

    def _partial_files(self) -> Iterator[Path]:
        return self.folder.glob(f".*{SUFFIX}.*{PARTIAL}")

    def _sync(self) -> None:
        """Wait until the disk has the names of the folder."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
