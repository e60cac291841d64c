"""A warp of 32 lanes in the language of the kernels: on a GPU, or on this processor for tests.

On a GPU a lane is a thread, and its values are numbers. On a processor the warp is one thread, and
its values are vectors of 32 numbers. A kernel is written once, for a `Warp`, so the tests run the
very source that a GPU runs. What is the same in all lanes may be uniform: a number on both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from phicore_jax.kernels.lang import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    PTR,
    Function,
    Module,
    Value,
    vec,
)

LANES = 32


class Warp(ABC):
    """What the lanes of a warp can do together.

    Attributes:
        f: The function that is being written.
        number: Which warp of all it is, a uniform int32.
        lane: The number of the lane, int32.
    """

    f: Function
    number: Value
    lane: Value

    @abstractmethod
    def spread(self, uniform: Value) -> Value:
        """A uniform value as that of each lane."""

    @abstractmethod
    def uniform(self, element: Any, pointer: Value, index: Value) -> Value:
        """An element, which nobody writes, at a uniform int32."""

    @abstractmethod
    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        """`count` (1, 2 or 4) elements from element `count * index` on, which nobody writes.

        Args:
            index: Each lane's, int32.
        """

    @abstractmethod
    def store(
        self, x: Sequence[Value], pointer: Value, index: Value, where: Value | None = None
    ) -> None:
        """Store each lane's 1, 2 or 4 numbers from element `len(x) * index` on, of those that may.

        Args:
            index: Each lane's, int32.
        """

    @abstractmethod
    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        """acc + the sum of 4 products of bytes of int32; those of b are signed, a's if told."""

    @abstractmethod
    def across(self, x: Value, distance: int) -> Value:
        """The float32 or int32 of the lane whose number differs in one bit, 1, 2, 4, 8 or 16."""

    @abstractmethod
    def of_lane(self, x: Value, lane: int) -> Value:
        """The float32 of a lane, for each."""

    def combine(
        self, x: Value, distances: Sequence[int], how: Callable[[Value, Value], Value]
    ) -> Value:
        """What the lanes have that differ in these bits, combined in pairs; the same for each."""
        for distance in distances:
            x = how(x, self.across(x, distance))
        return x

    def sum(self, x: Value, distances: Sequence[int] = (16, 8, 4, 2, 1)) -> Value:
        return self.combine(x, distances, lambda a, b: a + b)

    def max(self, x: Value, distances: Sequence[int] = (16, 8, 4, 2, 1)) -> Value:
        """The largest float32 that is a number: `maximum` would take eight instructions."""
        return self.combine(x, distances, self.f.larger)


class GPU(Warp):
    """A warp of a GPU."""

    def __init__(self, f: Function, warps_of_block: int) -> None:
        self.f = f
        thread = f.call("llvm.nvvm.read.ptx.sreg.tid.x", I32)
        block = f.call("llvm.nvvm.read.ptx.sreg.ctaid.x", I32)
        self.lane = thread & (LANES - 1)
        self.number = block * warps_of_block + (thread >> 5)
        self._constant = f.module.ir.add_metadata([])

    def spread(self, uniform: Value) -> Value:
        return uniform

    def uniform(self, element: Any, pointer: Value, index: Value) -> Value:
        return self.load(element, pointer, index)[0]

    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        size = _size(element) * count
        shape = vec(element, count) if count > 1 else element
        address = self.f.offset(pointer, index.to(I64, signed=False) * size)
        loaded = self.f.load(shape, address, align=size)
        loaded.ir.set_metadata("invariant.load", self._constant)
        return [loaded.lane(i) for i in range(count)] if count > 1 else [loaded]

    def store(
        self, x: Sequence[Value], pointer: Value, index: Value, where: Value | None = None
    ) -> None:
        size = _size(x[0].type) * len(x)
        address = self.f.offset(pointer, index.to(I64, signed=False) * size)
        together = x[0] if len(x) == 1 else self.f.vector(x)
        if where is None:
            self.f.store(together, address, align=size)
        else:
            with self.f.when(where):
                self.f.store(together, address, align=size)

    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        name = f"llvm.nvvm.idp4a.{'s' if signed else 'u'}.s"
        return self.f.call(name, I32, a, b, acc)

    def across(self, x: Value, distance: int) -> Value:
        return self._shuffle("bfly", x, distance)

    def of_lane(self, x: Value, lane: int) -> Value:
        return self._shuffle("idx", x, lane)

    def _shuffle(self, how: str, x: Value, lane: int) -> Value:
        mask, last = self.f.i32(-1), self.f.i32(LANES - 1)
        name = f"llvm.nvvm.shfl.sync.{how}.{'f32' if x.is_float else 'i32'}"
        return self.f.call(name, x.type, mask, x, self.f.i32(lane), last)


