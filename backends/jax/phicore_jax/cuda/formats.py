"""How quantized matrices lie in a card's memory, and how a lane reads a group of 32 weights.

Each part of ggml's blocks becomes a plane of its own, with rows of whole groups: codes by words, so
that a lane loads 16 bytes at once, and scales as the file has them. So a matrix takes the memory
that it takes in the file, and loads are aligned. Code j of the four in quad q is byte j of a word:

    word q // 2, low or high nibble by q % 2      codes of 4 bits, and the low 4 of wider ones
    word 0, bit 8 j + q                           the fifth bit
    word q // 4, bits 8 j + 2 (q % 4) and + 1     the fifth and sixth bit
    word q                                        codes of 8 bits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from jax import lax

from phicore.gguf.quants import codes
from phicore_jax.cuda.warp import Warp
from phicore_jax.kernels.lang import F16, F32, I16, I32, Value

GROUP = 32
SUPER = 8  # groups of a block of 256


@dataclass(frozen=True)
class Weights:
    """A group of each lane: scale * (code - offset) + bias.

    Attributes:
        quads: Eight words of four codes.
        scales: Of the group, or of each half of it; float32.
        bias: Of the group, or None.
        is_signed: Whether codes are signed bytes.
    """

    quads: Sequence[Value]
    scales: Sequence[Value]
    bias: Value | None = None
    offset: int = 0
    is_signed: bool = False

    def values(self) -> list[Value]:
        """The 32 numbers, float32."""
        found = []
        for q, quad in enumerate(self.quads):
            scale = self.scales[q * len(self.scales) // len(self.quads)]
            for i in range(4):
                code = (quad << (24 - 8 * i)).sar(24) if self.is_signed else (quad >> 8 * i) & 255
                if self.offset:
                    code = code - self.offset
                value = code.to(F32) * scale
                found.append(value if self.bias is None else value + self.bias)
        return found

    def times(self, w: Warp, activations: Sequence[Value], sums: Sequence[Value]) -> Value:
        """Their product with a group of activations, in units of these; float32.

        Args:
            activations: The upper bytes in eight words, then the lower ones.
            sums: Of the first 16 and of the second.
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
            dots = [dots[0] + dots[1]]
        products = [d.to(F32) * s for d, s in zip(dots, self.scales, strict=True)]
        total = products[0] if len(products) == 1 else products[0] + products[1]
        if self.bias is not None:
            total = total + (sums[0] + sums[1]).to(F32) * self.bias
        return total


class Format(ABC):
    """A type of quantization."""

    type: Type
    plane_count: int

    @abstractmethod
    def planes(self, data: Any) -> tuple[Any, ...]:
        """The planes of rows of blocks, (N, bytes) uint8: (N, ...) uint32, uint16; by XLA."""

    @abstractmethod
    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        """A group of a row, for each lane."""

    @abstractmethod
    def dense(self, planes: Sequence[Any]) -> Any:
        """The values of some rows, float32 (N, K), by XLA."""


# ---- words of codes ------------------------------------------------------------------------------


def nibbles(codes: Any) -> Any:
    """The low 4 bits of codes (N, K): (N, G, 4) words."""
    low = (codes & 15).reshape(codes.shape[0], -1, 4, 2, 4)
    return _words(low[..., 0, :] | low[..., 1, :] << 4)


def fifth_bits(codes: Any) -> Any:
    """(N, G) words."""
    bits = (codes >> 4 & 1).reshape(codes.shape[0], -1, 8, 4)
    return _words(_together(bits << np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1), axis=2))


def upper_pairs(codes: Any) -> Any:
    """(N, G, 2) words."""
    bits = (codes >> 4 & 3).reshape(codes.shape[0], -1, 2, 4, 4)
    return _words(
        _together(bits << 2 * np.arange(4, dtype=np.uint8).reshape(1, 1, 1, 4, 1), axis=3)
    )


def _together(bits: Any, axis: int) -> Any:
    return jnp.sum(bits, axis=axis, dtype=jnp.uint8)


