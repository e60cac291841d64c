"""The engines that take part in `peers.py`: which are there, and how each is started."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engines import LIBRARIES
from engines.ik import Programs
from engines.worker import Worker

from phicore.backend import BackendOptions
from phicore.backend.host import cpu_count, free_memory_bytes
from phicore.errors import ArgumentError, PhicoreError
from phicore.plugins import Plugins

IK = "ik_llama.cpp"
ONNX = "onnxruntime-genai"
PEERS = (*LIBRARIES, IK)
FAST = "jax-fast"
DENSE_BYTES = {"numpy": 4.4, "array-api-strict": 4.4, "transformers": 9.0}
"""Bytes for each weight that an engine needs at its peak, of those that expand weights."""
SLOW = ("array-api-strict",)
"""Backends that are for tests, and run only if they are named."""
PORTABLE_BUILD = (
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON '
    "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON "
    '-DGGML_AVX_VNNI=ON"'
)
INSTALL = {
    "llama.cpp": "`uv run --with llama-cpp-python==0.3.36 ...` builds it (if it then crashes, as "
    f"it can on a CPU with AMX: {PORTABLE_BUILD} uv run ...)",
    "mlx-lm": "`uv run --with mlx-lm ...` installs it beside phicore, which reads the file",
    "onnxruntime-genai": "benchmarks/engines/onnx_peer.py says how to get it and its model",
    "transformers": "`uv run --group torch --with transformers ...` installs it",
}


class Process(Protocol):
    """What answers requests: a `Worker`, or `Programs`."""

    def ask(self, command: str, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Contender:
    """An engine that takes part.

    Attributes:
        name: Its name in tables.
        start: Starts its process, for texts of up to so many tokens.
        is_prompts_alone: Whether only its prompts differ from those of another contender.
        is_ours: Whether it is phicore.
    """

    name: str
    start: Callable[[int], AbstractContextManager[Process]]
    is_prompts_alone: bool = False
    is_ours: bool = False


@dataclass(frozen=True)
class Found:
    """The engines that take part, and a line about each that does not though it could."""

    contenders: list[Contender]
    left_out: list[str]


def contenders(
    peers: Sequence[str] | None,
    backends: Sequence[str] | None,
    path: Path,
    weights: int,
    threads: int | None,
    device: str = "cpu",
    onnx: str | None = None,
) -> Found:
    """Return the engines that take part.

    Args:
        peers: `NAME` or `NAME=PATH` of each peer; "none" is no peer. None is all that this Python
            has; without `onnx`, onnxruntime-genai is then left out.
        backends: Names of phicore's backends, and `jax-fast`. None is all that work here.
        weights: The number of weights of the file, for those that expand them in memory.
        onnx: The folder of the model that onnxruntime-genai runs.
    Raises:
        ArgumentError: If a name is not known, or a peer that was named is not there.
    """
    left_out: list[str] = []
    names = _peers(peers)
    if peers is None and ONNX in names and onnx is None:
        names.remove(ONNX)
        left_out.append(f"{ONNX}: --onnx names the folder of its model")
    found = [_peer(text, path, threads, device, onnx) for text in names]
    found += _ours(backends, path, threads, device, left_out)
    is_named = {*(text.partition("=")[0] for text in peers or ()), *(backends or ())}
    fitting = []
    for contender in found:
        need = DENSE_BYTES.get(contender.name.removeprefix("phicore "), 0) * weights
        free = free_memory_bytes()
        if free is not None and need > free and contender.name not in is_named:
            left_out.append(
                f"{contender.name}: it expands the weights and needs {need / 1e9:.0f} GB of memory,"
                f" of which {free / 1e9:.0f} GB are free"
            )
        else:
            fitting.append(contender)
    if not fitting:
        raise ArgumentError("no engine is left; name one with --peer or --backend")
    return Found(fitting, left_out)


def _peers(given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    for text in given:
        name = text.partition("=")[0]
        if name not in (*PEERS, "none"):
            raise ArgumentError(f"no peer {name!r}; there are: {', '.join(PEERS)}, none")
    return [text for text in given if text != "none"]


def _peer(text: str, path: Path, threads: int | None, device: str, onnx: str | None) -> Contender:
    name, _, place = text.partition("=")
    model, used = str(path), threads or cpu_count()
    if name == IK:
        if not Path(place).is_file():
            raise ArgumentError(
                f"{text}: expected {IK}=PATH of the program llama-bench, beside which there is "
                "llama-batched-bench; its README says how to build them (-DGGML_NATIVE=ON)"
            )
        return Contender(name, lambda context: Programs(place, model, used))
    python = place or sys.executable
    _check_library(name, python)
    options: dict[str, Any] = {"model": model}
    if name == "llama.cpp":
        options |= {"threads": used, "flash_attn": True}

        def start(context: int) -> Worker:  # phicore and others size their caches themselves
            return Worker(python, name, options | {"context": -(-context // 256) * 256})

        return Contender(name, start)
    if name == "mlx-lm":
        options["device"] = device
    if name == ONNX:
        if onnx is None or not (Path(onnx) / "genai_config.json").is_file():
            raise ArgumentError(f"{name}: expected --onnx FOLDER of its model, got {onnx}")
        options = {"model": onnx, "threads": used}
    return Contender(name, lambda context: Worker(python, name, options, threads))


def _check_library(name: str, python: str) -> None:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({LIBRARIES[name]!r}) is None)"
    try:
        subprocess.run([python, "-c", code], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise ArgumentError(
            f"{python}: it has no {LIBRARIES[name]}; {INSTALL[name]}; --peer {name}=PYTHON names "
            "another Python"
        ) from None


def _ours(
    given: Sequence[str] | None,
    path: Path,
    threads: int | None,
    device: str,
    left_out: list[str],
) -> list[Contender]:
    infos = Plugins().backends()
    names = [n for n in infos if n not in SLOW] if given is None else [*given]
    if given is None and "jax" in names:
        names.insert(names.index("jax") + 1, FAST)
    if unknown := [name for name in names if name not in (*infos, FAST)]:
        known = ", ".join((*infos, FAST))
        raise ArgumentError(f"no backend {unknown[0]!r}; there are: {known}")
    found = []
    for name in names:
        backend = "jax" if name == FAST else name
        try:
            ops = infos[backend].create(BackendOptions(device=device)).capabilities
        except PhicoreError as error:
            left_out.append(f"phicore {name}: {error}")
            continue
        options: dict[str, Any] = {"model": str(path), "backend": backend, "device": device}
        if ops.has_threads and threads:  # the JAX backend without kernels refuses any number
            options["threads"] = threads
        if name == FAST:
            if not ops.has_fast_prefill:
                left_out.append(f"phicore {name}: this processor has no fast prefill")
                continue
            options["fast_prefill"] = True

        def start(context: int, options: dict[str, Any] = options) -> Worker:
            return Worker(sys.executable, "phicore", options, threads)

        found.append(Contender(f"phicore {name}", start, name == FAST, is_ours=True))
    return found
