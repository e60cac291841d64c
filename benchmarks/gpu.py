"""Measure the speed and errors of phicore with JAX on a GPU: kernels, decoding, prompts, batches.

    python benchmarks/gpu.py --out results

This writes `gpu.json` and `gpu.md` to the folder, which takes four minutes. It needs JAX with a
GPU, llvmlite, and the packages that phicore depends on. phicore itself need not be installed.
Nothing is downloaded: the model has Phi-3-mini's sizes and random weights. The program measures

- the GPU's bandwidth: bytes read and written per second by a copy of 1 GiB;
- the product of each quantized type with 1, 4 and 8 rows: its error against float64, and the bytes
  of weights that it reads per second, from more matrices than the GPU's caches hold;
- attention of a token that follows 64 or 3000 others, and how fast it reads the cache;
- logits of a model of 4 layers, compared with float32 on NumPy;
- 200 tokens written by `generate`, greedy and sampled;
- decoding after 64 and 3000 tokens, for 1, 4 and 8 sequences at a time, with several steps in a
  call as in `generate`; and for one sequence with one step in a call (the models have a window of
  2047);
- prompts of 512 and 2048 tokens, exact and with `--fast-prefill`.

Each figure is the median of several runs. When a measurement fails, the failure is reported and the
other measurements go on. `--device cpu --model tiny` tries the program on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("phicore_jax") is None:
    sys.path[:0] = [str(ROOT), str(ROOT / "backends" / "jax")]

try:
    import gguf
    import jax
    import jax.numpy as jnp
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type
    from jax import lax
    from phicore_jax import cuda
    from phicore_jax.backend import JaxBackend
    from phicore_jax.cuda import runtime

    from phicore.backend import Array, Backend, BackendOptions
    from phicore.engine import Engine, Request, Runner, Timings
    from phicore.engine.loading import Weights
    from phicore.errors import BackendError
    from phicore.gguf.matrix import Matrix
    from phicore.gguf.quants import AFFINE_TYPES
    from phicore.gguf.reader import GGUFTensor, open_gguf
    from phicore.lab.synthetic import MODELS, synthetic_model
    from phicore.network.sampling import Sampling
except ImportError as error:
    name = error.name or error
    sys.exit(f"gpu: {name} cannot be imported; install it (this file begins with what is needed)")

TYPES = (Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K)
# Offsets in a block of the scale and, where there is one, of the minimum. In types that are not
# listed the scale comes first.
SCALES_AT = {
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    **{Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,)},
}
REPETITIONS = 5
INSIDE = 8  # the number of times that one call repeats a short operation
GREEDY = Sampling(temperature=0, repeat_penalty=1)
DRAWN = Sampling(temperature=0.7, top_k=40, top_p=0.95)
CAPACITY = 4096

Section = dict[str, Any]


class OnNumPy(Backend):
    """The protocol's default operations on NumPy, in float32."""

    xp = np

    def asarray(self, x: np.ndarray) -> Array:
        return np.array(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)


