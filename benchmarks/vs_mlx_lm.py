"""Compare the speed and the errors of mlx-lm and phicore on MLX, with one set of weights.

mlx-lm cannot read K-quants. So its model gets the file's weights in the layout of phicore's MLX
backend, which is MLX's own format and exact: both engines multiply equal numbers. Types whose
groups have 16 weights (Q6_K, Q2_K) do not fit this layout. For mlx-lm `mx.quantize` quantizes them
with as many bits in groups of 32, as mlx-lm's converter would.

The engines take turns within a round, and every second round goes in reverse order. A ratio is the
median of the rounds' ratios. An uncounted first round warms up. Both engines answer greedily. The
program measures

- decoding: the median time of a token after the first few;
- phicore's products alone: the time of `mx.quantized_matmul` for all matrices of one token, called
  once for each matrix (phicore divides the rows among CPU streams), against phicore's whole step;
- prompts: the time from a prompt's tokens to the first token of the answer;
- fidelity: the relative error of the logits of 100 tokens (norm of the error over norm), against
  float32 on NumPy.

    uv run --with mlx-lm benchmarks/vs_mlx_lm.py
    uv run --with mlx-lm benchmarks/vs_mlx_lm.py --synthetic phi-3-mini

The first command uses the demo model, the second random weights of Phi-3-mini's sizes (2.4 GB,
written once). On a GPU both engines run in float16 unless `--dtype` says otherwise. Without a GPU
they run in float32, since MLX rounds sums to half precision on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from phicore_mlx import affine, devices
from phicore_mlx.affine import LAYOUTS

import phicore
from phicore.cli.terminal import size, table
from phicore.errors import PhicoreError
from phicore.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from phicore.lab.machine import cpu_name
from phicore.lab.synthetic import MODELS, synthetic_model
from phicore.network.architectures import architecture_of
from phicore.network.architectures.llama import rows_for_half_rotation
from phicore.network.config import Phi3Config
from phicore.sources import resolve

FIDELITY_PROMPT = 100
FIDELITY_BYTES = 1e9  # NumPy expands the weights to several times the size of the file
SKIPPED = 3  # tokens after the first one, which may be compiled
NAMES = {
    "phi3": {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "llama": {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}


class MlxLm:
    """mlx-lm's model, filled with the weights of a GGUF file."""

    def __init__(self, path: Path, dtype: Any) -> None:
        with open_gguf(path) as file:
            config = architecture_of(file.metadata).config(file.metadata)
            is_special = any(name.startswith("rope_") for name in file.tensors)
            if (
                config.architecture not in NAMES
                or is_special
                or config.rotary_dim != config.head_dim
            ):
                raise PhicoreError(
                    f"{path.name}: this program gives mlx-lm no model of this kind; try the demo "
                    "model or --synthetic phi-3-mini"
                )
            self._model = _model(config, file)
            self._layouts: dict[str, dict[str, int]] = {}
            self._dtype = dtype
            weights = [pair for name in file.tensors for pair in self._weights(name, file, config)]
            nn.quantize(self._model, class_predicate=lambda name, _: self._layouts.get(name, False))
            self._model.load_weights(weights)
            mx.eval(self._model.parameters())

    def _weights(
        self, name: str, file: GGUFFile, config: Phi3Config
    ) -> Iterator[tuple[str, mx.array]]:
        """Yield the names and arrays of the mlx-lm parameters that a tensor of the file becomes."""
        tensor, target = file.tensors[name], _target(name, config.architecture)
        if config.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads
            is_key = name.endswith("attn_k.weight")
            heads = config.num_key_value_heads if is_key else heads
            tensor = rows_for_half_rotation(tensor, heads)
        if tensor.type not in LAYOUTS or len(tensor.shape) == 1:
            yield f"{target}.weight", mx.array(tensor.dequantize()).astype(self._dtype)
            return
        codes, scales, biases, layout = _quantized(tensor)
        self._layouts[target] = layout
        yield f"{target}.weight", codes
        yield f"{target}.scales", scales.astype(self._dtype)
        yield f"{target}.biases", biases.astype(self._dtype)

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(ids), self._model, max_tokens=count):
            yield int(token)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self._model(mx.array(ids)[None])[0].astype(mx.float32))


