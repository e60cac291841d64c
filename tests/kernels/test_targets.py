"""Tests of several instruction sets: results agree, and code has the instructions it should."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from kernels.made import TYPES, block_columns, kernels_of, random_tensor
from phicore_jax.backend import JaxBackend
from phicore_jax.cache import ROW_TYPES, rows_of_cache
from phicore_jax.kernels import attention, build, dense, linear, pool, rowwise
from phicore_jax.kernels.attention import Cache, Rows
from phicore_jax.kernels.formats import FORMATS
from phicore_jax.kernels.lang import Module, Target
from phicore_jax.kernels.runtime import Kernels

from phicore.backend import BackendOptions
from phicore.testing.compare import assert_close

# ---- results -------------------------------------------------------------------------------

BEST = build.supported_targets()[0]
SEPARATE = 1e-6
"""Bound on the difference of long sums whose products are rounded before they are added or not."""


def assert_agree(target: str, actual: np.ndarray, best: np.ndarray) -> None:
    """Assert that results are equal bit for bit. Those of generic code need only be close.

    Sums of integers are exact. In sums of float products, generic code rounds each product before
    it adds it; all other code rounds once (`Function.fma`).
    """
    if target == "generic":
        assert_close(actual, best, SEPARATE)
    else:
        assert np.array_equal(actual, best)


@pytest.fixture(scope="session", params=build.supported_targets()[1:])
def target(request: pytest.FixtureRequest) -> str:
    """Return each target of this processor except the best, which the others are compared with."""
    return request.param


@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_products_of_all_targets_agree(
    target: str, kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    tensor = random_tensor(ggml_type, 40, 3 * block_columns(ggml_type), rng)
    x = rng.standard_normal((70, tensor.shape[1]), np.float32)
    ys = []
    for each in (kernels, kernels_of(BEST)):
        run = jax.jit(lambda x, w, each=each: (each.linear(x[:8], w), each.linear(x, w)))
        ys.append([np.asarray(y) for y in run(x, each.pack([tensor]))])
    for y, best in zip(*ys, strict=True):
        assert_agree(target, y, best)


@pytest.mark.each_value("cache_type", "target")
@pytest.mark.parametrize("cache_type", ROW_TYPES)
def test_caches_and_attention_of_all_targets_agree(
    target: str, kernels: Kernels, cache_type: str, rng: np.random.Generator
):
    """The stored caches are equal bit for bit."""
    dim = 64 if cache_type == "q8_0" else 20
    k, v = (rng.standard_normal((1, 2, 50, dim), np.float32) for _ in range(2))
    qs = [rng.standard_normal((1, 6, tokens, dim), np.float32) for tokens in (1, 20)]
    places = np.arange(50, dtype=np.int32)[None]
    found = []
    for each in (kernels, kernels_of(BEST)):
        ops = JaxBackend(BackendOptions(device="cpu", cache_type=cache_type), kernels=each)

        def run(empty, k, v, qs, ops=ops):
            held = ops.update_cache(empty, k, v, places)
            seen = [places[:, 49 - q.shape[2] : 49] for q in qs]
            return held, [
                ops.attention(q, held, p, 0.2, None) for q, p in zip(qs, seen, strict=True)
            ]

        results = jax.jit(run)(ops.new_cache(*k.shape), k, v, qs)
        found.append(jax.tree.map(np.asarray, results))
    (held, ys), (best_held, best) = found
    for name, array in held.items():
        assert np.array_equal(array, best_held[name]), name
    for y, best_y in zip(ys, best, strict=True):
        assert_agree(target, y, best_y)


def test_norms_and_swiglu_of_all_targets_agree(
    target: str, kernels: Kernels, rng: np.random.Generator
):
    x, weight = rng.standard_normal((5, 70), np.float32), rng.standard_normal(70, np.float32)
    found = []
    for each in (kernels, kernels_of(BEST)):
        run = jax.jit(
            lambda x, w, each=each: (
                each.rms_norm(x, w, 1e-5),
                each.layer_norm(x, w, w, 1e-5),
                each.swiglu(x),
            )
        )
        found.append([np.asarray(y) for y in run(x, weight)])
    for y, best in zip(*found, strict=True):
        assert_agree(target, y, best)


# ---- code ----------------------------------------------------------------------------------

X86, LINUX_ARM, MAC_ARM = (
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "arm64-apple-darwin",
)
MACHINES = [
    *((name, X86) for name in ("avx512vnni", "avxvnni", "avx2", "generic")),
    ("neon", LINUX_ARM),
    ("neon", MAC_ARM),
]
WANTED = {
    "avx512vnni": {
        "exact": r"vpdpwssd .*%zmm",
        "fast": r"vpdpbusd .*%zmm",
        "floats": r"vfmadd\d+ps .*%zmm",
        "halves": r"vcvtph2ps .*%zmm",
    },
    "avxvnni": {
        "exact": r"vpdpwssd .*%ymm",
        "fast": r"vpdpbusd .*%ymm",
        "floats": r"vfmadd\d+ps .*%ymm",
        "halves": r"vcvtph2ps .*%ymm",
    },
    "avx2": {
        "exact": r"vpmaddwd .*%ymm",
        "fast": r"vpmaddubsw .*%ymm",
        "floats": r"vfmadd\d+ps .*%ymm",
        "halves": r"vcvtph2ps .*%ymm",
    },
    "generic": {"exact": r"p(maddwd|mulhw) .*%xmm", "floats": r"mulps .*%xmm"},
    "neon": {"exact": r"sml?al", "floats": r"fmla", "halves": r"fcvtl"},
}
"""Patterns of instructions that code of a kind must have, by target.

