# ruff: noqa: E402 - JAX reads its settings when it is imported
"""Compile steps for an H200 and a T4 without having these GPUs, and print a summary as JSON.

XLA's compiler for NVIDIA GPUs needs no GPU, only the packages `jax-cuda13-plugin`,
`jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and `nvidia-nvvm`. This runs as a separate process, since JAX
reads its settings when it is imported.

    python ahead_of_time.py MODEL.gguf
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

dumps = tempfile.TemporaryDirectory()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={dumps.name}"

import jax
import numpy as np
from gguf import GGMLQuantizationType as Type
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from phicore_jax import cuda
from phicore_jax.backend import JaxBackend, capabilities_of
from phicore_jax.cuda import check, runtime
from phicore_jax.parallel import AXIS, Devices

from phicore.backend import Backend, BackendOptions
from phicore.engine import Engine
from phicore.gguf.reader import open_gguf

# Properties of a GPU that XLA needs, from NVIDIA's data sheets and CUDA's tables (sm_90, sm_75).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
T4 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 65536
  shared_memory_per_block_optin: 65536
  core_count: 40 fpus_per_core: 64 clock_rate_ghz: 1.59
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 320000000000 l2_cache_size: 4194304 device_memory_size: 15655829504
  cuda_compute_capability { major: 7 minor: 5 }
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "Tesla T4"
"""


class AheadOfTime(JaxBackend):
    """JAX on absent GPUs.

    Arrays are only shapes. A call of a compiled function returns the compiled program and does not
    run it.
    """

    def __init__(self, devices: int, gpu: str, steps: int = 1) -> None:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=gpu, topology=f"1x1x{devices}"
        )
        self.device = topology.devices[0]
        self._packing_device = None
        self._shared, self._grow = None, {}
        mesh = Mesh(np.array(topology.devices), (AXIS,))
        self._sharding = NamedSharding(mesh, PartitionSpec())
        if devices > 1:
            self._shared = AbsentDevices(mesh)
        kernels, about = cuda.find_kernels()
        assert kernels is not None, about
        self._kernels, self._loading = kernels, threading.local()
        capabilities = capabilities_of("cuda", kernels, steps)
        Backend.__init__(self, BackendOptions(devices=devices), capabilities)

    def _put(self, x: np.ndarray) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding)

    def _zeros(self, forms: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
        if self._shared is not None:
            return self._shared.zeros(forms)
        return [jax.ShapeDtypeStruct(f.shape, f.dtype, sharding=self._sharding) for f in forms]

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        jitted = self._jit(fn, donate)
        return lambda *args: jitted.lower(*args).compile()


class AbsentDevices(Devices):
    """Absent GPUs that share a model."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.mine = [*range(mesh.size)]

    def zeros(self, forms: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
        sharding, count = NamedSharding(self.mesh, PartitionSpec(AXIS)), self.mesh.size
        shapes = ((count * f.shape[0], *f.shape[1:]) for f in forms)
        pairs = zip(shapes, forms, strict=True)
        return [jax.ShapeDtypeStruct(shape, f.dtype, sharding=sharding) for shape, f in pairs]

    def put_shares(self, shares: Mapping[int, Any]) -> Any:
        return jax.tree.map(lambda a: self.zeros([a])[0], shares[0])


def main(path: str) -> None:
    found = {"step": compiled(path, 1, 1), "steps": compiled(path, 1, 8)}
    found["logprobs"] = compiled(path, 1, 1, has_logprobs=True)
    found["logprobs_steps"] = compiled(path, 1, 8, has_logprobs=True)
    found["prompt"] = compiled(path, 256, 1)
    found["shared_step"] = compiled(path, 1, 1, devices=2)
    found["old_step"] = compiled(path, 1, 1, gpu=T4)
    found["old_prompt"] = compiled(path, 256, 1, gpu=T4)
    for gpu, name in ((H200, ""), (T4, "old_")):
        for trial in (check.try_others, check.try_products, check.try_experts):
            found[f"{name}{trial.__name__}"] = compiled_trial(trial, gpu)
    print(json.dumps(found))


def compiled_trial(trial: check.Trial, gpu: str) -> dict[str, Any]:
    """Compile the program that tries kernels before they are used, and summarize the result."""
    ops = AheadOfTime(1, gpu)
    operands = check.operands(Type.Q4_K)
    operands = jax.tree.map(lambda a: ops._zeros([a])[0], operands)
    before = set(Path(dumps.name).iterdir())
    with jax.default_matmul_precision("highest"):
        program = check.program(trial, cuda.OPTIONS).lower(*operands).compile()
    return {"kernels": _kernels(program), "thunks": _thunks(before)}


def compiled(
    path: str,
    tokens: int,
    steps: int,
    devices: int = 1,
    gpu: str = H200,
    *,
    has_logprobs: bool = False,
) -> dict[str, Any]:
    """Compile a step of `tokens` tokens, or several decode steps, and summarize the result."""
    runtime.EXPANDED_BYTES = 4 << 20  # so that these small matrices are expanded in several parts
    ops = AheadOfTime(devices, gpu, steps)
    with open_gguf(path) as file:
        engine = Engine.load(ops, file, context=512)
    params = engine.runner.params
    held = engine.runner.new_cache(512)
    cache, tables = held.layers, engine.runner.tables.until(512, is_long=False)
    ids, row = ops.asarray(np.zeros((1, tokens), np.int32)), ops.asarray(np.zeros(1, np.int32))
    number = ops.asarray(np.zeros(1, np.float32))
    recent = ops.asarray(np.zeros((1, 64), np.int32))
    penalty = {"recent": recent, "last_n": row, "repeat_penalty": number}
    draw = {
        "temperature": number,
        "key": ops.asarray(np.zeros((1, 2), np.uint32)),
        "step": ops.asarray(np.zeros(1, np.uint32)),
    }
    before = set(Path(dumps.name).iterdir())
    if steps == 1:
        args = (params, cache, tables, held.place, ids, ids, row, penalty, draw, [])
        program = engine.runner.steps.step((), has_logprobs=has_logprobs)()(*args)
    else:
        ends = ops.asarray(np.zeros((1, 8), np.int32))
        args = (params, cache, tables, held.place, ids, ids, penalty, draw, [], row, ends)
        program = engine.runner.steps.steps((), has_logprobs=has_logprobs)()(*args)
    memory = program.memory_analysis()
    text = program.as_text()
    return {
        "cache_bytes": _bytes(cache),
        "weight_bytes": _bytes(params),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": _kernels(program),
        "copies": [
            line.strip()[:160] for line in text.splitlines() if re.search(r"= \S+ copy\(", line)
        ],
        "sums": len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)),
        "thunks": _thunks(before),
    }


def _kernels(program: Any) -> dict[str, int]:
    """Count the launches of each of phicore's kernels in a program."""
    text = program.as_text()
    return dict(Counter(re.findall(r'backend_config=.*?\bname = "(\w+)"', text)))


def _thunks(before: set[Path]) -> dict[str, str]:
    """Return XLA's dumps of the last program's launches (thunks), by compiler stage."""
    dumped = sorted(set(Path(dumps.name).glob("*thunk_sequence*.txt")) - before)
    return {path.name.split(".")[-2]: path.read_text() for path in dumped}


def _bytes(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(sys.argv[1])
