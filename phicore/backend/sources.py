"""A digest of source files, for what was computed from them and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sources_digest(folders: Iterable[Path]) -> str | None:
    """Return a hash of all Python files in these folders and their subfolders.

    Returns:
        The hash; None if a folder has no such file or cannot be read, for example since the package
        was not unpacked. What was kept could then not be told from what is out of date.
    """
    digest = hashlib.sha256()
    for folder in folders:
        try:
            files = sorted(folder.rglob("*.py"))
            for file in files:
                digest.update(f"{file.relative_to(folder)}\0".encode())
                digest.update(file.read_bytes())
        except OSError:
            return None
        if not files:
            return None
    return digest.hexdigest()
