"""Kernels for RMS normalization, LayerNorm and SwiGLU, which process one row at a time.

XLA needs several operations for each, does not split them between threads, and may add the numbers
of a row in another order when there are more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from phicore_jax.kernels import ffi, pool
from phicore_jax.kernels.attention import exp
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.lang import F32, I64, LANES, PTR, VOID, Function, Module, Value, vec

FLOATS = vec(F32)


def _each_vector(f: Function, size: Value, body: Callable[[Value, int], None]) -> None:
    """Call `body(offset in bytes, lanes)` for vectors of 16 numbers, then for each number left."""
    whole = size // LANES * LANES
    with f.loop(whole, step=LANES) as i:
        body(i * 4, LANES)
    with f.loop(size, start=whole) as i:
        body(i * 4, 1)


def _total(f: Function, size: Value, added: Callable[[Value, Value, ir.Type], Value]) -> Value:
    """Return a sum over a row.

    Args:
        added: Adds to a total, given it, the place of numbers in bytes, and their type.
    """
    many, few = f.variable(f.zeros(FLOATS)), f.variable(f.f32(0.0))

    def add(at: Value, lanes: int) -> None:
        total = many if lanes == LANES else few
        total.value = added(total.value, at, total.value.type)

    _each_vector(f, size, add)
    return f.sum_of_lanes(many.value) + few.value


def _inverse_root(f: Function, squares: Value, size: Value, epsilon: Value) -> Value:
    """Return 1 / sqrt(squares / size + epsilon)."""
    mean = squares / size.to(F32) + f.load(F32, epsilon)
    return f.f32(1.0) / f.call("llvm.sqrt.f32", F32, mean)


def emit_rms_norm(module: Module) -> None:
    """Write the handler `rms_norm`: x (rows, size), weight (size,), eps (1,) to y (rows, size).

    y = weight * x / rms(x) in float32, where rms(x) is the root of eps plus a row's mean square.
    """
    pool.emit(module)

    def row(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        x, weight, epsilon, y = (f.load(PTR, args, 8 * i) for i in range(4))
        size = f.load(I64, args, 32)
        x, y = f.offset(x, chunk * size * 4), f.offset(y, chunk * size * 4)

        def with_square(total: Value, at: Value, t: ir.Type) -> Value:
            value = f.load(t, f.offset(x, at))
            return f.fma(value, value, total)

        factor = _inverse_root(f, _total(f, size, with_square), size, epsilon)

        def scale(at: Value, lanes: int) -> None:
            t = FLOATS if lanes == LANES else F32
            by = factor.splat() if lanes == LANES else factor
            value = f.load(t, f.offset(x, at)) * by * f.load(t, f.offset(weight, at))
            f.store(value, f.offset(y, at))

        _each_vector(f, size, scale)

    job = module.function("norm_row", [PTR, I64, I64], row, exported=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (x, weight, epsilon), (y,) = args, rets
        packed = f.pack(x.data, weight.data, epsilon.data, y.data, x.dim(1))
        f.call("pool_run", VOID, state, f.address_of(job), packed, x.dim(0))

    ffi.emit_handler(module, "rms_norm", 3, 1, call)


def emit_layer_norm(module: Module) -> None:
    """Write the handler `layer_norm`: x (rows, size), weight and bias (size,), eps (1,) to y.

    y = weight * c / rms(c) + bias in float32, where c is x less the mean of its row.
    """
    pool.emit(module)

    def row(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        x, weight, bias, epsilon, y = (f.load(PTR, args, 8 * i) for i in range(5))
        size = f.load(I64, args, 40)
        x, y = f.offset(x, chunk * size * 4), f.offset(y, chunk * size * 4)

        def like(t: ir.Type, number: Value) -> Value:
            return number.splat() if t == FLOATS else number

        mean = _total(f, size, lambda total, at, t: total + f.load(t, f.offset(x, at)))
        mean = mean / size.to(F32)

        def centred(at: Value, t: ir.Type) -> Value:
            return f.load(t, f.offset(x, at)) - like(t, mean)

        def with_square(total: Value, at: Value, t: ir.Type) -> Value:
            value = centred(at, t)
            return f.fma(value, value, total)

        factor = _inverse_root(f, _total(f, size, with_square), size, epsilon)

        def scale(at: Value, lanes: int) -> None:
            t = FLOATS if lanes == LANES else F32
            value = centred(at, t) * like(t, factor)
            shifted = f.fma(value, f.load(t, f.offset(weight, at)), f.load(t, f.offset(bias, at)))
            f.store(shifted, f.offset(y, at))

        _each_vector(f, size, scale)

    job = module.function("layer_norm_row", [PTR, I64, I64], row, exported=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (x, weight, bias, epsilon), (y,) = args, rets
        packed = f.pack(x.data, weight.data, bias.data, epsilon.data, y.data, x.dim(1))
        f.call("pool_run", VOID, state, f.address_of(job), packed, x.dim(0))

    ffi.emit_handler(module, "layer_norm", 4, 1, call)


def emit_swiglu(module: Module) -> None:
    """Write the handler `swiglu`: x (rows, 2 size) to silu(gate) * other (rows, size), float32.

    A row of x holds `size` gates and then `size` other numbers.
    """
    pool.emit(module)

    def row(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        x, y, size = f.load(PTR, args, 0), f.load(PTR, args, 8), f.load(I64, args, 16)
        gates = f.offset(x, chunk * size * 8)
        others = f.offset(gates, size * 4)
        y = f.offset(y, chunk * size * 4)

        def one(at: Value, lanes: int) -> None:
            t = FLOATS if lanes == LANES else F32
            gate, other = f.load(t, f.offset(gates, at)), f.load(t, f.offset(others, at))
            # exp(-|gate|), since exp(-gate) could overflow
            power = exp(f, f.like(gate, 0.0) - f.absolute(gate))
            share = (gate < 0.0).select(power, 1.0) / (power + 1.0)
            f.store(gate * share * other, f.offset(y, at))

        _each_vector(f, size, one)

    job = module.function("swiglu_row", [PTR, I64, I64], row, exported=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (x,), (y,) = args, rets
        packed = f.pack(x.data, y.data, y.dim(1))
        f.call("pool_run", VOID, state, f.address_of(job), packed, x.dim(0))

    ffi.emit_handler(module, "swiglu", 1, 1, call)
