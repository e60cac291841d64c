"""Tests of how the JAX backend stores keys and values, and of attention over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import Backend, BackendOptions, LayerCache
from phicore.errors import BackendError
from phicore.testing import oracle, tolerances
from phicore.testing.compare import assert_close

pytest.importorskip("jax", reason="install phicore-jax")

from phicore_jax.cache import ROW_TYPES, rows_of_cache

ERRORS = {name: row_type.error for name, row_type in ROW_TYPES.items()}
"""Bounds on the error of attention, by cache type. `i24` rounds only the values to 16 bits."""
LARGEST = {name: [rows.largest for rows in rows_of_cache(name)] for name in ("i24", "i16")}
"""The integers that stand for the largest key and the largest value of a row, by cache type."""

B, K, S = 2, 2, 83
SHAPES = [(12, 3), (20, 1), (64, 3), (96, 8), (128, 1)]  # size of a head, query heads of a key head
OTHERS = [pytest.param(name, marks=pytest.mark.complete) for name in ("avx2", "generic")]
"""Kernels of other processors. tests/kernels/test_targets.py compares them, too."""
CASES = [
    *(("host", *shape) for shape in SHAPES),
    *(("xla", *shape) for shape in SHAPES[:2]),
    *(
        pytest.param(variant, *shape, marks=pytest.mark.complete)
        for variant in ("avx2", "generic")
        for shape in SHAPES[:2]
    ),
]
STARTS = (3, 37)  # first positions of the two sequences
STEPS = [(1, 1000), (1, 3), (2, 1), (16, 17), (17, None), (40, 3)]  # tokens, window


@cache
def make(variant: str, cache_type: str) -> Backend:
    """Return JAX with kernels for an instruction set (`host`: the best), or without any (`xla`)."""
    from phicore_jax.backend import JaxBackend

    kernels = None
    if variant != "xla":
        pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")
        from kernels.made import kernels_of
        from phicore_jax.kernels.build import supported_targets

        target = supported_targets()[0] if variant == "host" else variant
        if target not in supported_targets():
            pytest.skip(f"this processor cannot run {target} code")
        kernels = kernels_of(target)
    return JaxBackend(BackendOptions(device="cpu", cache_type=cache_type), kernels=kernels)


@cache
def update_of(ops: Backend) -> Callable[..., LayerCache]:
    return ops.compile(ops.update_cache, donate=(0,))


@pytest.fixture(params=["xla", "host", *OTHERS])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ERRORS)
def cache_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ops(variant: str, cache_type: str) -> Backend:
    return make(variant, cache_type)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def positions_of(tokens: int) -> np.ndarray:
    return (np.array(STARTS)[:, None] + np.arange(tokens)).astype(np.int32)


def stored(ops: Backend, k: np.ndarray, v: np.ndarray) -> LayerCache:
    """Return a cache that holds keys and values (B, K, S, D)."""
    batch, heads, capacity, dim = k.shape
    positions = np.tile(np.arange(capacity, dtype=np.int32), (batch, 1))
    empty = ops.new_cache(batch, heads, capacity, dim)
    return update_of(ops)(empty, *(ops.asarray(x) for x in (k, v, positions)))


def host(ops: Backend, arrays: LayerCache) -> dict[str, np.ndarray]:
    """Copy a cache's arrays to NumPy, since an update may overwrite the cache that it is handed."""
    return {name: np.array(ops.to_numpy(a)) for name, a in arrays.items()}


@pytest.fixture
def dim(cache_type: str) -> int:
    """Return the size of a head. It is no multiple of a vector's lanes where that is allowed."""
    return 64 if cache_type == "q8_0" else 20


