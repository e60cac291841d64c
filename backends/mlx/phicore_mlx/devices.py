"""MLX's devices and their peculiarities; all platform checks of the package are in this module."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any

from phicore.errors import BackendError

# By default MLX multiplies float32 in TF32, which keeps 11 bits, where the hardware supports it.
# MLX reads this variable once.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

OLDEST = (0, 31, 2)
"""The first MLX version with thread-local streams."""

try:
    import mlx.core as mx
except ImportError as _error:
    _hint = "phicore-mlx[cpu], or phicore-mlx[cuda] for NVIDIA GPUs"
    if sys.platform == "darwin":
        _hint = "phicore-mlx, with a Python for arm64, on macOS 14 or later"
    raise BackendError(f"backend mlx: MLX cannot be imported ({_error}); install {_hint}") from None


VERSION: str = getattr(mx, "__version__", "0")  # MLX's type stubs leave `__version__` out

if tuple(int(part) for part in VERSION.split(".")[:3] if part.isdecimal()) < OLDEST:
    raise BackendError(
        f"backend mlx: MLX {VERSION} is too old; install {'.'.join(map(str, OLDEST))} or later"
    )


@atexit.register
def _end_streams() -> None:
    """Clear MLX's streams before Python ends.

    MLX sometimes aborts the process otherwise, because threads that have just ended may have left
    work that is not finished yet.
    """
    mx.synchronize()
    if hasattr(mx, "clear_streams"):
        mx.clear_streams()


class _OfThread:
    """A thread-local object that clears the streams of its thread when the thread ends."""

    def __del__(self) -> None:
        if hasattr(mx, "clear_streams"):
            mx.synchronize()
            mx.clear_streams()


_threads = threading.local()


def end_streams_with_thread() -> None:
    """Arrange that this thread's MLX streams are cleared when the thread ends.

    Call it in each thread that computes: MLX does not stop the streams of an ended thread.
    """
    if threading.current_thread() is not threading.main_thread():
        _threads.streams = getattr(_threads, "streams", None) or _OfThread()


def gpu_kind() -> str | None:
    """Return `metal` or `cuda`, or None if MLX has no GPU here."""
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    return None


def device_names() -> list[str]:
    """Return the names of the devices that MLX can use on this machine, the fastest first."""
    kind = gpu_kind()
    if kind is None:
        return ["cpu"]
    count = mx.device_count(mx.gpu) if hasattr(mx, "device_count") else 1
    return [kind, *(f"{kind}:{i}" for i in range(1, count)), "cpu"]


def find_device(name: str | None) -> tuple[str, Any]:
    """Return the normalized name and the MLX device for a device name; None means the fastest.

    Raises:
        BackendError: If there is no such device; the message lists the available devices.
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
    """Return the note that `phicore backends` prints about MLX on this machine."""
    kind = gpu_kind()
    if kind is None:
        return f"MLX {VERSION}, no GPU: for small models"
    return f"MLX {VERSION}, {mx.device_info(mx.gpu).get('device_name', kind)}"


def wire_memory() -> None:
    """Wire MLX's memory on Metal, as mlx-lm does, so that macOS does not page weights out.

    The setting affects only memory that MLX uses, up to the size that macOS recommends. It lasts
    until the process ends.
    """
    if gpu_kind() == "metal":
        mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))


def check_room(needed: int) -> None:
    """Check that a CPU allocation will fit, because MLX crashes on a CPU when memory runs out.

    Args:
        needed: Bytes that MLX is about to allocate.
    Raises:
        MemoryError: If the machine's memory, less MLX's active memory, is smaller than `needed`.
    """
    if not hasattr(os, "sysconf"):
        return
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - mx.get_active_memory()
    if needed > room:
        raise MemoryError(f"{needed / 1e9:.1f} GB wanted, {max(room, 0) / 1e9:.1f} GB left")
