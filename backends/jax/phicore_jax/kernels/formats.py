"""How quantized matrices lie in memory for the kernels, and how blocks of a file become that.

Rows come in strips of 16, one for each lane of a vector, and columns in groups of 32. The codes of
a group are cut into bit planes of 8, 4, 2 or 1 bits. A plane is a few vectors of 16-bit lanes, two
for each row: field i of the two lanes of vector j holds bits of the codes of columns 2p and 2p + 1,
where p = j * 16 / bits + i. So one shift and one mask give 16 rows of a pair of columns, which is
what a dot product of 16-bit numbers takes.

A block of a strip is, for 16 rows: d and dmin (float16), scales and minima (bytes), and then the
planes, group by group. The numbers are those of the file; nothing is rounded.

Sources of the file's blocks: ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from llvmlite import ir

from phicore_jax.kernels.lang import F32, I8, I16, I32, LANES, Function, Value, vec

Type = GGMLQuantizationType
GROUP = 32  # columns that share a scale of the activations
PAIRS = GROUP // 2
ROW_CODES = vec(I8, GROUP)
CODES = vec(I16, 2 * LANES)


@dataclass(frozen=True)
class Format:
    """A quantized type.

    Attributes:
        planes: (bits, shift) of each bit plane: a code is the sum of field << shift.
        offset: What is subtracted from a code; codes of 8 bits are signed and have none.
        subgroups: Scales in a group of 32 columns: 1 or 2.
        has_min: Whether a minimum is subtracted: value = scale * (code - offset) - min.
        scale_bits: 0 if each group has a float16 scale of its own; 8 if super-blocks of 256 have
            one and each subgroup a byte to multiply it with; 4 if scale and minimum share a byte.
        codes: Writes instructions that take 32 codes of a row from a block of the file.
        scales: The same for the bytes: the scales of a block and then the minima.
        halves: Where a block of the file has d and, if there are minima, dmin.
    """

    type: GGMLQuantizationType
    planes: tuple[tuple[int, int], ...]
    offset: int
    subgroups: int
    has_min: bool
    scale_bits: int
    codes: Callable[[Function, Value, int], Value]
    scales: Callable[[Function, Value], list[Value]] | None
    halves: tuple[int, ...]

    # ---- sizes, in bytes -------------------------------------------------------------------

    @property
    def file_block_bytes(self) -> int:
        return int(GGML_QUANT_SIZES[self.type][1])

    @cached_property
    def groups(self) -> int:
        """Groups of 32 columns in a block."""
        return int(GGML_QUANT_SIZES[self.type][0]) // GROUP

    @property
    def columns(self) -> int:
        return self.groups * GROUP

    @property
    def scales_start(self) -> int:
        return 2 * LANES * len(self.halves)

    @property
    def scale_count(self) -> int:
        """Bytes of scales, and of minima if they have their own, of one row's block."""
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
        """d and dmin of 16 rows, float32."""
        return [
            f.target.half_to_float(f.load(vec(I16), block, 2 * LANES * i))
            for i in range(len(self.halves))
        ]

    def group_scales(
        self, f: Function, block: Value, supers: list[Value], group: Value
    ) -> list[tuple[Value, Value | None]]:
        """The scale and the bias (what is added) of 16 rows for each subgroup, float32."""
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
            else:  # of super-blocks, the minimum is subtracted
                m = supers[1] * minimum.to(I32, signed=False).to(F32)
                found.append((s, f.zeros(m.type) - m))
        return found

    def group_codes(self, f: Function, group: Value) -> list[Value]:
        """Codes of 16 rows by 32 columns: for each pair of columns 2 x 16 numbers of 16 bits.

        Unsigned, with the offset still in them; those of 8 bits are signed.
        """
        pairs: list[Value | None] = [None] * PAIRS
        start = 0
        for bits, shift in self.planes:
            fields = 16 // bits
            for j in range(PAIRS // fields):
                plane = f.load(CODES, group, start)
                start += 4 * LANES
                for i in range(fields):
                    field = _field(plane, bits, i, shift)
                    p = j * fields + i
                    known = pairs[p]
                    pairs[p] = field if known is None else known | field
        return [pair for pair in pairs if pair is not None]

    # ---- writing a strip -------------------------------------------------------------------

    def pack_block(self, f: Function, source: Value, block: Value, lane: Value) -> None:
        """Bring a block of a row of the file into a lane of a strip."""
        for i, at in enumerate(self.halves):
            f.store(f.load(I16, source, at), f.offset(block + 2 * LANES * i, lane * 2))
        if self.scales is not None:
            for i, scale in enumerate(self.scales(f, source)):
                f.store(scale, f.offset(block + self.scales_start + i * LANES, lane))
        for g in range(self.groups):
            codes = self.codes(f, source, g)
            start = self.planes_start + g * self.group_bytes
            for bits, shift in self.planes:
                words = _plane_words(codes, bits, shift)
                for j in range(words.type.count):
                    f.store(words.lane(j), f.offset(block + start, lane * 4))
                    start += 4 * LANES


def _field(plane: Value, bits: int, i: int, shift: int) -> Value:
    """Field i of every 16-bit lane, shifted to its place in the code."""
    if bits == 8:  # signed
        return plane.sar(8) if i else (plane << 8).sar(8)
    mask, move = (2**bits - 1) << shift, shift - bits * i
    moved = plane << move if move > 0 else plane >> -move if move < 0 else plane
    return moved if -move == 16 - bits else moved & mask


def _plane_words(codes: Value, bits: int, shift: int) -> Value:
    """The bit plane of 32 codes of a row, as 32-bit words: one for every 32 / bits codes."""
    fields, count = 16 // bits, PAIRS * bits // 16
    narrow = codes if bits == 8 else (codes >> shift) & (2**bits - 1)
    lanes: Value | None = None
    for i in range(fields):
        picked = [2 * (j * fields + i) + odd for j in range(count) for odd in (0, 1)]
        part = narrow.lanes(picked).to(I16, signed=False) << bits * i
        lanes = part if lanes is None else lanes | part
    assert lanes is not None
    return lanes.bits_as(vec(I32, count))


# ---- blocks of the file --------------------------------------------------------------------


def _bytes(f: Function, block: Value, at: int, count: int = GROUP) -> Value:
    return f.load(vec(I8, count), block, at)


def _nibbles(start: int) -> Callable[[Function, Value, int], Value]:
    """16 bytes: columns 0-15 in the low halves, 16-31 in the high ones."""

    def codes(f: Function, block: Value, group: int) -> Value:
        packed = _bytes(f, block, start, 16)
        return (packed & 15).lanes(list(range(32)), packed >> 4)

    return codes


def _nibbles_and_bits(bits_start: int, start: int) -> Callable[[Function, Value, int], Value]:
    low = _nibbles(start)

    def codes(f: Function, block: Value, group: int) -> Value:
        fifth = f.load(I32, block, bits_start).bits_as(vec(ir.IntType(1), 32))
        return low(f, block, group) | fifth.to(I8, signed=False) << 4

    return codes


def _q8_0(f: Function, block: Value, group: int) -> Value:
    return _bytes(f, block, 2)


def _q2_k(f: Function, block: Value, group: int) -> Value:
    return (_bytes(f, block, 16 + 32 * (group // 4)) >> 2 * (group % 4)) & 3


def _q3_k(f: Function, block: Value, group: int) -> Value:
    low = (_bytes(f, block, 32 + 32 * (group // 4)) >> 2 * (group % 4)) & 3
    return low | ((_bytes(f, block, 0) >> group) & 1) << 2


def _q4_k(f: Function, block: Value, group: int) -> Value:
    return (_bytes(f, block, 16 + 32 * (group // 2)) >> 4 * (group % 2)) & 15


def _q5_k(f: Function, block: Value, group: int) -> Value:
    low = (_bytes(f, block, 48 + 32 * (group // 2)) >> 4 * (group % 2)) & 15
    return low | ((_bytes(f, block, 16) >> group) & 1) << 4


def _q6_k(f: Function, block: Value, group: int) -> Value:
    half, quarter = divmod(group, 4)
    low = (_bytes(f, block, 64 * half + 32 * (quarter % 2)) >> 4 * (quarter // 2)) & 15
    return low | ((_bytes(f, block, 128 + 32 * half) >> 2 * quarter) & 3) << 4


def _byte(f: Function, block: Value, at: int) -> Value:
    return f.load(I8, block, at)


def _bytes_from(start: int, count: int) -> Callable[[Function, Value], list[Value]]:
    return lambda f, block: [_byte(f, block, start + i) for i in range(count)]


def _q3_k_scales(f: Function, block: Value) -> list[Value]:
    scales = []
    for i in range(16):
        low = (_byte(f, block, 96 + i % 8) >> 4 * (i // 8)) & 15
        high = (_byte(f, block, 104 + i % 4) >> 2 * (i // 4)) & 3
        scales.append((low | high << 4) - 32)
    return scales


def _six_bit_scales_and_minima(f: Function, block: Value) -> list[Value]:
    low, minima, high = ([_byte(f, block, at + i) for i in range(4)] for at in (4, 8, 12))
    return [
        *(x & 63 for x in low),
        *((h & 15) | ((x >> 2) & 48) for h, x in zip(high, low, strict=True)),
        *(x & 63 for x in minima),
        *((h >> 4) | ((x >> 2) & 48) for h, x in zip(high, minima, strict=True)),
    ]


FORMATS = {
    f.type: f
    for f in (
        Format(Type.Q4_0, ((4, 0),), 8, 1, False, 0, _nibbles(2), None, (0,)),
        Format(Type.Q4_1, ((4, 0),), 0, 1, True, 0, _nibbles(4), None, (0, 2)),
        Format(Type.Q5_0, ((4, 0), (1, 4)), 16, 1, False, 0, _nibbles_and_bits(2, 6), None, (0,)),
        Format(Type.Q5_1, ((4, 0), (1, 4)), 0, 1, True, 0, _nibbles_and_bits(4, 8), None, (0, 2)),
        Format(Type.Q8_0, ((8, 0),), 0, 1, False, 0, _q8_0, None, (0,)),
        Format(Type.Q2_K, ((2, 0),), 0, 2, True, 4, _q2_k, _bytes_from(0, 16), (80, 82)),
        Format(Type.Q3_K, ((2, 0), (1, 2)), 4, 2, False, 8, _q3_k, _q3_k_scales, (108,)),
        Format(Type.Q4_K, ((4, 0),), 0, 1, True, 8, _q4_k, _six_bit_scales_and_minima, (0, 2)),
        Format(
            Type.Q5_K, ((4, 0), (1, 4)), 0, 1, True, 8, _q5_k, _six_bit_scales_and_minima, (0, 2)
        ),
        Format(Type.Q6_K, ((4, 0), (2, 4)), 32, 2, False, 8, _q6_k, _bytes_from(192, 16), (208,)),
    )
}
"""The types that have kernels."""