def integers(rows: np.ndarray) -> np.ndarray:
    """Return the integers of rows, which are int16 or 24 bits.

    A row of 24 bits holds the upper 16 of all channels, then the bytes to add to them.
    """
    if rows.dtype == np.int16:
        return rows.astype(int)
    high, low = np.split(rows, [rows.shape[-1] // 3 * 2], axis=-1)
    return 256 * np.ascontiguousarray(high).view("<i2").astype(int) + low


def numbers(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return the keys or values of a cache in float64."""
    if arrays[name].dtype == np.int8 and f"{name}_scale" not in arrays:
        rows = arrays[name]
        codes, scales = np.split(rows, [rows.shape[-1] // 34 * 32], axis=-1)
        scales = np.ascontiguousarray(scales).view(np.float16).astype(np.float64)
        return codes * np.repeat(scales, 32, axis=-1)
    if f"{name}_scale" not in arrays:
        return arrays[name].astype(np.float64)
    return integers(arrays[name]) * arrays[f"{name}_scale"][..., None].astype(np.float64)


@pytest.mark.complete
@pytest.mark.parametrize(("variant", "dim", "group"), CASES, indirect=["variant"])
def test_attention_equals_float64(
    ops: Backend, cache_type: str, dim: int, group: int, rng: np.random.Generator
):
    """Attention over the stored rows is exact; over the given rows, as exact as the cache type."""
    if cache_type == "q8_0" and dim % 32:
        with pytest.raises(
            BackendError, match=rf"^cache type q8_0: this model's heads have {dim} "
        ):
            ops.new_cache(B, K, S, dim)
        return
    k, v = normal(rng, B, K, S, dim), normal(rng, B, K, S, dim)
    qs = [normal(rng, B, K * group, t, dim) for t, _ in STEPS]
    filled = stored(ops, k, v)

    def run(qs, filled, positions):
        return [
            ops.attention(q, filled, p, dim**-0.5, window)
            for q, p, (_, window) in zip(qs, positions, STEPS, strict=True)
        ]

    positions = [positions_of(t) for t, _ in STEPS]
    found = ops.compile(run)(
        [ops.asarray(q) for q in qs], filled, [ops.asarray(p) for p in positions]
    )
    held = host(ops, filled)
    for q, p, (_, window), y in zip(qs, positions, STEPS, found, strict=True):
        y = ops.to_numpy(y)
        args = (p, dim**-0.5, window)
        exact = oracle.attention(q, numbers(held, "k"), numbers(held, "v"), *args)
        assert_close(y, exact, tolerances.ATTENTION)
        assert_close(y, oracle.attention(q, k, v, *args), ERRORS[cache_type])


def test_attention_does_not_see_beyond_the_live_prefix(
    ops: Backend, variant: str, dim: int, rng: np.random.Generator
):
    """Plain XLA reads values beyond the live prefix with a weight of 0, so they must be finite."""
    k, v = normal(rng, B, K, S, dim), normal(rng, B, K, S, dim)
    qs = [normal(rng, B, 3 * K, t, dim) for t in (1, 2, 17)]
    lasts = [17, 49]  # the last of 17 tokens from 1 and from 33 on; fewer tokens end there, too
    positions = [
        (np.array(lasts)[:, None] - np.arange(t)[::-1]).astype(np.int32) for t in (1, 2, 17)
    ]

    def run(filled, qs, positions):
        return [ops.attention(q, filled, p, 0.2, None) for q, p in zip(qs, positions, strict=True)]

    run = ops.compile(run)
    args = [ops.asarray(q) for q in qs], [ops.asarray(p) for p in positions]
    expected = [ops.to_numpy(y) for y in run(stored(ops, k, v), *args)]
    for b, last in enumerate(lasts):
        k[b, :, last + 1 :] = np.nan
        v[b, :, last + 1 :] = 1e4 if variant == "xla" else np.nan
    for y, e in zip(run(stored(ops, k, v), *args), expected, strict=True):
        assert np.array_equal(ops.to_numpy(y), e)


EDGES = np.array(
    [
        *(0.0, -0.0, 1.0, -1.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2049.0, 2051.0),  # ties
        *(2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, -1023 * 2.0**-24, 2.0**-14 - 2.0**-26),
        *(65504.0, 65519.99, 65520.0, -65536.0, 1e30, np.inf, -np.inf, np.nan),
    ],
    np.float32,
)


def test_cache_f16_holds_the_bits_of_numpy(variant: str, rng: np.random.Generator):
    ops = make(variant, "f16")
    spread = normal(rng, 1, 5, 7, 44) * 10.0 ** rng.integers(-9, 6, (1, 5, 7, 44))
    k = spread.astype(np.float32)
    k[0, 0, 0, : len(EDGES)], k[0, 4, 6, -len(EDGES) :] = EDGES, EDGES
    held = host(ops, stored(ops, k, -k))
    with np.errstate(over="ignore"):
        for name, x in (("k", k), ("v", -k)):
            assert held[name].dtype == np.float16
            np.testing.assert_array_equal(held[name], x.astype(np.float16))  # NaN is NaN


def test_cache_f32_holds_what_it_was_given(variant: str, rng: np.random.Generator):
    ops = make(variant, "f32")
    k = normal(rng, 1, 5, 7, 44)
    k[0, 0, 0, : len(EDGES)] = EDGES
    held = host(ops, stored(ops, k, -k))
    np.testing.assert_array_equal(held["k"], k)
    np.testing.assert_array_equal(held["v"], -k)


@pytest.mark.parametrize("dim", [12, 20, 128])
@pytest.mark.parametrize("cache_type", LARGEST, indirect=True)
def test_cache_of_integers_holds_multiples_of_the_largest(
    ops: Backend, cache_type: str, dim: int, rng: np.random.Generator
):
    x = normal(rng, B, K, S, dim) * 10.0 ** rng.integers(-20, 20, (B, K, S, 1))
    x = x.astype(np.float32)
    x[0, 0, 5] = 0
    held = host(ops, stored(ops, x, -x))
    for name, given, most in zip(("k", "v"), (x, -x), LARGEST[cache_type], strict=True):
        codes, scales = np.abs(integers(held[name])), held[f"{name}_scale"]
        largest = np.abs(given.astype(np.float64)).max(axis=-1)
        assert scales.shape == (B, K, S)
        assert scales.dtype == np.float32
        np.testing.assert_allclose(scales, largest / most, rtol=2e-7, atol=0)  # two roundings
        rounding = most * 2e-7  # errors of a quotient and of its divisor
        assert (np.abs(codes.max(axis=-1) - np.where(largest > 0, most, 0)) <= rounding).all()
        error = np.abs(numbers(held, name) - given)
        assert (error <= (0.5 + rounding) * scales[..., None]).all()


# Plain XLA is not tested, since its maximum of many numbers may ignore NaN.
@pytest.mark.parametrize("variant", ["host", *OTHERS], indirect=True)
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_cache_a_number_that_is_not_finite_is_not_lost(
    ops: Backend, bad: float, dim: int, rng: np.random.Generator
):
    """The number spoils its head's row in its slot, and so the tokens that see that row."""
    k, v = normal(rng, B, K, S, dim), normal(rng, B, K, S, dim)
    k[0, 1, 30, 7] = v[1, 0, 20, 3] = bad
    held = host(ops, stored(ops, k, v))
    for name, place in (("k", (0, 1, 30)), ("v", (1, 0, 20))):
        with np.errstate(invalid="ignore"):
            is_finite = np.isfinite(numbers(held, name)).all(axis=-1)
        assert not is_finite[place]
        assert is_finite.sum() == is_finite.size - 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_update_cache_touches_the_new_positions_alone(
    ops: Backend, tokens: int, dim: int, rng: np.random.Generator
):
    k, v = normal(rng, B, K, S, dim), normal(rng, B, K, S, dim)
    new_k, new_v = normal(rng, B, K, tokens, dim), normal(rng, B, K, tokens, dim)
    positions = positions_of(tokens)
    filled = stored(ops, k, v)
    before = host(ops, filled)
    places = {name: a.unsafe_buffer_pointer() for name, a in filled.items()}
    after = update_of(ops)(filled, *(ops.asarray(a) for a in (new_k, new_v, positions)))
    assert {name: a.unsafe_buffer_pointer() for name, a in after.items()} == places
    for b, row in enumerate(positions):
        k[b, :, row], v[b, :, row] = new_k[b].swapaxes(0, 1), new_v[b].swapaxes(0, 1)
    anew = host(ops, stored(ops, k, v))
    is_new = np.zeros((B, K, S), bool)
    for b, row in enumerate(positions):
        is_new[b, :, row] = True
    for name, a in host(ops, after).items():
        assert np.array_equal(a[~is_new], before[name][~is_new])
        assert np.array_equal(a[is_new], anew[name][is_new])


def test_copy_rows_keeps_what_is_stored(ops: Backend, dim: int, rng: np.random.Generator):
    filled = stored(ops, normal(rng, B, K, S, dim), normal(rng, B, K, S, dim))
    rows, slots = (ops.asarray(np.array(x, np.int32)) for x in (range(B), [S] * B))
    before, after = host(ops, filled), host(ops, ops.copy_rows(filled, rows, slots, S + 13))
    for name, a in before.items():
        assert after[name].shape == (B, K, S + 13, *a.shape[3:])
        assert after[name].dtype == a.dtype
        assert np.array_equal(after[name][:, :, :S], a)


def test_cache_q8_0_holds_what_ggml_would(variant: str, rng: np.random.Generator):
    """Scales equal the gguf package's; codes do, except that near-ties may differ by 1."""
    ops = make(variant, "q8_0")
    x = normal(rng, B, K, S, 96) * 10.0 ** rng.integers(-2, 3, (B, K, S, 1))
    x = x.astype(np.float32)
    x[0, 0, 5, 32:64] = 0
    held = host(ops, stored(ops, x, -x))
    blocks = gguf.quants.quantize(x, Type.Q8_0).reshape(B, K, S, 3, 34)
    for name, sign in (("k", 1), ("v", -1)):
        codes, scales = np.split(held[name], [96], axis=-1)
        assert held[name].dtype == np.int8
        assert np.array_equal(scales.view(np.uint8), blocks[..., :2].reshape(B, K, S, 6))
        expected = sign * blocks[..., 2:].view(np.int8).reshape(x.shape).astype(int)
        difference = np.abs(codes - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.03
        scale = np.repeat(scales.view(np.float16).astype(np.float64), 32, axis=-1)
        error = np.abs(codes * scale - sign * x.astype(np.float64))
        assert (error <= 0.5001 * scale).all()


@pytest.mark.parametrize("variant", ["xla", "host"], indirect=True)
def test_shift_cache_moves_numbers_with_their_units(
    ops: Backend, dim: int, rng: np.random.Generator
):
    k, v = normal(rng, B, K, 20, dim), normal(rng, B, K, 20, dim)
    before = host(ops, stored(ops, k, v))
    shift = ops.compile(ops.shift_cache, donate=(0,))
    after = host(ops, shift(stored(ops, k, v), ops.asarray(np.array([3, 7], np.int32))))
    for name, held in before.items():
        for row, n in enumerate((3, 7)):
            assert np.array_equal(after[name][row, :, : 20 - n], held[row, :, n:])


def test_cache_of_another_type_is_an_error(variant: str):
    ops = make(variant, "f32")
    names = ops.capabilities.cache_types
    expected = rf"^cache_type: expected {', '.join(names)} with this backend on cpu, got 'q8'$"
    with pytest.raises(BackendError, match=expected):
        make(variant, "q8")
    assert set(names) == set(ERRORS)
    assert ops.options.cache_type == "f32"