def _model(config: Phi3Config, file: GGUFFile) -> nn.Module:
    from mlx_lm.models import llama, phi3

    module = phi3 if config.architecture == "phi3" else llama
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    args = {name: getattr(config, name) for name in names}
    return module.Model(
        module.ModelArgs(
            model_type=config.architecture,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings="output.weight" not in file.tensors,
            **args,
        )
    )


def _target(name: str, architecture: str) -> str:
    """Return mlx-lm's name for a tensor, without `.weight`."""
    name = name.removesuffix(".weight")
    whole = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    if name in whole:
        return whole[name]
    _, number, part = name.split(".")
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return f"model.layers.{number}.{({**norms, **NAMES[architecture]})[part]}"


def _quantized(tensor: GGUFTensor) -> tuple[mx.array, mx.array, mx.array, dict[str, int]]:
    layout = LAYOUTS[tensor.type]
    choice = {"group_size": layout.group_size, "bits": layout.bits}
    if layout.is_split:
        return *mx.quantize(mx.array(tensor.dequantize()), **choice), choice
    arrays = affine.transcode([tensor])
    codes, scales, biases = (mx.array(arrays[name]) for name in ("codes", "scales", "biases"))
    return codes, scales, biases, choice


class Phicore:
    """phicore's MLX backend."""

    def __init__(self, path: Path, dtype: str | None) -> None:
        self._model = phicore.load(path, "mlx", dtype=dtype, prefix_cache_bytes=0)
        self.vocab_size = self._model.vocab_size

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        pieces = self._model.generate(
            ids, max_tokens=count, temperature=0, repeat_penalty=1, ignore_eos=True
        )
        return (piece.token_id for piece in pieces)

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._model.logits(ids)

    def products_s(self) -> float:
        """Measure the seconds that MLX's products alone take for one token."""
        engine = self._model.engine
        ops, params = engine.runner.ops, engine.runner.params
        e, f = engine.runner.config.hidden_size, engine.runner.config.intermediate_size
        attended = engine.runner.config.num_attention_heads * engine.runner.config.head_dim
        x = {n: mx.random.normal((1, n)) for n in {e, f, attended}}
        mx.eval(x)
        streams, ops._streams = ops._streams, None  # compute on MLX's default stream alone
        started = time.perf_counter()
        try:
            products = [
                ops.linear(x[width], layer[name])
                for layer in params["layers"]
                for name, width in (
                    ("qkv_proj", e),
                    ("o_proj", attended),
                    ("gate_up_proj", e),
                    ("down_proj", f),
                )
            ]
            products.append(ops.linear(x[e], params.get("lm_head", params["embed_tokens"])))
            mx.eval(products)
        finally:
            ops._streams = streams
        return time.perf_counter() - started


def prefill(engine: Any, ids: list[int]) -> float:
    """Measure the tokens per second of a prompt."""
    started = time.perf_counter()
    next(iter(engine.tokens(ids, 1)))
    return len(ids) / (time.perf_counter() - started)


def decode(engine: Any, ids: list[int], count: int) -> float:
    """Measure the tokens per second of decoding after a prompt."""
    times = [time.perf_counter() for _ in engine.tokens(ids, 1 + SKIPPED + count)]
    return 1 / float(np.median(np.diff(times[SKIPPED:])))


