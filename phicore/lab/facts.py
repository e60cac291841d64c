"""Facts about an installation for `phicore doctor`, as plain data that tells nothing private."""

from __future__ import annotations

import os
import platform
import re
import stat
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from phicore.backend.host import cpu_count, cpu_name, free_memory_bytes, memory_bytes
from phicore.disk.folders import KINDS, cache_folder, items, stats

SHOWN = (
    "PHICORE_CPU",
    "PHICORE_DISABLE_PLUGINS",
    "PHICORE_KERNELS",
    "PHICORE_PACKED_CACHE",
    "PHICORE_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "MLX_ENABLE_TF32",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
"""Environment variables whose values are shown. Of others, which may hold keys, tokens, or names of
files, only the name is."""
PREFIXES = ("PHICORE_", "JAX_", "XLA_", "MLX_", "HF_")
"""How the names of environment variables begin that are listed."""
OURS = ("HF_HUB_DISABLE_TELEMETRY",)
"""Variables that phicore sets itself."""


def system() -> dict[str, Any]:
    """Return versions of Python and the platform, the processor and the memory."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processor": cpu_name(),
        "cpus": cpu_count(),
        "memory_bytes": memory_bytes(),
        "free_memory_bytes": free_memory_bytes(),
    }


def libraries() -> dict[str, str | None]:
    """Return the versions of the packages that phicore always needs; None if one is missing."""
    names = [r.name for r in _requirements("phicore") if _is_wanted(r, "")]
    return {name: _version(name) for name in names}


def libraries_of(distribution: str) -> dict[str, str | None]:
    """Return the versions of the packages that a backend's distribution needs, and of their parts.

    A part of jax is what is installed and has a name that begins with it, such as jaxlib. Packages
    that phicore itself needs are left out.
    """
    own = {canonicalize_name(name) for name in ("phicore", *libraries())}
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions() if d.name}
    found: dict[str, str | None] = {}
    for needed in _requirements(distribution):
        name = canonicalize_name(needed.name)
        if name in own or not _is_wanted(needed, ""):
            continue
        parts = sorted(each for each in installed if each.startswith(name))
        found.update({part: installed[part] for part in parts} if parts else {name: None})
    return found


def extras() -> list[dict[str, Any]]:
    """Return phicore's extras by name, each with the packages that are missing for it."""
    names = metadata.metadata("phicore").get_all("Provides-Extra") or []
    return [{"name": name, "missing": _missing("phicore", name)} for name in sorted(names)]


def _missing(distribution: str, extra: str) -> list[str]:
    """Return the packages of a distribution's extra that are not installed."""
    missing: list[str] = []
    for needed in _requirements(distribution):
        if _is_wanted(needed, "") or not _is_wanted(needed, extra):
            continue
        if _version(needed.name) is None:
            missing.append(needed.name)
        else:
            missing += [m for each in sorted(needed.extras) for m in _missing(needed.name, each)]
    return list(dict.fromkeys(missing))


def _requirements(distribution: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        return []


def _is_wanted(needed: Requirement, extra: str) -> bool:
    return needed.marker is None or needed.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def folders(others: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return the folders that phicore writes to: kind, path, size and whether that is possible.

    `is_shared` tells that everybody may write there, which lets others run code as this user.
    No names of files are in it.

    Args:
        others: Folders beside those of the cache, by kind.
    """
    found = []
    for kind in KINDS:
        held = items([kind])
        sizes = sum(item.size_bytes for item in held), sum(item.files for item in held)
        found.append(_folder(kind, cache_folder(), *sizes))
    for kind, path in others.items():
        sizes_bytes = [size_bytes for size_bytes, _ in stats(path)]
        found.append(_folder(kind, path, sum(sizes_bytes), len(sizes_bytes)))
    return found


def _folder(kind: str, path: Path, size_bytes: int, files: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": str(path),
        "size_bytes": size_bytes,
        "files": files,
        "is_writable": _is_writable(path),
        "is_shared": path.is_dir() and bool(path.stat().st_mode & stat.S_IWOTH),
    }


def _is_writable(folder: Path) -> bool:
    """Return whether a file can be made in a folder, or in the nearest folder that exists."""
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def variables(env: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Return the environment variables that matter; None hides a value that may be private.

    Args:
        env: The variables of the process.
    """
    names = {n for n in env if n in SHOWN or n.startswith(PREFIXES)} - {*OURS}
    return {name: _harmless(name, env[name]) for name in sorted(names)}


def _harmless(name: str, value: str) -> str | None:
    """Return the value of a variable, without addresses' user names and passwords, or None."""
    return re.sub(r"//[^/@\s]*@", "//", value) if name in SHOWN else None