def _words(codes: Any) -> Any:
    """Bytes (..., 4) as words (...)."""
    return lax.bitcast_convert_type(codes, jnp.uint32)


def read_nibbles(w: Warp, plane: Value, at: Value) -> list[Value]:
    quads = []
    for word in w.load(I32, plane, at, 4):
        quads += [word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F]
    return quads


def bytes_of(words: Any) -> Any:
    """Words (..., n) as bytes (..., n, 4), by XLA."""
    return lax.bitcast_convert_type(words, jnp.uint8)


def codes_of_nibbles(words: Any) -> Any:
    """The reverse of `nibbles`: (N, G, 32) uint8."""
    found = bytes_of(words)
    return jnp.stack([found & 15, found >> 4], axis=-2).reshape(*words.shape[:2], GROUP)


def half(w: Warp, plane: Value, at: Value) -> Value:
    """A float16 of a plane of them."""
    (bits,) = w.load(I16, plane, at)
    return as_float(bits)


def as_float(bits: Value) -> Value:
    """Bits of float16 as float32."""
    count = getattr(bits.type, "count", None)
    return bits.bits_as(F16 if count is None else type(bits.type)(F16, count)).to(F32)


def numbers(halves: Any) -> Any:
    """The same by XLA."""
    return lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)


# ---- types of ggml -------------------------------------------------------------------------------


def _blocks(ggml_type: Type, data: Any) -> Any:
    """(N, blocks, bytes)."""
    return data.reshape(data.shape[0], -1, GGML_QUANT_SIZES[ggml_type][1])


def _u16(blocks: Any, start: int, count: int = 1) -> Any:
    """`count` times 16 bits from a byte of each block on: (N, blocks * count)."""
    pairs = blocks[..., start : start + 2 * count].reshape(blocks.shape[0], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint16)


class Q40(Format):
    """d * (code - 8)."""

    type, plane_count = Type.Q4_0, 2

    def planes(self, data: Any) -> tuple[Any, ...]:
        return nibbles(codes(self.type, data)), _u16(_blocks(self.type, data), 0)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        codes, d = planes
        at = row * groups + group
        return Weights(read_nibbles(w, codes, at), [half(w, d, at)], offset=8)

    def dense(self, planes: Sequence[Any]) -> Any:
        codes, d = planes
        values = numbers(d)[..., None] * (codes_of_nibbles(codes).astype(jnp.float32) - 8)
        return values.reshape(len(codes), -1)


class Q80(Format):
    """d * code, of signed bytes."""

    type, plane_count = Type.Q8_0, 2

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks = _blocks(self.type, data)
        quads = blocks[..., 2:].reshape(*blocks.shape[:2], 8, 4)
        return _words(quads), _u16(blocks, 0)

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
        return (numbers(d)[..., None] * integers.astype(jnp.float32)).reshape(len(codes), -1)


class Q4K(Format):
    """d * scale * code - dmin * minimum: scales and minimums are integers of 6 bits."""

    type, plane_count = Type.Q4_K, 3

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks = _blocks(self.type, data)
        pairs = self.scale_pairs(blocks[..., 4:16])
        return nibbles(codes(self.type, data)), pairs, _words(blocks[..., :4])

    @staticmethod
    def scale_pairs(packed: Any) -> Any:
        """Scale and minimum of each group, of 12 bytes a block: (N, G) uint16."""
        low, high = packed[..., :4], packed[..., 4:8]
        last = packed[..., 8:]
        scale = jnp.concatenate([low & 63, last & 15 | (low >> 6) << 4], axis=-1)
        minimum = jnp.concatenate([high & 63, last >> 4 | (high >> 6) << 4], axis=-1)
        pairs = scale.astype(jnp.uint16) | minimum.astype(jnp.uint16) << 8
        return pairs.reshape(packed.shape[0], -1)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        codes, pairs, d = planes
        at = row * groups + group
        return Weights(read_nibbles(w, codes, at), *self._factors(w, pairs, d, at))

    @staticmethod
    def _factors(w: Warp, pairs: Value, d: Value, at: Value) -> tuple[list[Value], Value]:
        (pair,), (both,) = w.load(I16, pairs, at), w.load(I32, d, at >> 3)
        scale, minimum = (pair & 255).to(F32, signed=False), (pair >> 8).to(F32, signed=False)
        largest, least = as_float(both.to(I16)), as_float((both >> 16).to(I16))
        return [largest * scale], (least * minimum) * -1.0

    def dense(self, planes: Sequence[Any]) -> Any:
        codes, pairs, d = planes
        return self._dense(codes_of_nibbles(codes), pairs, d)

    @staticmethod
    def _dense(codes: Any, pairs: Any, d: Any) -> Any:
        d = jnp.repeat(numbers(lax.bitcast_convert_type(d, jnp.uint16)), SUPER, axis=1)
        scale = d[..., 0] * (pairs & 255).astype(jnp.float32)
        minimum = d[..., 1] * (pairs >> 8).astype(jnp.float32)
        values = scale[..., None] * codes.astype(jnp.float32) - minimum[..., None]
        return values.reshape(len(codes), -1)


