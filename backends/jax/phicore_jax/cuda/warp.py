"""Operations of a warp of 32 lanes, in which GPU kernels are written; tests run them on a CPU.

On a GPU, a lane is a thread, and a value is a scalar. On a CPU, the whole warp is one thread, and a
value is a vector of 32 numbers. A kernel is written once, for a `Warp`, so the tests run the source
that a GPU runs. A value that is equal in all lanes may be uniform, which is a scalar on both.
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
    """A warp, whose methods write code into the function of a kernel.

    Attributes:
        f: The function that is being written.
        number: The index of the warp among all warps of the launch, a uniform int32.
        lane: The index of the lane in the warp, int32.
    """

    f: Function
    number: Value
    lane: Value

    @abstractmethod
    def spread(self, uniform: Value) -> Value:
        """Turn a uniform value into a value of each lane."""

    @abstractmethod
    def uniform(self, element: Any, pointer: Value, index: Value) -> Value:
        """Load element `index`, a uniform int32, which the kernel must not write."""

    @abstractmethod
    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        """Load `count` (1, 2 or 4) elements into each lane, from element `count * index` on.

        The kernel must not write these elements.

        Args:
            index: An int32 of each lane.
        """

    @abstractmethod
    def store(
        self, x: Sequence[Value], pointer: Value, index: Value, where: Value | None = None
    ) -> None:
        """Store 1, 2 or 4 numbers of each lane, from element `len(x) * index` on.

        Args:
            index: An int32 of each lane.
            where: Whether a lane stores its numbers; None: every lane does.
        """

    @abstractmethod
    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        """Return acc plus the dot product of the 4 bytes of a and of b; all are int32.

        Args:
            signed: Whether the bytes of a are signed. Those of b always are.
        """

    @abstractmethod
    def across(self, x: Value, distance: int) -> Value:
        """Return the x of the lane whose index differs from this lane's in one bit.

        Args:
            x: A float32 or int32 of each lane.
            distance: The value of the bit: 1, 2, 4, 8 or 16.
        """

    @abstractmethod
    def of_lane(self, x: Value, lane: int) -> Value:
        """Return the x of one lane, a float32, to each lane."""

    def combine(
        self, x: Value, distances: Sequence[int], how: Callable[[Value, Value], Value]
    ) -> Value:
        """Combine x over the lanes whose indices differ only in these bits; each gets the result.

        Args:
            distances: The values of the bits: some of 1, 2, 4, 8 and 16.
            how: A commutative function of two values.
        """
        for distance in distances:
            x = how(x, self.across(x, distance))
        return x

    def sum(self, x: Value, distances: Sequence[int] = (16, 8, 4, 2, 1)) -> Value:
        return self.combine(x, distances, lambda a, b: a + b)

    def max(self, x: Value, distances: Sequence[int] = (16, 8, 4, 2, 1)) -> Value:
        """Return the largest float32 and ignore NaN.

        LLVM's `maximum`, which returns NaN where there is one, would take eight instructions.
        """
        return self.combine(x, distances, self.f.larger)


class GPU(Warp):
    """A warp on a GPU."""

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
    """A warp on a CPU: a value is a vector with an element for each lane."""

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
    """Return the size of an element in bytes."""
    return {F16: 2, F32: 4}.get(element) or int(element.width) // 8
