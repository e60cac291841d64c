"""Memory layout of quantized matrices for the kernels, and the packing of a file's blocks into it.

A matrix is stored in strips of 16 rows, one row for each lane of a vector, and its columns in
groups of 32. The codes of a group are cut into bit planes of 8, 4, 2 or 1 bits. A plane has as many
vectors of 16-bit lanes as it has bits, two lanes for each row. Field i of the two lanes of vector j
holds bits of a pair of columns, the one whose `_slot` is i * bits + j. So one shift and one mask
give 16 rows of a pair of columns, which a dot product of 16-bit numbers takes. The fields of 8
columns lie at one place in their lanes, so that the mask alone gives the codes times a power of two
(`Format.place`). Pair p + 4 lies 8 bits beyond pair p, so that one shift and one mask give four
columns in bytes, which a dot product of bytes takes.

A block of a strip holds, for 16 rows, d and dmin (float16), then scales and minima (bytes), and
then the planes, group by group. The numbers are those of the file; nothing is rounded.

`phicore.gguf.blocks` describes the blocks of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from gguf import GGMLQuantizationType
from llvmlite import ir

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
    Bits,
    Block,
    Field,
)
from phicore_jax.kernels.lang import F32, I8, I16, I32, LANES, Function, Value, vec

Type = GGMLQuantizationType
GROUP = 32  # columns in a group
PAIRS = GROUP // 2
UNIT_PAIRS = 4  # pairs of columns whose fields lie at one place in their lanes
QUARTERS = (0, 2, 1, 3)  # where the quarters of a group lie
CODES = vec(I16, 2 * LANES)


@dataclass(frozen=True)
class Format:
    """The memory layout of a quantized type.

    Attributes:
        block: The fields of a block of the file.
        scale_bits: 0 if each group has its own float16 scale. 8 if a super-block of 256 columns has
            a float16 scale, and each subgroup a byte to multiply it by. 4 if that byte holds a
            scale and a minimum.
        scales: Writes instructions that load these bytes from a block of the file: first the
            block's scales, then its minima. None if `scale_bits` is 0.
    """

    block: Block
    scale_bits: int = 0
    scales: Callable[[Function, Value], list[Value]] | None = None

    @property
    def type(self) -> GGMLQuantizationType:
        return self.block.type

    @cached_property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """The (bits, shift) of each bit plane. A code is the sum of field << shift over planes."""
        low, high = self.block.low_bits, self.block.high_bits
        return ((low, 0), (high, low)) if high else ((low, 0),)

    @property
    def offset(self) -> int:
        """Number that is subtracted from a code. It is 0 for codes of 8 bits, which are signed."""
        return self.block.offset

    @property
    def subgroups(self) -> int:
        """Number of scales in a group of 32 columns: 1 or 2."""
        return GROUP // self.block.group_size

    @property
    def has_min(self) -> bool:
        """Say whether values have a bias (`dmin`): value = scale * (code - offset) + bias."""
        return bool(self.block.dmin)

    @property
    def halves(self) -> tuple[int, ...]:
        """Offsets of d and, if there are minima, dmin in a block of the file, in bytes."""
        return tuple(field.start for field in (self.block.d, self.block.dmin) if field)

    @property
    def has_bytes(self) -> bool:
        """Say whether codes are signed bytes."""
        return self.planes[0][0] == 8

    @property
    def largest_code(self) -> int:
        return 2 ** sum(bits for bits, _ in self.planes) - 1

    # ---- sizes, in bytes -------------------------------------------------------------------

    @property
    def file_block_bytes(self) -> int:
        return self.block.size

    @property
    def columns(self) -> int:
        return self.block.columns

    @cached_property
    def groups(self) -> int:
        """Number of groups of 32 columns in a block."""
        return self.columns // GROUP

    @property
    def scales_start(self) -> int:
        return 2 * LANES * len(self.halves)

    @property
    def scale_count(self) -> int:
        """Number of bytes of one row's block for scales, and for minima with bytes of their own."""
        kinds = 2 if self.has_min and self.scale_bits == 8 else 1
        return self.groups * self.subgroups * kinds if self.scale_bits else 0

    @property
    def planes_start(self) -> int:
        return self.scales_start + LANES * self.scale_count

    @property
    def group_bytes(self) -> int:
        return sum(bits for bits, _ in self.planes) * GROUP * LANES // 8

    @property
    def block_bytes(self) -> int:
        return self.planes_start + self.groups * self.group_bytes

    def strip_bytes(self, columns: int) -> int:
        return columns // self.columns * self.block_bytes

    # ---- reading a strip -------------------------------------------------------------------

    def super_scales(self, f: Function, block: Value) -> list[Value]:
        """Load d and, if the type has it, dmin of 16 rows as float32."""
        return [
            f.target.half_to_float(f.load(vec(I16), block, 2 * LANES * i))
            for i in range(len(self.halves))
        ]

    def group_scales(
        self, f: Function, block: Value, supers: list[Value], group: Value
    ) -> list[tuple[Value, Value | None]]:
        """Compute the scale and the bias, if any, of each subgroup for 16 rows, float32."""
        if not self.scale_bits:
            return [(supers[0], supers[1] if self.has_min else None)]
        found: list[tuple[Value, Value | None]] = []
        for i in range(self.subgroups):
            at = block + self.scales_start
            at = f.offset(at, (group * self.subgroups + i) * LANES)
            scale = f.load(vec(I8), at)
            minimum = None
            if self.has_min and self.scale_bits == 4:
                scale, minimum = scale & 15, scale >> 4
            elif self.has_min:
                minimum = f.load(vec(I8), at, self.groups * self.subgroups * LANES)
            is_signed = self.type in (Type.Q3_K, Type.Q6_K)
            s = supers[0] * scale.to(I32, signed=is_signed).to(F32)
            if minimum is None:
                found.append((s, None))
            else:  # in super-blocks, the minimum is subtracted
                m = supers[1] * minimum.to(I32, signed=False).to(F32)
                found.append((s, f.zeros(m.type) - m))
        return found

    def place(self, pair: int) -> int:
        """Return the power of two that is cheapest to leave in the codes of a pair of columns.

        It is the same for the 8 columns around the pair. Sums of their products with integers of
        16 bits still fit in 32 bits. `pair_codes` takes it.
        """
        largest = self.offset or self.largest_code
        place = _slot(pair) // UNIT_PAIRS * UNIT_PAIRS
        return place if largest << place <= 1 << 13 and not self.has_bytes else 0

    def pair_codes(self, f: Function, group: Value, pair: int, place: int = 0) -> Value:
        """Load the codes of 16 rows by a pair of columns, times 2**place: (2 * 16,) int16.

        Codes are unsigned and still contain the offset; codes of 8 bits are signed.
        """
        codes: Value | None = None
        start = 0
        for bits, shift in self.planes:
            i, j = divmod(_slot(pair), bits)
            plane = f.load(CODES, group, start + 4 * LANES * j)
            field = _field(plane, bits, i, shift + place)
            codes = field if codes is None else codes | field
            start += 4 * LANES * bits
        assert codes is not None
        return codes

    def byte_codes(self, f: Function, group: Value, word: int) -> Value:
        """Load the codes of 16 rows by the columns of a word: (2 * 16,) int16 of two bytes each.

        The bytes of a row hold the columns of `BYTE_COLUMNS`. Codes are unsigned and still contain
        the offset; codes of 8 bits are made unsigned by adding 128.
        """
        codes: Value | None = None
        start = 0
        for bits, shift in self.planes:
            i, j = divmod(word, bits)
            plane = f.load(CODES, group, start + 4 * LANES * j)
            if bits == 8:
                return plane ^ -0x7F80  # the bits 0x8080
            mask, move = (2**bits - 1) * 0x0101 << shift, shift - bits * i
            moved = plane << move if move > 0 else plane >> -move if move < 0 else plane
            field = moved & mask
            codes = field if codes is None else codes | field
            start += 4 * LANES * bits
        assert codes is not None
        return codes

    # ---- writing a strip -------------------------------------------------------------------

    def pack_block(self, f: Function, source: Value, block: Value, lane: Value) -> None:
        """Write one row's block from the file into a lane of a strip's block."""
        for i, at in enumerate(self.halves):
            f.store(f.load(I16, source, at), f.offset(block + 2 * LANES * i, lane * 2))
        if self.scales is not None:
            for i, scale in enumerate(self.scales(f, source)):
                f.store(scale, f.offset(block + self.scales_start + i * LANES, lane))
        for g in range(self.groups):
            codes = _codes(f, source, self.block, g)
            start = self.planes_start + g * self.group_bytes
            for bits, shift in self.planes:
                words = _plane_words(codes, bits, shift)
                for j in range(words.type.count):
                    f.store(words.lane(j), f.offset(block + start, lane * 4))
                    start += 4 * LANES