class Q5K(Q4K):
    """The same with codes of 5 bits."""

    type, plane_count = Type.Q5_K, 4

    def planes(self, data: Any) -> tuple[Any, ...]:
        low, pairs, d = super().planes(data)
        return low, fifth_bits(codes(self.type, data)), pairs, d

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        low, high, pairs, d = planes
        at = row * groups + group
        (bits,) = w.load(I32, high, at)
        quads = [
            quad | ((bits >> q) & 0x01010101) << 4
            for q, quad in enumerate(read_nibbles(w, low, at))
        ]
        return Weights(quads, *self._factors(w, pairs, d, at))

    def dense(self, planes: Sequence[Any]) -> Any:
        low, high, pairs, d = planes
        shifts = jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 8, 1)
        bits = bytes_of(high)[:, :, None, :] >> shifts & 1
        codes = codes_of_nibbles(low) | bits.reshape(*high.shape, GROUP) << 4
        return self._dense(codes, pairs, d)


class Q6K(Format):
    """d * scale * (code - 32), with a scale of 8 bits for 16 codes."""

    type, plane_count = Type.Q6_K, 4

    def planes(self, data: Any) -> tuple[Any, ...]:
        blocks, found = _blocks(self.type, data), codes(self.type, data)
        return nibbles(found), upper_pairs(found), _u16(blocks, 192, 8), _u16(blocks, 208)

    def read(
        self, w: Warp, planes: Sequence[Value], row: Value, group: Value, groups: int
    ) -> Weights:
        low, high, scales, d = planes
        at = row * groups + group
        words = w.load(I32, high, at, 2)
        quads = [
            quad | ((words[q // 4] >> 2 * (q % 4)) & 0x03030303) << 4
            for q, quad in enumerate(read_nibbles(w, low, at))
        ]
        (pair,) = w.load(I16, scales, at)
        largest = half(w, d, at >> 3)
        both = [(pair << 8).sar(8).to(F32), pair.sar(8).to(F32)]
        return Weights(quads, [largest * scale for scale in both], offset=32)

    def dense(self, planes: Sequence[Any]) -> Any:
        low, high, scales, d = planes
        shifts = 2 * jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 1, 4, 1)
        bits = bytes_of(high)[:, :, :, None, :] >> shifts & 3
        codes = codes_of_nibbles(low) | bits.reshape(*high.shape[:2], GROUP) << 4
        integers = lax.bitcast_convert_type(scales, jnp.int8).astype(jnp.float32)  # (N, G, 2)
        factors = jnp.repeat(numbers(d), SUPER, axis=1)[..., None] * integers
        codes = codes.reshape(*factors.shape, GROUP // 2).astype(jnp.float32) - 32
        return (factors[..., None] * codes).reshape(len(low), -1)


FORMATS: dict[Type, Format] = {f.type: f for f in (Q40(), Q80(), Q4K(), Q5K(), Q6K())}
