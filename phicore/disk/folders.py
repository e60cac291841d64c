"""What lies in phicore's cache folder: its kinds, sizes and last uses, and how it is cleared."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from phicore.disk.store import ArrayStore
from phicore.errors import ArgumentError
from phicore.settings import bytes_of

LIMIT = "PHICORE_PACKED_CACHE"
DEFAULT_LIMIT = "20GB"


@dataclass(frozen=True)
class Kind:
    """A kind of contents of the cache folder.

    Attributes:
        about: A description for people.
        patterns: The files and folders of this kind, below the cache folder.
    """

    about: str
    patterns: tuple[str, ...]


KINDS = {
    "packed": Kind("weights in the form that the kernels read", ("packed/*",)),
    "compiled": Kind("kernels, and programs of XLA", ("kernels/*", "programs-*", "jax-*")),
    "synthetic": Kind("models of random weights for benchmarks", ("synthetic/*",)),
}


@dataclass(frozen=True)
class Item:
    """Something in the cache folder.

    Attributes:
        kind: Its name in `KINDS`.
        path: A file, or a folder with all that is in it.
        size_bytes: The size that its files have together.
        files: The number of files.
        used_s: When it was used or changed last, in seconds since 1970.
    """

    kind: str
    path: Path
    size_bytes: int
    files: int
    used_s: float


def cache_folder() -> Path:
    """Return phicore's folder among the user's caches."""
    import platformdirs

    return platformdirs.user_cache_path("phicore")


def packed_weights() -> ArrayStore:
    """Return the store of packed weights.

    Raises:
        ArgumentError: If the environment variable PHICORE_PACKED_CACHE is not a size.
    """
    text = os.environ.get(LIMIT, "") or DEFAULT_LIMIT
    limit_bytes = bytes_of(text)
    if limit_bytes is None:
        raise ArgumentError(parameter=LIMIT, expected="a size such as 20GB, or 0", got=text)
    return ArrayStore(cache_folder() / "packed", limit_bytes)


def items(kinds: Sequence[str] = tuple(KINDS)) -> list[Item]:
    """Return what the cache folder has of these kinds."""
    found = []
    for kind in kinds:
        for pattern in KINDS[kind].patterns:
            for path in sorted(cache_folder().glob(pattern)):
                if files := list(stats(path)):
                    sizes, times = zip(*files, strict=True)
                    found.append(Item(kind, path, sum(sizes), len(sizes), max(times)))
    return found


def stats(path: Path) -> Iterator[tuple[int, float]]:
    """Yield the size in bytes of each file of a folder, or of a file, and when it was used last.

    Times are in seconds since 1970. What another process removes meanwhile is left out.
    """
    paths = path.rglob("*") if path.is_dir() else [path]
    for each in paths:
        with suppress(OSError):  # another process removed it
            info = each.lstat()
            if stat.S_ISREG(info.st_mode):
                yield info.st_size, max(info.st_mtime, info.st_atime)


def unused(kinds: Sequence[str], unused_s: float) -> list[Item]:
    """Return what the cache folder has of these kinds and was not used for so many seconds."""
    return [item for item in items(kinds) if time.time() - item.used_s >= unused_s]


def clear(found: Iterable[Item]) -> None:
    """Remove items. Processes that have mapped a file keep its contents.

    Raises:
        OSError: If something cannot be removed.
    """
    for item in found:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
