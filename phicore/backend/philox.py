"""Philox4x64-10 in the protocol's functions: the random numbers of NumPy's Philox, bit for bit.

Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) turns a counter of four
words of 64 bits and a key of two into four random words, in ten rounds. NumPy's generator with
`key=seed, counter=step << 64` adds 1 to the counter before each block. So block n of a step has the
counter (n + 1, step, 0, 0) and the key (seed, 0), and no block depends on another.

Not every library has 64 bits, or the upper half of a product. So a word is a pair of unsigned
integers of 32 bits, and these are multiplied in halves of 16 bits. A number takes 235 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any

ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
"""What is added to the two words of the key after each round."""
NUMBERS = 8
"""The numbers that a block of four words has: each word's low half, then its high half."""

Word = tuple[Array, Array]
"""Words of 64 bits: their low and their high 32 bits, uint32."""
State = tuple[Word, ...]
"""The four words of the counter and the two of the key, each (B, n)."""


def keys(seeds: Sequence[int]) -> np.ndarray:
    """Return seeds below 2**64 as the argument `key` of `Backend.uniforms`: (B, 2) uint32."""
    return np.array([(seed & 0xFFFFFFFF, seed >> 32) for seed in seeds], np.uint32)


def uniforms(xp: Any, key: Array, step: Array, size: int) -> Array:
    """Compute what `Backend.uniforms` describes."""
    state = begin(xp, key, step, size)
    for _ in range(ROUNDS):
        state = next_round(xp, state)
    return numbers(xp, state, size)


def begin(xp: Any, key: Array, step: Array, size: int) -> State:
    """Return the state of all blocks that have some of the first `size` numbers of a step."""
    count = -(-size // NUMBERS)
    shape = key.shape[0], count
    zero = xp.zeros(shape, dtype=xp.uint32)
    block = xp.astype(xp.arange(count, dtype=xp.int32), xp.uint32)[None, :]
    low, high = (xp.broadcast_to(key[:, i : i + 1], shape) for i in range(2))
    return (
        (xp.broadcast_to(block, shape) + 1, zero),
        (xp.broadcast_to(step[:, None], shape), zero),
        (zero, zero),
        (zero, zero),
        (low, high),
        (zero, zero),
    )


def next_round(xp: Any, state: State) -> State:
    """Run a round, and change the key for the next."""
    c0, c1, c2, c3, k0, k1 = state
    low0, high0 = _multiply(xp, c0, _constant(xp, MULTIPLIERS[0]))
    low1, high1 = _multiply(xp, c2, _constant(xp, MULTIPLIERS[1]))
    return (
        _xor(_xor(high1, c1), k0),
        low1,
        _xor(_xor(high0, c3), k1),
        low0,
        _add(xp, k0, _constant(xp, WEYL[0])),
        _add(xp, k1, _constant(xp, WEYL[1])),
    )


def numbers(xp: Any, state: State, size: int) -> Array:
    """Return the numbers of the blocks after the last round, (B, size) float32."""
    halves = [_number(xp, half)[:, :, None] for word in state[:4] for half in word]
    together = xp.concat(halves, axis=2)  # (B, n, NUMBERS)
    return xp.reshape(together, (together.shape[0], -1))[:, :size]


def _number(xp: Any, bits: Array) -> Array:
    """Turn 32 bits into a number in (0, 1): the middle of one of 2**32 intervals.

    Both parts are exact in float32, so their sum is rounded once.
    """
    high = xp.astype(bits >> 16, xp.float32) * 65536.0
    low = xp.astype(bits & 0xFFFF, xp.float32) + 0.5
    number = (high + low) * 2.0**-32
    return xp.where(number < 1, number, 1 - 2.0**-24)


def _constant(xp: Any, value: int) -> Word:
    def half(bits: int) -> Array:  # libraries differ in how they take numbers above 2**31
        return ((xp.zeros((1, 1), dtype=xp.uint32) + (bits >> 16)) << 16) + (bits & 0xFFFF)

    return half(value & 0xFFFFFFFF), half(value >> 32)


def _xor(a: Word, b: Word) -> Word:
    return a[0] ^ b[0], a[1] ^ b[1]


def _add(xp: Any, a: Word, b: Word) -> Word:
    """Add words, modulo 2**64."""
    low, carry = _sum(xp, a[0], b[0])
    return low, a[1] + b[1] + carry


def _sum(xp: Any, a: Array, b: Array) -> Word:
    """Add integers of 32 bits; return the sum modulo 2**32, and the carry."""
    total = a + b
    return total, xp.astype(total < b, xp.uint32)


def _multiply(xp: Any, a: Word, b: Word) -> tuple[Word, Word]:
    """Multiply words; return the low and the high 64 bits of the products."""
    ll, lh = _product(a[0], b[0]), _product(a[0], b[1])
    hl, hh = _product(a[1], b[0]), _product(a[1], b[1])
    one, carry1 = _sum(xp, ll[1], lh[0])
    one, carry2 = _sum(xp, one, hl[0])
    two, carry3 = _sum(xp, lh[1], hl[1])
    two, carry4 = _sum(xp, two, hh[0])
    two, carry5 = _sum(xp, two, carry1 + carry2)
    return (ll[0], one), (two, hh[1] + carry3 + carry4 + carry5)


def _product(a: Array, b: Array) -> Word:
    """Multiply integers of 32 bits; return the low and the high 32 bits of the products."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)  # below 2**32
    rest = a_low * b_high + (middle & 0xFFFF)  # below 2**32
    return a * b, a_high * b_high + (middle >> 16) + (rest >> 16)