def seconds(run: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    """Measure the median seconds of a call, after an uncounted first call that may compile."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repetitions):
        started = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - started)
    return statistics.median(found)


class Benchmark:
    """The benchmark's sections, run on one device.

    Args:
        args: The program's command-line arguments.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.model = args.device, args.model
        self.is_small = args.model == "tiny"
        self.ops = JaxBackend(BackendOptions(device=args.device))
        self.is_card = self.ops.device.platform != "cpu"
        self._loaded: Engine | None = None
        self._rng = np.random.Generator(np.random.PCG64(1))

    def about(self) -> Section:
        device = self.ops.device
        return {
            "device": device.device_kind,
            "jax": jax.__version__,
            "platform": device.client.platform_version,
            "python": platform.python_version(),
            "kernels": cuda.working_kernels(device)[1] if self.is_card else "those of a CPU",
        }

    def bandwidth(self) -> Section:
        """Measure the bytes per second, read and written, of a copy."""
        size = 2**20 if self.is_small else 2**28
        x = self.ops.asarray(np.ones(size, np.float32))
        copies = jax.jit(lambda x: lax.fori_loop(0, INSIDE, lambda _, x: x + 1, x))
        return {"bytes_per_s": INSIDE * 2 * 4 * size / seconds(lambda: copies(x))}

    # ---- kernels -----------------------------------------------------------------------------

    def products(self) -> list[Section]:
        """Measure products with the largest matrices of a layer; rare types with one row only."""
        shapes = [(256, 512)] if self.is_small else [(16384, 3072), (3072, 8192)]
        plan = [(ggml_type, shape, m) for ggml_type in TYPES for shape in shapes for m in (1, 4, 8)]
        plan += [(ggml_type, shapes[0], 1) for ggml_type in AFFINE_TYPES if ggml_type not in TYPES]
        return [self._product(*each) for each in plan]

    def _product(self, ggml_type: Type, shape: tuple[int, int], m: int) -> Section:
        rows, columns = shape
        data = self._blocks(ggml_type, rows, columns)
        tensor = GGUFTensor("weight", ggml_type, shape, data)
        count = 2 if self.is_small else max(2, -(-500_000_000 // data.nbytes))
        weights = [self.ops.load_weight(Matrix("weight", (tensor,))) for _ in range(count)]
        x = self._rng.standard_normal((m, columns)).astype(np.float32)
        on_device = self.ops.asarray(x)

        is_kernel = isinstance(self.ops._kernels, runtime.CudaKernels)

        def product(x: Array, w: Any) -> Array:
            return self.ops.linear(x, w)[:, :1]

        def nothing(x: Array, _: Any) -> Array:
            return runtime.quantize(x)[1][:1, None] if is_kernel else x[:, :1]

        whole, rest = (self._chain(f, on_device, weights) for f in (product, nothing))
        few = min(rows, 1024)
        y = self.ops.to_numpy(self.ops.compile(self.ops.linear)(on_device, weights[0]))[:, :few]
        values = gguf.quants.dequantize(data[:few], ggml_type).astype(np.float64)
        expected = x.astype(np.float64) @ values.T
        return {
            "type": ggml_type.name,
            "shape": list(shape),
            "rows": m,
            "error": float(np.linalg.norm(y - expected) / np.linalg.norm(expected)),
            "us": 1e6 * whole,
            "us_without": 1e6 * rest,
            "bytes_per_s": data.nbytes / (whole - rest) if whole > rest else None,
        }

    @staticmethod
    def _chain(f: Callable[[Array, Any], Array], x: Array, weights: Sequence[Any]) -> float:
        """Measure the seconds of a call f(x, weight) in a chain where each call needs the last."""

        def all_weights(x: Array, weights: Sequence[Any]) -> Array:
            for w in weights:
                x = x + 1e-30 * f(x, w)
            return x

        def repeated(x: Array, weights: Sequence[Any]) -> Array:
            return lax.fori_loop(0, INSIDE, lambda _, x: all_weights(x, weights), x)

        run = jax.jit(repeated, keep_unused=True)
        return seconds(lambda: run(x, weights)) / (INSIDE * len(weights))

    def _blocks(self, ggml_type: Type, rows: int, columns: int) -> np.ndarray:
        """Make random blocks of finite values, (rows, bytes of a row) uint8."""
        block, size = GGML_QUANT_SIZES[ggml_type]
        count = rows * columns // block
        blocks = self._rng.integers(0, 256, (count, size), np.uint8)
        scale = np.float16(1e-3 * self._rng.uniform(0.5, 1.5, (count, 1)))
        for start in SCALES_AT.get(ggml_type, (0,)):
            blocks[:, start : start + 2] = scale.astype("<f2").view(np.uint8)
        return blocks.reshape(rows, -1)

    def _zeros(self, *shape: int) -> Any:
        """Return a new cache that holds zeros, so that all of its slots can be read."""
        return jax.tree.map(jnp.zeros_like, self.ops.new_cache(*shape))

    def attention(self) -> list[Section]:
        """Measure a token's attention in as many layers as Phi-3-mini has."""
        heads, dim = (2, 32) if self.is_small else (32, 96)
        layers, capacity = (2, 256) if self.is_small else (32, CAPACITY)
        caches = [self._zeros(1, heads, capacity, dim) for _ in range(layers)]
        q = self.ops.asarray(self._rng.standard_normal((1, heads, 1, dim)).astype(np.float32))

        def all_layers(q: Array, caches: Sequence[Any], positions: Array) -> Array:
            for cache in caches:
                q = self.ops.attention(q, cache, positions, dim**-0.5, None)
            return q

        def run(q: Array, caches: Sequence[Any], positions: Array) -> Array:
            return lax.fori_loop(0, INSIDE, lambda _, q: all_layers(q, caches, positions), q)

        compiled, found = self.ops.compile(run), []
        row_bytes = sum(a.nbytes for a in caches[0].values()) / capacity
        for position in self._positions():
            at = self.ops.asarray(np.array([[position]], np.int32))
            each = seconds(lambda at=at: compiled(q, caches, at)) / (INSIDE * layers)
            found.append(
                {
                    "position": position,
                    "us": 1e6 * each,
                    "bytes_per_s": (position + 1) * row_bytes / each,
                }
            )
        return found

    def _positions(self) -> tuple[int, ...]:
        return (64, 200) if self.is_small else (64, 3000)

    # ---- models ------------------------------------------------------------------------------

    def logits(self) -> Section:
        """Compute the relative errors of a four-layer model's logits: norm of error over norm."""
        name = f"{self.model}-4-layers"
        MODELS[name] = replace(MODELS[self.model], num_hidden_layers=4, vocab_size=4096)
        path = synthetic_model(name)
        ids = self._rng.integers(3, 4096, 40)
        expected = self._engine(OnNumPy(), path).logits(ids)
        norm = np.linalg.norm(expected)
        found: Section = {}
        for is_fast in (False, True):
            if is_fast and not self.ops.capabilities.has_fast_prefill:
                continue
            ops = JaxBackend(BackendOptions(device=self.device, fast_prefill=is_fast))
            engine = self._engine(ops, path)
            error = float(np.linalg.norm(engine.logits(ids) - expected) / norm)
            found["fast_prefill" if is_fast else "prefill"] = error
        first = expected[:1]
        step = engine.logits(ids[:1])
        found["decode"] = float(np.linalg.norm(step - first) / np.linalg.norm(first))
        return found

    def _engine(self, ops: Backend, path: Path) -> Engine:
        with open_gguf(path) as file:
            return Engine.load(ops, file)

    def load(self) -> Section:
        """Measure loading from a file in memory, then 20 tokens with compilation and 20 without."""
        path = synthetic_model(self.model)
        path.read_bytes()
        started = time.perf_counter()
        engine = self._loaded = self._engine(self.ops, path)
        jax.block_until_ready(engine.runner.params)
        load_s = time.perf_counter() - started
        started = time.perf_counter()
        list(engine.generate(Request([1] * 16, GREEDY, max_tokens=20)))
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        list(engine.generate(Request([1] * 16, GREEDY, max_tokens=20)))
        return {
            "file_bytes": path.stat().st_size,
            "weight_bytes": sum(a.nbytes for a in jax.tree.leaves(engine.runner.params)),
            "load_s": load_s,
            "first_20_tokens_s": first_s,
            "next_20_tokens_s": time.perf_counter() - started,
        }

    def _model(self) -> Engine:
        if self._loaded is None:
            self.load()
        assert self._loaded is not None
        return self._loaded

    def decode(self) -> list[Section]:
        steps = self.ops.capabilities.steps
        plan = [(steps, batch) for batch in (1, 4, 8)]
        if steps > 1:
            plan.append((1, 1))
        return [
            self._decode(batch, position, steps)
            for steps, batch in plan
            for position in self._positions()
        ]

    def _decode(self, batch: int, position: int, steps: int) -> Section:
        """Measure decode steps after `position` tokens.

        The cache holds zeros, since its values do not affect the time.
        """
        engine = self._model()
        config, ops, size = engine.runner.config, engine.runner.ops, engine.vocab_size
        # one capacity for all positions, so that steps are compiled once
        capacity = engine.runner.new_cache(self._positions()[-1] + 300).capacity
        heads, dim = config.num_key_value_heads, config.head_dim
        layers = range(config.num_hidden_layers)
        caches = [self._zeros(batch, heads, capacity, dim) for _ in layers]
        position = min(position, capacity - 200)  # a window may limit the capacity
        tables = engine.runner.tables.until(capacity, is_long=False)

        def rows(x: float, dtype: Any) -> Array:
            return ops.asarray(np.full(batch, x, dtype))

        token = ops.asarray(np.full((batch, 1), 5, np.int32))
        at = ops.asarray(np.full((batch, 1), position, np.int32))
        recent = ops.asarray(np.full((batch, 64), -1, np.int32))
        penalty = {
            "recent": recent,
            "last_n": rows(0, np.int32),
            "repeat_penalty": rows(1, np.float32),
        }
        place = {"first": rows(0, np.int32), "rope_start": rows(0, np.int32)}
        count = ops.asarray(np.array([steps], np.int32))
        ends = ops.asarray(np.full((batch, 8), -1, np.int32))
        calls, times = max(1, 32 // steps), []
        compiled = engine.runner.steps
        fn = compiled.step(())() if steps == 1 else compiled.steps(())()
        for _ in range(REPETITIONS + 1):  # the first compiles
            started = time.perf_counter()
            for _ in range(calls):
                if steps == 1:
                    args = (token, at, rows(0, np.int32), penalty, None, [])
                else:
                    args = (token, at, penalty, None, [], count, ends)
                result = fn(engine.runner.params, caches, tables, place, *args)
                caches, token, at = result[:3]
            tokens = ops.to_numpy(token)
            times.append(time.perf_counter() - started)
            at = ops.asarray(np.full((batch, 1), position, np.int32))
        assert ((tokens >= 0) & (tokens < size)).all(), tokens
        step_s = statistics.median(times[1:]) / (calls * steps)
        return {
            "position": position,
            "batch": batch,
            "steps_in_a_call": steps,
            "ms": 1e3 * step_s,
            "tokens_per_s": batch / step_s,
        }

    def generate(self) -> list[Section]:
        """Measure whole generations by the engine, which makes random numbers on the host."""
        engine = self._model()
        found = []
        for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN)):

            def run(sampling: Sampling = sampling) -> Timings:
                sequence = engine.add(Request([5] * 16, sampling, max_tokens=200, seed=1))
                list(engine.outputs(sequence))
                return sequence.timings

            run()  # compiles
            times = [run().decode_tokens_per_s for _ in range(REPETITIONS)]
            found.append({"sampling": name, "tokens_per_s": statistics.median(times)})
        return found

    def prompts(self) -> list[Section]:
        engine = self._model()
        lengths = (32, 64) if self.is_small else (512, 2048)
        found = []
        for is_fast in (False, True):
            if is_fast and not self.ops.capabilities.has_fast_prefill:
                continue
            ops = JaxBackend(BackendOptions(device=self.device, fast_prefill=is_fast))
            old = engine.runner
            runner = Runner(ops, old.config, Weights(old.params))
            engine = Engine(runner, context=engine.context)
            for length in lengths:
                ids = self._rng.integers(3, engine.vocab_size, length).tolist()

                def first(ids: list[int] = ids, engine: Engine = engine) -> list[int]:
                    return list(engine.generate(Request(ids, GREEDY, max_tokens=1)))

                each = seconds(first, 3)
                found.append(
                    {
                        "tokens": length,
                        "fast_prefill": is_fast,
                        "ms": 1e3 * each,
                        "tokens_per_s": length / each,
                    }
                )
        return found

    def memory(self) -> Section:
        return {"peak_bytes": self.ops.peak_memory_bytes()}


SECTIONS = (
    *("about", "bandwidth", "load", "decode", "generate", "prompts", "logits", "attention"),
    *("products", "memory"),
)


def markdown(found: dict[str, Any]) -> str:
    """Format the results as Markdown tables."""
    about, copy = found.get("about", {}), found.get("bandwidth", {}).get("bytes_per_s")
    lines = [
        f"{about.get('device')}, JAX {about.get('jax')}, Python {about.get('python')}, kernels: "
        f"{about.get('kernels')}; "
        + (f"a copy moves {copy / 1e12:.2f} TB/s" if copy else "bandwidth not measured"),
        "",
    ]

    def rows(columns: str, cells: list[list[str]]) -> None:
        names = columns.split(" | ")
        lines.append(f"| {columns} |")
        lines.append("| " + " | ".join("---" for _ in names) + " |")
        lines.extend("| " + " | ".join(row) + " |" for row in cells)
        lines.append("")

    def read(bytes_per_s: float | None) -> str:
        return f"{bytes_per_s / 1e9:.0f} GB/s" if bytes_per_s else "-"

    def share(bytes_per_s: float | None) -> str:
        return f"{100 * bytes_per_s / copy:.0f} %" if copy and bytes_per_s else "-"

    if found.get("products"):
        rows(
            "type | matrix | rows | error | product | read | of the copy",
            [
                [
                    p["type"],
                    "{} x {}".format(*p["shape"]),
                    str(p["rows"]),
                    f"{p['error']:.1e}",
                    f"{p['us'] - p['us_without']:.1f} us",
                    read(p["bytes_per_s"]),
                    share(p["bytes_per_s"]),
                ]
                for p in found["products"]
            ],
        )
    if found.get("attention"):
        rows(
            "attention at position | of a layer | read",
            [
                [str(a["position"]), f"{a['us']:.1f} us", read(a["bytes_per_s"])]
                for a in found["attention"]
            ],
        )
    if found.get("decode"):
        rows(
            "decode at position | sequences | steps in a call | step | tokens/s",
            [
                [
                    str(d["position"]),
                    str(d["batch"]),
                    str(d["steps_in_a_call"]),
                    f"{d['ms']:.3f} ms",
                    f"{d['tokens_per_s']:.0f}",
                ]
                for d in found["decode"]
            ],
        )
    if found.get("generate"):
        rows(
            "200 tokens by `generate` | tokens/s",
            [[g["sampling"], f"{g['tokens_per_s']:.0f}"] for g in found["generate"]],
        )
    if found.get("prompts"):
        rows(
            "prompt | fast prefill | time | tokens/s",
            [
                [
                    str(p["tokens"]),
                    "yes" if p["fast_prefill"] else "no",
                    f"{p['ms']:.1f} ms",
                    f"{p['tokens_per_s']:.0f}",
                ]
                for p in found["prompts"]
            ],
        )
    for name in ("logits", "load", "memory"):
        if found.get(name):
            cells = [[key, f"{value:.3g}"] for key, value in found[name].items() if value]
            rows(f"{name} | ", cells)
    for name, error in found["failed"].items():
        lines.append(f"{name} failed: {error.splitlines()[-1]}")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="a device that `phicore backends` lists [the first GPU]")
    parser.add_argument("--model", choices=MODELS, default="phi-3-mini")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="a selection of %(default)s")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    args = parser.parse_args()
    try:
        benchmark = Benchmark(args)
    except BackendError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    if not benchmark.is_card and args.device != "cpu":
        print("gpu: JAX finds no GPU here; --device cpu tries the program", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"model": args.model, "failed": {}, "seconds": {}}
    for name in args.sections.split(","):
        started = time.perf_counter()
        try:
            found[name] = getattr(benchmark, name)()
        except Exception:  # noqa: BLE001 - after any failure, the other sections still run
            found["failed"][name] = traceback.format_exc()
            print(found["failed"][name], file=sys.stderr)
        found["seconds"][name] = time.perf_counter() - started
        print(f"{name}: {found['seconds'][name]:.1f} s", file=sys.stderr, flush=True)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "gpu.md").write_text(markdown(found))
    print(markdown(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