class Host(Warp):
    """A warp on this processor: a vector with a lane for each of its threads."""

    def __init__(self, f: Function, number: Value) -> None:
        self.f = f
        self.number = number
        self.lane = Value(f, ir.Constant(vec(I32, LANES), list(range(LANES))))

    def spread(self, uniform: Value) -> Value:
        return uniform.splat(LANES)

    def uniform(self, element: Any, pointer: Value, index: Value) -> Value:
        return self.f.load(element, self.f.offset(pointer, index.to(I64) * _size(element)))

    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        return [
            self.f.call(f"gather_{element}", vec(element, LANES), pointer, index * count + i)
            for i in range(count)
        ]

    def store(
        self, x: Sequence[Value], pointer: Value, index: Value, where: Value | None = None
    ) -> None:
        if where is None:
            where = Value(self.f, ir.Constant(vec(I1, LANES), [1] * LANES))
        allowed = where.to(I8)
        for i, number in enumerate(x):
            name, at = f"scatter_{number.type.element}", index * len(x) + i
            self.f.call(name, ir.VoidType(), number, pointer, at, allowed)

    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        for i in range(4):
            x, y = a << (24 - 8 * i), b << (24 - 8 * i)
            acc = acc + (x.sar(24) if signed else x >> 24) * y.sar(24)
        return acc

    def across(self, x: Value, distance: int) -> Value:
        return x.lanes([i ^ distance for i in range(LANES)])

    def of_lane(self, x: Value, lane: int) -> Value:
        return x.lanes([lane] * LANES)

    @staticmethod
    def emit_functions(module: Module) -> None:
        """Write the functions that `load` and `store` call."""
        indices = vec(I32, LANES)
        for element in (I8, I16, I32, F16, F32):
            size, shape = _size(element), vec(element, LANES)

            def gather(
                f: Function, pointer: Value, index: Value, element: Any = element, size: int = size
            ) -> Value:
                numbers, found = f.buffer(4 * LANES), f.buffer(size * LANES)
                f.store(index, numbers)
                with f.loop(LANES) as i:
                    at = f.load(I32, f.offset(numbers, i * 4)).to(I64)
                    one = f.load(element, f.offset(pointer, at * size))
                    f.store(one, f.offset(found, i * size))
                return f.load(vec(element, LANES), found)

            def scatter(
                f: Function,
                x: Value,
                pointer: Value,
                index: Value,
                where: Value,
                element: Any = element,
                size: int = size,
            ) -> None:
                numbers, values, allowed = (f.buffer(n * LANES) for n in (4, size, 1))
                for value, memory in ((index, numbers), (x, values), (where, allowed)):
                    f.store(value, memory)
                with f.loop(LANES) as i, f.when(f.load(I8, f.offset(allowed, i)).to(I1)):
                    at = f.load(I32, f.offset(numbers, i * 4)).to(I64)
                    one = f.load(element, f.offset(values, i * size))
                    f.store(one, f.offset(pointer, at * size))

            name = f"gather_{element}"
            module.function(name, [PTR, indices], gather, shape, exported=False)
            name, arguments = f"scatter_{element}", [shape, PTR, indices, vec(I8, LANES)]
            module.function(name, arguments, scatter, exported=False)


def _size(element: Any) -> int:
    """Bytes."""
    return {F16: 2, F32: 4}.get(element) or int(element.width) // 8