The kinds are products of 16-bit integers (`exact`), products of 8-bit integers (`fast`), products
of float32 numbers (`floats`), and conversions from float16 (`halves`).
"""
ABSENT = {
    "avxvnni": r"%zmm|%ymm(1[6-9]|2\d|3[01])|%k\d",
    "avx2": r"%zmm|%ymm(1[6-9]|2\d|3[01])|%k\d|vpdp",
    "generic": r"%[yz]mm|\tv[a-z0-9]+ps ",
}
"""Patterns of instructions that code must not have, since not every processor of a target does."""
LIBRARY = {"read", "write", "memcpy", "memset", "bzero"}
"""Functions of the C library that code may call, since every process has them."""


def kernels_for(target: Target) -> dict[str, tuple[str, Callable[[Module], None]]]:
    """Return kernels by name: the kind of their instructions, and the function that writes them."""
    i24, f16 = (Cache(*(Rows(t.name, 20) for t in rows_of_cache(name))) for name in ("i24", "f16"))
    q8_0 = Cache(Rows("q8_0", 64), Rows("q8_0", 64))
    found: dict[str, tuple[str, Callable[[Module], None]]] = {
        "worker": ("", pool.emit_worker),
        "pack-Q5_K": ("", lambda m: linear.emit_pack(m, Type.Q5_K)),
        "rows-Q6_K": ("halves", lambda m: linear.emit_rows(m, Type.Q6_K)),
        "rows-F16": ("halves", lambda m: dense.emit_rows(m, Type.F16)),
        "dense-F16": ("floats", lambda m: dense.emit_linear(m, Type.F16, dense.tile(target, 64))),
        "dense-experts": ("floats", lambda m: dense.emit_linear(m, Type.F32, 2, True)),
        "store-i24": ("", lambda m: attention.emit_store(m, i24)),
        "store-f16": ("", lambda m: attention.emit_store(m, f16)),
        "store-q8_0": ("halves", lambda m: attention.emit_store(m, q8_0)),
        "attention-q8_0-3": ("halves", lambda m: attention.emit_attention(m, q8_0, 3)),
        "attention-q8_0-many": ("halves", lambda m: attention.emit_attention(m, q8_0, None)),
        "attention-f16-3": ("floats", lambda m: attention.emit_attention(m, f16, 3)),
        "attention-i24-many": ("floats", lambda m: attention.emit_attention(m, i24, None)),
        "rms-norm": ("", rowwise.emit_rms_norm),
        "layer-norm": ("floats", rowwise.emit_layer_norm),
        "swiglu": ("floats", rowwise.emit_swiglu),
    }
    for t, rows, is_fast, is_grouped in [
        (Type.Q4_K, 8, False, False),
        (Type.Q6_K, 64, False, False),
        (Type.Q4_K, 1, False, True),
        (Type.Q6_K, 64, False, True),
        *([(Type.Q8_0, 64, True, False)] if target.has_byte_dot else []),
        *([(Type.Q5_K, 64, True, False)] if target.has_byte_dot or target.has_byte_pairs else []),
    ]:
        product = linear.arranged(target, FORMATS[t], rows, is_fast=is_fast, is_grouped=is_grouped)
        found[product.name] = (
            "exact" if product.bits == 16 else "fast",
            lambda m, product=product: linear.emit_linear(m, product),
        )
    return found


@pytest.fixture(scope="module", params=MACHINES, ids="-".join)
def code(request: pytest.FixtureRequest) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return a target, and the kind and the assembly of each of its kernels."""
    name, triple = request.param
    target = Target(name)
    machine = build.target_machine(target, triple)
    written = {}
    for kernel, (kind, emit) in kernels_for(target).items():
        module = Module(target)
        emit(module)
        text = build.optimized(module, machine, lambda m, ir: m.emit_assembly(ir))
        written[kernel] = kind, text.replace("\t", " ")
    return name, written


@pytest.mark.complete
def test_code_has_the_instructions_of_its_target(code: tuple[str, dict[str, tuple[str, str]]]):
    name, kernels = code
    wanted = WANTED[name]
    for kernel, (kind, text) in kernels.items():
        if kind in wanted:
            assert re.search(wanted[kind], text), kernel
        assert name not in ABSENT or not re.search(ABSENT[name], text), kernel
    assert {kind for kind, _ in kernels.values()} >= wanted.keys()


@pytest.mark.complete
def test_code_calls_nothing_for_its_numbers(code: tuple[str, dict[str, tuple[str, str]]]):
    """Conversions, rounding and fma are instructions, not calls for each lane.

    The oldest x86 processors cannot round, so generic code calls rintf of the C library.
    """
    name, kernels = code
    allowed = LIBRARY | ({"rintf"} if name == "generic" else set())
    for kernel, (_, text) in kernels.items():
        own = set(re.findall(r"^_?(\w+):", text, re.MULTILINE))
        jumps = re.findall(r"^ +(?:callq?|jmpq?|bl|b) +_?(\w+)(?:@PLT)?$", text, re.MULTILINE)
        assert set(jumps) - own <= allowed, kernel
