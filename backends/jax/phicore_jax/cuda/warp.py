"""A warp of 32 lanes in the language of the kernels: on a card, or on this processor for tests.

On a card a lane is a thread, and its values are numbers. On a processor the warp is one thread, and
its values are vectors of 32 numbers. A kernel is written once, for a `Warp`, so the tests run the
very source that a card runs. Values that are the same in all lanes are called uniform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from llvmlite import ir

from phicore_jax.kernels.lang import F32, I16, I32, I64, PTR, Function, Module, Value, vec

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
    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        """`count` (1, 2 or 4) elements from element `count * index` on, which nobody writes.

        Args:
            index: Each lane's, int32.
        """

    @abstractmethod
    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        """acc + the sum of 4 products of bytes of int32; those of b are signed, a's if told."""

    @abstractmethod
    def sum(self, x: Value) -> Value:
        """The sum over the lanes of float32, uniform, added in pairs of lanes 16, 8, ... apart."""

    @abstractmethod
    def store(self, x: Value, pointer: Value, index: Value) -> None:
        """Store a uniform float32 at element `index`, a uniform int32."""


class Card(Warp):
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

    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        size = element.width // 8 * count
        shape = vec(element, count) if count > 1 else element
        address = self.f.offset(pointer, index.to(I64, signed=False) * size)
        loaded = self.f.load(shape, address, align=size)
        loaded.ir.set_metadata("invariant.load", self._constant)
        return [loaded.lane(i) for i in range(count)] if count > 1 else [loaded]

    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        name = f"llvm.nvvm.idp4a.{'s' if signed else 'u'}.s"
        return self.f.call(name, I32, a, b, acc)

    def sum(self, x: Value) -> Value:
        for distance in (16, 8, 4, 2, 1):
            mask, last = self.f.i32(-1), self.f.i32(31)
            name = "llvm.nvvm.shfl.sync.bfly.f32"
            x = x + self.f.call(name, F32, mask, x, self.f.i32(distance), last)
        return x

    def store(self, x: Value, pointer: Value, index: Value) -> None:
        with self.f.when(self.lane.equals(0)):
            self.f.store(x, self.f.offset(pointer, index.to(I64) * 4), align=4)


class Host(Warp):
    """The same on this processor."""

    def __init__(self, f: Function, number: Value) -> None:
        self.f = f
        self.number = number
        self.lane = Value(f, ir.Constant(vec(I32, LANES), list(range(LANES))))

    def spread(self, uniform: Value) -> Value:
        return uniform.splat(LANES)

    def load(self, element: Any, pointer: Value, index: Value, count: int = 1) -> list[Value]:
        return [
            self.f.call(f"gather_{element}", vec(element, LANES), pointer, index * count + i)
            for i in range(count)
        ]

    def dot4(self, acc: Value, a: Value, b: Value, *, signed: bool) -> Value:
        for i in range(4):
            x, y = a << (24 - 8 * i), b << (24 - 8 * i)
            acc = acc + (x.sar(24) if signed else x >> 24) * y.sar(24)
        return acc

    def sum(self, x: Value) -> Value:
        return self.f.sum_of_lanes(x)

    def store(self, x: Value, pointer: Value, index: Value) -> None:
        self.f.store(x, self.f.offset(pointer, index.to(I64) * 4), align=4)

    @staticmethod
    def emit_gathers(module: Module) -> None:
        """The functions that `load` calls."""
        for element in (I16, I32):

            def gather(f: Function, pointer: Value, index: Value, element: Any = element) -> Value:
                size = element.width // 8
                numbers, found = f.buffer(4 * LANES), f.buffer(size * LANES)
                f.store(index, numbers)
                with f.loop(LANES) as i:
                    at = f.load(I32, f.offset(numbers, i * 4)).to(I64)
                    one = f.load(element, f.offset(pointer, at * size))
                    f.store(one, f.offset(found, i * size))
                return f.load(vec(element, LANES), found)

            name, shape = f"gather_{element}", vec(element, LANES)
            module.function(name, [PTR, vec(I32, LANES)], gather, shape, exported=False)
