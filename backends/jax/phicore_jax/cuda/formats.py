"""The layout of quantized matrices in GPU memory, and how a lane reads a group of 32 weights.

Each field of ggml's blocks becomes an array of its own, called a plane, with one row per row of the
matrix. Codes are stored in 32-bit words, so that a lane loads up to 16 bytes at once and all loads
are aligned. Scales are stored as in the file, except that integers of 6 bits become bytes. A matrix
takes at most 4 % more memory than in the file.

The 32 codes of a group are 8 quads of 4 consecutive codes. Code j of quad q is in byte j of a word:

    word q // 2, low nibble if q is even, else high   4 bits: a whole code, or its low 4 bits
    word 0, bit 8 j + q                               1 bit: a code's fifth, or Q3_K's third
    word q // 4, bits 8 j + 2 (q % 4) and the next    2 bits: a code's fifth and sixth, or low two
    word q                                            8 bits: a whole code
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type
from jax import lax

from phicore.gguf.blocks import (
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Block,
    Field,
)
from phicore.gguf.quants import codes
from phicore_jax.cuda.warp import Warp
from phicore_jax.kernels.lang import F16, F32, I16, I32, Value

GROUP = 32
SUPER = 8  # groups in a block of 256 weights


@dataclass(frozen=True)
class Weights:
    """A group of 32 weights in each lane: scale * (code - offset) + bias.

    Attributes:
        quads: Eight words of four codes each, a byte per code.
        scales: One float32 for the group, or one for each half of it.
        biases: As many float32 as there are scales, or none.
        offset: The number that is subtracted from every code.
        is_signed: Whether codes are signed bytes.
    """

    quads: Sequence[Value]
    scales: Sequence[Value]
    biases: Sequence[Value] = ()
    offset: int = 0
    is_signed: bool = False

    def values(self) -> list[Value]:
        """Expand the group to its 32 weights, float32."""
        found = []
        for q, quad in enumerate(self.quads):
            part = q * len(self.scales) // len(self.quads)
            for i in range(4):
                code = (quad << (24 - 8 * i)).sar(24) if self.is_signed else (quad >> 8 * i) & 255
                if self.offset:
                    code = code - self.offset
                value = code.to(F32) * self.scales[part]
                found.append(value + self.biases[part] if self.biases else value)
        return found

    def times(self, w: Warp, activations: Sequence[Value], sums: Sequence[Value]) -> Value:
        """Return the dot product with a group of integer activations, float32.

        The caller multiplies it by the unit of the activations.

        Args:
            activations: Eight words of the integers' upper bytes, then eight of their lower bytes.
            sums: The sum of the first 16 integers, and the sum of the other 16.
        """
        zero = w.spread(w.f.i32(0))
        dots = []
        for half in range(2):
            upper = lower = zero
            for q in range(4 * half, 4 * half + 4):
                codes = self.quads[q]
                upper = w.dot4(upper, codes, activations[q], signed=self.is_signed)
                lower = w.dot4(lower, codes, activations[8 + q], signed=self.is_signed)
            dot = (upper << 8) + lower
            dots.append(dot - sums[half] * self.offset if self.offset else dot)
        if len(self.scales) == 1:
            dots, sums = [dots[0] + dots[1]], [sums[0] + sums[1]]
        terms = [d.to(F32) * s for d, s in zip(dots, self.scales, strict=True)]
        if self.biases:
            terms += [s.to(F32) * b for s, b in zip(sums, self.biases, strict=True)]
        total, *others = terms
        for term in others:
            total = total + term
        return total


class Format(ABC):
    """The GPU layout of one quantization type: how to pack, read and expand its blocks."""

    block: Block
    plane_count: int

    @property
    def type(self) -> Type:
        return self.block.type

    @abstractmethod
    def planes(self, data: Any) -> tuple[Any, ...]:
        """Turn rows of blocks (N, bytes) uint8 into planes (N, ...) uint32 or uint16, in XLA."""

    @abstractmethod
    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        """Write the kernel code that loads a group of weights into each lane.

        Args:
            row: Each lane's row.
            group: The index of each lane's group in its row.
            groups: The number of groups in a row.
        """

    @abstractmethod
    def dense(self, planes: Sequence[Any]) -> Any:
        """Expand the planes of some rows to float32 (N, K), in XLA."""


# ---- words of codes ------------------------------------------------------------------------------


def nibbles(codes: Any) -> Any:
    """Pack the low 4 bits of codes (N, K) into words (N, G, 4)."""
    low = (codes & 15).reshape(codes.shape[0], -1, 4, 2, 4)
    return _words(low[..., 0, :] | low[..., 1, :] << 4)


def single_bits(codes: Any, shift: int) -> Any:
    """Pack bit number `shift` of codes (N, K) into words (N, G)."""
    bits = (codes >> shift & 1).reshape(codes.shape[0], -1, 8, 4)
    return _words(_together(bits << np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1), axis=2))


def pairs_of_bits(codes: Any, shift: int) -> Any:
    """Pack bits number `shift` and `shift + 1` of codes (N, K) into words (N, G, 2)."""
    bits = (codes >> shift & 3).reshape(codes.shape[0], -1, 2, 4, 4)
    return _words(
        _together(bits << 2 * np.arange(4, dtype=np.uint8).reshape(1, 1, 1, 4, 1), axis=3)
    )


def _together(bits: Any, axis: int) -> Any:
    return jnp.sum(bits, axis=axis, dtype=jnp.uint8)


def _words(codes: Any) -> Any:
    """Reinterpret bytes (..., 4) as words (...)."""
    return lax.bitcast_convert_type(codes, jnp.uint32)


def read_nibbles(w: Warp, plane: Value, at: Value) -> list[Value]:
    quads = []
    for word in w.load(I32, plane, at, 4):
        quads += [word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F]
    return quads


def read_bits(w: Warp, plane: Value, at: Value) -> list[Value]:
    (word,) = w.load(I32, plane, at)
    return [(word >> q) & 0x01010101 for q in range(8)]


def read_pairs(w: Warp, plane: Value, at: Value) -> list[Value]:
    words = w.load(I32, plane, at, 2)
    return [(words[q // 4] >> 2 * (q % 4)) & 0x03030303 for q in range(8)]


def bytes_of(words: Any) -> Any:
    """Reinterpret words (..., n) as bytes (..., n, 4), in XLA."""
    return lax.bitcast_convert_type(words, jnp.uint8)


def codes_of_nibbles(words: Any) -> Any:
    """Unpack the words of `nibbles` into codes (N, G, 32) uint8."""
    found = bytes_of(words)
    return jnp.stack([found & 15, found >> 4], axis=-2).reshape(*words.shape[:2], GROUP)


def codes_of_bits(words: Any) -> Any:
    """Unpack the words of `single_bits` into bits (N, G, 32) uint8."""
    shifts = jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 8, 1)
    return (bytes_of(words)[:, :, None, :] >> shifts & 1).reshape(*words.shape, GROUP)


def codes_of_pairs(words: Any) -> Any:
    """Unpack the words of `pairs_of_bits` into numbers below 4, (N, G, 32) uint8."""
    shifts = 2 * jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 1, 4, 1)
    return (bytes_of(words)[:, :, :, None, :] >> shifts & 3).reshape(*words.shape[:2], GROUP)


def half(w: Warp, plane: Value, at: Value) -> Value:
    """Load a number from a plane of float16, as float32."""
    (bits,) = w.load(I16, plane, at)
    return as_float(bits)


def two_halves(w: Warp, plane: Value, at: Value) -> tuple[Value, Value]:
    """Load the two float16 of a word of a plane, as float32; the low half is the first."""
    (both,) = w.load(I32, plane, at)
    return as_float(both.to(I16)), as_float((both >> 16).to(I16))


def as_float(bits: Value) -> Value:
    """Convert the bits of a float16 to float32."""
    count = getattr(bits.type, "count", None)
    return bits.bits_as(F16 if count is None else type(bits.type)(F16, count)).to(F32)


def numbers(halves: Any) -> Any:
    """Convert the bits of float16 numbers to float32, in XLA."""
    return lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)


def two_numbers(words: Any) -> tuple[Any, Any]:
    """Convert words to pairs of float16, as float32, in XLA; `two_halves` is its kernel form."""
    found = numbers(lax.bitcast_convert_type(words, jnp.uint16))
    return found[..., 0], found[..., 1]


# ---- types of ggml -------------------------------------------------------------------------------


def _blocks(block: Block, data: Any) -> Any:
    """Reshape rows of blocks (N, bytes) to (N, blocks, bytes)."""
    return data.reshape(data.shape[0], -1, block.size)


def _u16(field: Any) -> Any:
    """Reinterpret the bytes of a field (N, blocks, n) as uint16 (N, blocks * n / 2)."""
    return lax.bitcast_convert_type(field.reshape(field.shape[0], -1, 2), jnp.uint16)


def _d_and_dmin(block: Block, blocks: Any) -> Any:
    """Return the fields `d` and `dmin`, which are adjacent, as a word per block: (N, blocks)."""
    return _words(Field(block.d.start, block.d.size + block.dmin.size).of(blocks))


def _dense(codes: Any, scales: Any, biases: Any = None, offset: int = 0) -> Any:
    """Compute values (N, K) float32 from codes (N, G, 32), scales and biases (N, G, 1 or 2)."""
    values = codes.reshape(*scales.shape, -1).astype(jnp.float32) - offset
    values = scales[..., None] * values
    if biases is not None:
        values = values + biases[..., None]
    return values.reshape(len(codes), -1)


class Nibbles(Format):
    """A type with codes of 4 bits in the first plane, and planes of scales after it."""

    def planes(self, data: Any) -> tuple[Any, ...]:
        return nibbles(codes(self.type, data)), *self.factors(_blocks(self.block, data))

    @abstractmethod
    def factors(self, blocks: Any) -> tuple[Any, ...]:
        """Return the planes of scales and biases of blocks (N, blocks, bytes)."""

    def quads(self, w: Warp, planes: Sequence[Value], at: Value) -> list[Value]:
        """Load the eight quads of a group from the planes that hold codes."""
        return read_nibbles(w, planes[0], at)

    def codes(self, planes: Sequence[Any]) -> Any:
        """Unpack all codes, (N, G, 32), in XLA."""
        return codes_of_nibbles(planes[0])


class FifthBit(Nibbles):
    """Mixin for codes of 5 bits, whose fifth bits are the second plane.

    It comes before the class of a 4-bit type among the bases.
    """

    def planes(self, data: Any) -> tuple[Any, ...]:
        low, *others = super().planes(data)
        return low, single_bits(codes(self.type, data), 4), *others

    def quads(self, w: Warp, planes: Sequence[Value], at: Value) -> list[Value]:
        low, high = planes
        parts = zip(read_nibbles(w, low, at), read_bits(w, high, at), strict=True)
        return [quad | bit << 4 for quad, bit in parts]

    def codes(self, planes: Sequence[Any]) -> Any:
        low, high = planes
        return codes_of_nibbles(low) | codes_of_bits(high) << 4


class Q40(Nibbles):
    """Q4_0: a weight is d * (code - 8)."""

    block, plane_count = Q4_0, 2

    def factors(self, blocks: Any) -> tuple[Any, ...]:
        return (_u16(self.block.d.of(blocks)),)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        *planes, d = planes
        at = row * groups + group
        return Weights(self.quads(w, planes, at), [half(w, d, at)], offset=self.block.offset)

    def dense(self, planes: Sequence[Any]) -> Any:
        *planes, d = planes
        return _dense(self.codes(planes), numbers(d)[..., None], offset=self.block.offset)


class Q41(Nibbles):
    """Q4_1: a weight is d * code + m."""

    block, plane_count = Q4_1, 2

    def factors(self, blocks: Any) -> tuple[Any, ...]:
        return (_d_and_dmin(self.block, blocks),)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        *planes, both = planes
        at = row * groups + group
        d, m = two_halves(w, both, at)
        return Weights(self.quads(w, planes, at), [d], [m])

    def dense(self, planes: Sequence[Any]) -> Any:
        *planes, both = planes
        d, m = two_numbers(both)
        return _dense(self.codes(planes), d[..., None], m[..., None])


class Q50(FifthBit, Q40):
    """Q5_0: a weight is d * (code - 16)."""

    block, plane_count = Q5_0, 3


class Q51(FifthBit, Q41):
    """Q5_1: a weight is d * code + m."""

    block, plane_count = Q5_1, 3


class Q80(Format):
    """Q8_0: a weight is d * code; codes are signed bytes."""

    block, plane_count = Q8_0, 2

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks = _blocks(self.block, data)
        quads = self.block.low.of(blocks).reshape(*blocks.shape[:2], 8, 4)
        return _words(quads), _u16(self.block.d.of(blocks))

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        codes, d = planes
        at = row * groups + group
        quads = [q for part in range(2) for q in w.load(I32, codes, at * 2 + part, 4)]
        return Weights(quads, [half(w, d, at)], is_signed=True)

    def dense(self, planes: Sequence[Any]) -> Any:
        codes, d = planes
        integers = bytes_of(codes).astype(jnp.int8).reshape(*d.shape, GROUP)
        return _dense(integers, numbers(d)[..., None])


class Q2K(Format):
    """Q2_K: a weight is d * scale * code - dmin * minimum, with codes of 2 bits.

    Each 16 codes have a scale and a minimum of 4 bits.
    """

    block, plane_count = Q2_K, 3

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks = _blocks(self.block, data)
        return (
            pairs_of_bits(codes(self.type, data), 0),
            _u16(self.block.scales.of(blocks)),
            _d_and_dmin(self.block, blocks),
        )

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        codes, factors, d = planes
        at = row * groups + group
        (fields,) = w.load(I16, factors, at)
        numbers = [((fields >> shift) & 15).to(F32, signed=False) for shift in (0, 4, 8, 12)]
        largest, least = two_halves(w, d, at >> 3)
        scales = [largest * scale for scale in numbers[::2]]
        biases = [(least * minimum) * -1.0 for minimum in numbers[1::2]]
        return Weights(read_pairs(w, codes, at), scales, biases)

    def dense(self, planes: Sequence[Any]) -> Any:
        codes, factors, d = planes
        d, dmin = (jnp.repeat(n, SUPER, axis=1)[..., None] for n in two_numbers(d))
        fields = lax.bitcast_convert_type(factors, jnp.uint8)  # (N, G, 2)
        scales = d * (fields & 15).astype(jnp.float32)
        return _dense(codes_of_pairs(codes), scales, -(dmin * (fields >> 4).astype(jnp.float32)))


class Q6K(Format):
    """Q6_K: a weight is d * scale * (code - 32), with a scale of 8 bits for each 16 codes."""

    block, plane_count = Q6_K, 4

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks, found = _blocks(self.block, data), codes(self.type, data)
        return (
            nibbles(found),
            pairs_of_bits(found, 4),
            _u16(self.block.scales.of(blocks)),
            _u16(self.block.d.of(blocks)),
        )

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        low, high, scales, d = planes
        at = row * groups + group
        (pair,) = w.load(I16, scales, at)
        largest = half(w, d, at >> 3)
        both = [(pair << 8).sar(8).to(F32), pair.sar(8).to(F32)]
        quads = self.quads(w, low, high, at)
        return Weights(quads, [largest * scale for scale in both], offset=self.block.offset)

    def quads(self, w: Warp, low: Value, high: Value, at: Value) -> list[Value]:
        """Load the eight quads of a group from the two planes that hold codes."""
        parts = zip(read_nibbles(w, low, at), read_pairs(w, high, at), strict=True)
        return [quad | pair << 4 for quad, pair in parts]

    def dense(self, planes: Sequence[Any]) -> Any:
        low, high, scales, d = planes
        integers = lax.bitcast_convert_type(scales, jnp.int8).astype(jnp.float32)  # (N, G, 2)
        factors = jnp.repeat(numbers(d), SUPER, axis=1)[..., None] * integers
        return _dense(self.codes(low, high), factors, offset=self.block.offset)

    def codes(self, low: Any, high: Any) -> Any:
        """Unpack all codes, (N, G, 32), in XLA."""
        return codes_of_nibbles(low) | codes_of_pairs(high) << 4


class Q3K(Q6K):
    """Q3_K: a weight is d * scale * (code - 4), with codes of 3 bits.

    Each 16 codes have a scale of 6 bits.
    """

    block = Q3_K

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks, found = _blocks(self.block, data), codes(self.type, data)
        packed = self.block.scales.of(blocks)
        low, high = packed[..., :8], packed[..., 8:]
        low = jnp.concatenate([low & 15, low >> 4], axis=-1)
        high = jnp.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
        scales = (low | high << 4) - 32  # uint8 that wraps around, read as int8
        return (
            pairs_of_bits(found, 0),
            single_bits(found, 2),
            _u16(scales),
            _u16(self.block.d.of(blocks)),
        )

    def quads(self, w: Warp, low: Value, high: Value, at: Value) -> list[Value]:
        parts = zip(read_pairs(w, low, at), read_bits(w, high, at), strict=True)
        return [pair | bit << 2 for pair, bit in parts]

    def codes(self, low: Any, high: Any) -> Any:
        return codes_of_pairs(low) | codes_of_bits(high) << 2


class Q4K(Nibbles):
    """Q4_K: a weight is d * scale * code - dmin * minimum.

    Each group has a scale and a minimum, integers of 6 bits.
    """

    block, plane_count = Q4_K, 3

    def factors(self, blocks: Any) -> tuple[Any, ...]:
        return self.scale_pairs(self.block.scales.of(blocks)), _d_and_dmin(self.block, blocks)

    @staticmethod
    def scale_pairs(packed: Any) -> Any:
        """Unpack each block's 12 bytes of scales and minimums: (N, G) uint16.

        The low byte of a number is the scale of a group, the high byte its minimum.
        """
        low, high = packed[..., :4], packed[..., 4:8]
        last = packed[..., 8:]
        scale = jnp.concatenate([low & 63, last & 15 | (low >> 6) << 4], axis=-1)
        minimum = jnp.concatenate([high & 63, last >> 4 | (high >> 6) << 4], axis=-1)
        pairs = scale.astype(jnp.uint16) | minimum.astype(jnp.uint16) << 8
        return pairs.reshape(packed.shape[0], -1)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        *planes, pairs, d = planes
        at = row * groups + group
        (pair,) = w.load(I16, pairs, at)
        scale, minimum = (pair & 255).to(F32, signed=False), (pair >> 8).to(F32, signed=False)
        largest, least = two_halves(w, d, at >> 3)
        return Weights(self.quads(w, planes, at), [largest * scale], [(least * minimum) * -1.0])

    def dense(self, planes: Sequence[Any]) -> Any:
        *planes, pairs, d = planes
        d, dmin = (jnp.repeat(n, SUPER, axis=1) for n in two_numbers(d))
        scales = d * (pairs & 255).astype(jnp.float32)
        biases = -(dmin * (pairs >> 8).astype(jnp.float32))
        return _dense(self.codes(planes), scales[..., None], biases[..., None])


class Q5K(FifthBit, Q4K):
    """Q5_K: a weight is d * scale * code - dmin * minimum, with codes of 5 bits."""

    block, plane_count = Q5_K, 4


FORMATS: dict[Type, Format] = {
    f.type: f for f in (Q40(), Q41(), Q50(), Q51(), Q80(), Q2K(), Q3K(), Q4K(), Q5K(), Q6K())
}
