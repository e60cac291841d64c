"""Facts about the machine that a backend runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the name of the CPU, or that of its architecture if the system does not tell it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Return the size of the machine's memory in bytes; None if the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory_bytes() -> int | None:
    """Return how much memory new programs can use, in bytes; None if the system does not say.

    In a container, this is what its limit leaves.
    """
    free = []
    if lines := _read("/proc/meminfo"):
        found = {name: rest.split() for name, _, rest in (x.partition(":") for x in lines)}
        free += [1024 * int(found["MemAvailable"][0])] if "MemAvailable" in found else []
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        free.append(int(limit[0]) - int(used[0]))
    return max(min(free), 0) if free else None


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