def measure(args: argparse.Namespace, engines: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Measure the tokens per second of each row of the table, by engine, one value a round."""
    random = np.random.default_rng(0)
    ids = random.integers(100, engines["phicore"].vocab_size - 100, max(args.prompts)).tolist()
    tests: dict[str, Callable[[Any], float]] = {
        f"decode {args.steps}": lambda engine: decode(engine, ids[:16], args.steps)
    }
    for count in args.prompts:
        tests[f"prompt {count}"] = lambda engine, count=count: prefill(engine, ids[:count])
    found: dict[str, dict[str, list[float]]] = {name: {e: [] for e in engines} for name in tests}
    products: dict[str, list[float]] = {"mlx-lm": [], "phicore": []}
    for number in range(1 + args.rounds):
        order = list(engines) if number % 2 else list(engines)[::-1]
        for name, test in tests.items():
            for engine in order:
                value = test(engines[engine])
                if number:
                    found[name][engine].append(value)
        alone = 1 / engines["phicore"].products_s()
        if number:
            products["mlx-lm"].append(alone)
            products["phicore"].append(found[f"decode {args.steps}"]["phicore"][-1])
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    return {**found, "quantized_matmul alone": products}


def errors(path: Path, engines: dict[str, Any]) -> dict[str, float]:
    random = np.random.default_rng(1)
    ids = random.integers(100, engines["phicore"].vocab_size - 100, FIDELITY_PROMPT).tolist()
    with phicore.load(path, "numpy") as reference:
        expected = reference.logits(ids).astype(np.float64)
    norm = np.linalg.norm(expected)
    return {
        name: float(np.linalg.norm(engine.logits(ids) - expected) / norm)
        for name, engine in engines.items()
    }


def report(args: argparse.Namespace, path: Path, found: dict[str, Any], dtype: str) -> None:
    """Print a head with the file, the versions and the machine, and then the table."""
    device = devices.find_device(None)[0]
    machine = cpu_name() if device == "cpu" else devices.about()
    head = [
        f"{path.name}, {size(path.stat().st_size)}",
        f"mlx-lm {version('mlx-lm')}, phicore {version('phicore')}, MLX {devices.VERSION}",
        f"{device}: {machine}; {dtype}; medians of {args.rounds} rounds (least to most)",
    ]
    rows = []
    for name, values in found["tests"].items():
        ratios = [b / a for a, b in zip(values["mlx-lm"], values["phicore"], strict=True)]
        cells = [
            f"{np.median(v):.4g} ({min(v):.4g} to {max(v):.4g})"
            for v in (values["mlx-lm"], values["phicore"], ratios)
        ]
        rows.append([f"{name}, tokens/s", *cells])
    if found["errors"]:
        a, b = found["errors"]["mlx-lm"], found["errors"]["phicore"]
        rows.append(["error of logits", f"{a:.1e}", f"{b:.1e}", f"{b / a:.2g}"])
    columns = ["", "mlx-lm", "phicore", "phicore / mlx-lm"]
    if args.markdown:
        print("; ".join(head) + "\n")
        for line in (columns, ["---"] * 4, *rows):
            print(f"| {' | '.join(line)} |")
    else:
        print("\n".join(head) + "\n")
        table(columns, rows)


def options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file, or another model reference of phicore")
    parser.add_argument("--synthetic", choices=MODELS, help="a model of random weights instead")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--prompts", type=numbers, default=[128, 512], help="lengths of prompts")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options()
    try:
        import mlx_lm  # noqa: F401
    except ImportError:
        sys.exit(f"no mlx_lm in {sys.executable}; `uv run --with mlx-lm {sys.argv[0]}` installs it")
    try:
        ref = synthetic_model(args.synthetic) if args.synthetic else args.model or "smollm2"
        path = resolve(str(ref)).path
        dtype = args.dtype or ("float32" if devices.gpu_kind() is None else "float16")
        engines = {
            "mlx-lm": MlxLm(path, getattr(mx, dtype)),
            "phicore": Phicore(path, args.dtype),
        }
        tests = measure(args, engines)
        is_small = path.stat().st_size < FIDELITY_BYTES
        found = {"tests": tests, "errors": errors(path, engines) if is_small else {}}
    except PhicoreError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps({"file": path.name, "dtype": dtype, **found}, indent=2))
    else:
        report(args, path, found, dtype)


if __name__ == "__main__":
    main()
