"""Replaces a file by a new one at once, so that nobody ever reads half of it.

The new file is written in a folder of its own beside the old one, `.NAME.*.new`, so a library that
writes it may use further names. The writer holds a lock on that folder. Whoever writes the same
file later removes the folders whose writers were killed.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

SUFFIX = ".new"
_LONGEST = 80  # so that the folder's name is not too long for the file system
_TRIES = 20


@contextmanager
def replacing(path: Path, *, mode: int | None = None, is_synced: bool = True) -> Iterator[Path]:
    """Give a path to write to, and put that file in the place of `path` when it is complete.

    If the block raises, `path` stays as it is. If the block writes no file, so does it, too.

    Args:
        path: The file to replace, or to make. Its folder must exist.
        mode: The rights of the new file; None leaves them as they are.
        is_synced: Whether the disk has the new contents before they get the name. A file that is
            made again if it is damaged need not wait for that.
    Raises:
        OSError: If the file cannot be written.
    """
    remove_left(path.parent, path.name)
    folder, lock = _own_folder(path)
    try:
        new = folder / path.name
        yield new
        if not new.exists():
            return
        if mode is not None:
            new.chmod(mode)
        if is_synced:
            _sync(new)
        new.replace(path)
        if is_synced and sys.platform != "win32":
            with suppress(OSError):  # some file systems cannot; the file is there all the same
                _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_left(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers have left in a folder.

    Args:
        name: The name of the file that they wanted to write; None means any name.
    """
    if sys.platform == "win32":
        return
    start = ".*" if name is None else f".{glob.escape(name[:_LONGEST])}.*"
    with suppress(OSError):
        for each in folder.glob(f"{start}{SUFFIX}"):
            with suppress(OSError):
                _remove_if_left(each)


def _remove_if_left(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the writer lives
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _own_folder(path: Path) -> tuple[Path, int | None]:
    """Make a folder and lock it; return its path, and the descriptor that holds the lock."""
    prefix = f".{path.name[:_LONGEST]}."
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(SUFFIX, prefix, path.parent))
        if sys.platform == "win32":
            return folder, None
        with suppress(FileNotFoundError):  # somebody who removes what is left was quicker
            lock = os.open(folder, os.O_RDONLY)
            if _is_ours(lock) and folder.exists():
                return folder, lock
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
    raise OSError(None, "no folder can be locked", str(path.parent))


def _is_ours(lock: int) -> bool:
    """Lock a folder that was just made; return whether nobody else has locked it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as on NFS: nobody can lock it there, so nobody removes it, either
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