def _slot(pair: int) -> int:
    """Return the place of a pair of columns in the planes; also the pair at a place."""
    quarter, i = divmod(pair, UNIT_PAIRS)
    return QUARTERS[quarter] * UNIT_PAIRS + i


BYTE_COLUMNS = tuple(
    tuple(2 * _slot(slot) + odd for odd in (0, 1) for slot in (word, word + PAIRS // 2))
    for word in range(PAIRS // 2)
)
"""The four columns of each word of bytes."""


def _field(plane: Value, bits: int, i: int, shift: int) -> Value:
    """Extract field i of every 16-bit lane, shifted to its place in the code."""
    if bits == 8:  # signed
        return plane.sar(8) if i else (plane << 8).sar(8)
    mask, move = (2**bits - 1) << shift, shift - bits * i
    moved = plane << move if move > 0 else plane >> -move if move < 0 else plane
    return moved if -move == 16 - bits else moved & mask


def _plane_words(codes: Value, bits: int, shift: int) -> Value:
    """Return a bit plane of 32 codes of a row as 32-bit words, one for each bit."""
    narrow = codes if bits == 8 else (codes >> shift) & (2**bits - 1)
    lanes: Value | None = None
    for i in range(16 // bits):
        picked = [2 * _slot(i * bits + j) + odd for j in range(bits) for odd in (0, 1)]
        part = narrow.lanes(picked).to(I16, signed=False) << bits * i
        lanes = part if lanes is None else lanes | part
    assert lanes is not None
    return lanes.bits_as(vec(I32, bits))


# ---- blocks of the file --------------------------------------------------------------------


def _codes(f: Function, source: Value, block: Block, group: int) -> Value:
    """Load the 32 codes of a group from a block of the file, one byte for each."""
    low = _part(f, source, block.low, block.low_bits, group)
    if not block.high:
        return low
    return low | _part(f, source, block.high, block.high_bits, group) << block.low_bits


def _part(f: Function, source: Value, field: Bits, bits: int, group: int) -> Value:
    """Load the bits that a field of the file has of the 32 codes of a group."""
    if field.run == 1:
        word = f.load(I32, source, field.start)
        return word.bits_as(vec(ir.IntType(1), GROUP)).to(I8, signed=False)
    if field.run < GROUP:  # 16 bytes: columns 0-15 in the low nibbles, 16-31 in the high ones
        packed = f.load(vec(I8, 16), source, field.start)
        return (packed & 15).lanes(list(range(GROUP)), packed >> 4)
    run, column = divmod(GROUP * group, field.run * 8 // bits)
    which, byte = divmod(column, field.run)
    packed = f.load(vec(I8, GROUP), source, field.start + run * field.run + byte)
    return packed if bits == 8 else (packed >> bits * which) & (2**bits - 1)


def _byte(f: Function, source: Value, field: Field, i: int) -> Value:
    return f.load(I8, source, field.start + i)


def _bytes_of(field: Field) -> Callable[[Function, Value], list[Value]]:
    return lambda f, source: [_byte(f, source, field, i) for i in range(field.size)]


def _q3_k_scales(f: Function, source: Value) -> list[Value]:
    scales = []
    for i in range(16):
        low = (_byte(f, source, Q3_K.scales, i % 8) >> 4 * (i // 8)) & 15
        high = (_byte(f, source, Q3_K.scales, 8 + i % 4) >> 2 * (i // 4)) & 3
        scales.append((low | high << 4) - 32)
    return scales


def _six_bit_scales_and_minima(field: Field) -> Callable[[Function, Value], list[Value]]:
    def scales(f: Function, source: Value) -> list[Value]:
        low, minima, high = (
            [_byte(f, source, field, at + i) for i in range(4)] for at in (0, 4, 8)
        )
        return [
            *(x & 63 for x in low),
            *((h & 15) | ((x >> 2) & 48) for h, x in zip(high, low, strict=True)),
            *(x & 63 for x in minima),
            *((h >> 4) | ((x >> 2) & 48) for h, x in zip(high, minima, strict=True)),
        ]

    return scales


FORMATS = {
    f.type: f
    for f in (
        Format(Q4_0),
        Format(Q4_1),
        Format(Q5_0),
        Format(Q5_1),
        Format(Q8_0),
        Format(Q2_K, 4, _bytes_of(Q2_K.scales)),
        Format(Q3_K, 8, _q3_k_scales),
        Format(Q4_K, 8, _six_bit_scales_and_minima(Q4_K.scales)),
        Format(Q5_K, 8, _six_bit_scales_and_minima(Q5_K.scales)),
        Format(Q6_K, 8, _bytes_of(Q6_K.scales)),
    )
}
"""The layouts of the quantized types that have kernels, by type."""
