"""The GPU kernel that makes random numbers; `phicore.backend.philox` has the algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from phicore.backend.philox import MULTIPLIERS, NUMBERS, ROUNDS, WEYL
from phicore_jax.cuda.warp import LANES, Warp
from phicore_jax.kernels.lang import F32, I32, I64, Value

BITS = 2**64


def warps_of(rows: int, size: int) -> int:
    """Return the number of warps that make `size` numbers of each row."""
    return -(-rows * blocks_of(size) // LANES)


def blocks_of(size: int) -> int:
    return -(-size // NUMBERS)


def emit_uniforms(w: Warp, rows: int, size: int, args: Sequence[Value]) -> None:
    """Write the kernel that makes random numbers; a lane makes one block of 8.

    Args:
        rows, size: B, and how many numbers each row needs.
        args: Pointers, in this order: the keys (B, 2) uint32, the steps (B,) uint32, and the
            result, (B, the blocks of a row, 8) float32.
    """
    key, step, result = args
    blocks = blocks_of(size)
    number = w.spread(w.number * LANES) + w.lane
    is_there = number < rows * blocks
    at = is_there.select(number, 0)  # the last warps have too many lanes
    row, block = at // blocks, at % blocks
    low, high = w.load(I32, key, row, 2)
    (index,) = w.load(I32, step, row)
    first = _wide(low) + (_wide(high) << 32)
    zero = first & 0
    counter = [_wide(block) + 1, _wide(index), zero, zero]
    for number_of_round in range(ROUNDS):
        low0, high0 = _product(counter[0], MULTIPLIERS[0])
        low1, high1 = _product(counter[2], MULTIPLIERS[1])
        second = number_of_round * WEYL[1] % BITS
        counter = [high1 ^ counter[1] ^ first, low1, high0 ^ counter[3] ^ _signed(second), low0]
        first = first + _signed(WEYL[0])
    numbers = [_number(half) for word in counter for half in (word, word >> 32)]
    for half in range(2):
        w.store(numbers[4 * half : 4 * half + 4], result, number * 2 + half, is_there)


def _wide(x: Value) -> Value:
    return x.to(I64, signed=False)


def _signed(bits: int) -> int:
    """Return a constant of 64 bits as LLVM writes it."""
    return bits - BITS if bits >= BITS // 2 else bits


def _product(x: Value, constant: int) -> tuple[Value, Value]:
    """Multiply by a constant of 64 bits; return the low and the high 64 bits of the product.

    Each partial product is one of 32 by 32 bits, for which GPUs have an instruction.
    """
    c_low, c_high = constant & 0xFFFFFFFF, constant >> 32
    low, high = _wide(x.to(I32)), x >> 32
    middle = high * c_low + ((low * c_low) >> 32)
    rest = low * c_high + _wide(middle.to(I32))
    return x * _signed(constant), high * c_high + (middle >> 32) + (rest >> 32)


def _number(x: Value) -> Value:
    """Turn the low 32 bits into a number in (0, 1), as `philox` does."""
    bits = x.to(I32)
    high, low = (bits >> 16).to(F32) * 65536.0, (bits & 0xFFFF).to(F32) + 0.5
    number = (high + low) * 2.0**-32
    return (number < 1.0).select(number, 1 - 2.0**-24)
