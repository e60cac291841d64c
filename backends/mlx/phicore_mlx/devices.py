"""Where MLX computes, and what is different there. Nothing else asks which platform this is."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any

from phicore.errors import BackendError

# MLX would multiply float32 with the 11 bits of TF32 where the hardware can. It reads this once.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

OLDEST = (0, 31, 2)
"""The first version with streams of threads."""

try:
    import mlx.core as mx
except ImportError as _error:
    _hint = "phicore-mlx[cpu], or phicore-mlx[cuda] for NVIDIA GPUs"
    if sys.platform == "darwin":
        _hint = "phicore-mlx, with a Python for arm64, on macOS 14 or later"
    raise BackendError(f"backend mlx: MLX cannot be imported ({_error}); install {_hint}") from None


VERSION: str = getattr(mx, "__version__", "0")  # which its type stubs leave out

if tuple(int(part) for part in VERSION.split(".")[:3] if part.isdecimal()) < OLDEST:
    raise BackendError(
        f"backend mlx: MLX {VERSION} is too old; install {'.'.join(map(str, OLDEST))} or later"
    )


@atexit.register
def _end_streams() -> None:
    """MLX wants its streams cleared before Python ends, and aborts the process now and then if they
    are not: what threads that have just ended leave to it is not done yet."""
    mx.synchronize()
    if hasattr(mx, "clear_streams"):
        mx.clear_streams()


class _OfThread:
    """Ends the streams of the thread that it belongs to, when that ends."""

    def __del__(self) -> None:
        if hasattr(mx, "clear_streams"):
            mx.synchronize()
            mx.clear_streams()


_threads = threading.local()


def end_streams_with_thread() -> None:
    """Call in each thread that computes: MLX leaves the streams of one that has ended running."""
    if threading.current_thread() is not threading.main_thread():
        _threads.streams = getattr(_threads, "streams", None) or _OfThread()


def gpu_kind() -> str | None:
    """`metal`, `cuda`, or None where MLX has no GPU."""
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    return None


def device_names() -> list[str]:
    """The devices of this machine that MLX can use, the fastest first."""
    kind = gpu_kind()
    if kind is None:
        return ["cpu"]
    count = mx.device_count(mx.gpu) if hasattr(mx, "device_count") else 1
    return [kind, *(f"{kind}:{i}" for i in range(1, count)), "cpu"]


def find_device(name: str | None) -> tuple[str, Any]:
    """The name and the MLX device of a name, or of the fastest one for None.

    Raises:
        BackendError: If there is no such device; the message lists those there are.
    """
    names = device_names()
    name = names[0] if name is None else name.removesuffix(":0")
    if name not in names:
        hints = {
            "cuda": "; for NVIDIA GPUs install phicore-mlx[cuda], without [cpu]",
            "metal": "; MLX has Metal on Macs with Apple silicon",
        }
        kind = name.partition(":")[0]
        hint = "" if kind == gpu_kind() else hints.get(kind, "")
        raise BackendError(f"backend mlx: no device {name!r} (available: {', '.join(names)}){hint}")
    if name == "cpu":
        return name, mx.Device(mx.cpu, 0)
    return name, mx.Device(mx.gpu, int(name.partition(":")[2] or 0))


def about() -> str:
    """What `phicore backends` says of MLX here."""
    kind = gpu_kind()
    if kind is None:
        return f"MLX {VERSION}, no GPU: for small models"
    return f"MLX {VERSION}, {mx.device_info(mx.gpu).get('device_name', kind)}"


def wire_memory() -> None:
    """Let Metal keep what MLX holds in memory, as mlx-lm does: macOS would page weights out.

    It concerns only memory that MLX has in use, up to the size that macOS recommends, and holds for
    the life of the process.
    """
    if gpu_kind() == "metal":
        mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))


def check_room(needed: int) -> None:
    """See that MLX will find memory on a CPU, where it crashes if it does not.

    Raises:
        MemoryError: If the machine has not so many bytes besides those in use.
    """
    if not hasattr(os, "sysconf"):
        return
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - mx.get_active_memory()
    if needed > room:
        raise MemoryError(f"{needed / 1e9:.1f} GB wanted, {max(room, 0) / 1e9:.1f} GB left")
