"""A small language for vector kernels: Python that writes LLVM IR.

A kernel is a Python function that is run once, with symbols in place of numbers, and leaves behind
the instructions for them: Python loops are unrolled, `Function.loop` makes one that runs. Vectors
are as wide as the kernel likes; LLVM cuts them to what the processor has. So one source serves
every instruction set, but for the few operations of `Target`, which have a name on some processors
and are spelled out on the others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()
VOID = ir.VoidType()


def f32_bits(x: float) -> int:
    """A float32 number as the integer of the same bits."""
    return int.from_bytes(struct.pack("<f", x), "little")


LANES = 16  # rows of a matrix that a vector holds


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


Operand = Any
"""A `Value`, or a Python number that becomes a constant of the other operand's type."""


class Value:
    """A number, vector or pointer of a kernel, with operators. Shifts to the right are unsigned."""

    __slots__ = ("f", "ir")

    def __init__(self, f: Function, value: ir.Value) -> None:
        self.f = f
        self.ir = value

    @property
    def type(self) -> Any:
        return self.ir.type

    @property
    def is_float(self) -> bool:
        return isinstance(_element(self.type), (ir.FloatType, ir.HalfType))

    def _binary(self, other: Operand, name: str, float_name: str | None = None) -> Value:
        b = self.f.builder
        op = float_name if self.is_float and float_name else name
        return Value(self.f, getattr(b, op)(self.ir, self.f.like(self, other).ir))

    def __add__(self, other: Operand) -> Value:
        if isinstance(self.type, ir.PointerType):
            return self.f.offset(self, other)
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Operand) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Operand) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Operand) -> Value:
        return self._binary(other, "udiv", "fdiv")

    def __floordiv__(self, other: Operand) -> Value:
        return self._binary(other, "udiv")

    def __mod__(self, other: Operand) -> Value:
        return self._binary(other, "urem")

    def __and__(self, other: Operand) -> Value:
        return self._binary(other, "and_")

    def __or__(self, other: Operand) -> Value:
        return self._binary(other, "or_")

    def __xor__(self, other: Operand) -> Value:
        return self._binary(other, "xor")

    def __lshift__(self, other: Operand) -> Value:
        return self._binary(other, "shl")

    def __rshift__(self, other: Operand) -> Value:
        return self._binary(other, "lshr")

    def sar(self, bits: int) -> Value:
        """Shift to the right, sign kept."""
        return self._binary(bits, "ashr")

    def compare(self, op: str, other: Operand) -> Value:
        b = self.f.builder
        compare = b.fcmp_ordered if self.is_float else b.icmp_signed
        return Value(self.f, compare(op, self.ir, self.f.like(self, other).ir))

    def __lt__(self, other: Operand) -> Value:
        return self.compare("<", other)

    def __le__(self, other: Operand) -> Value:
        return self.compare("<=", other)

    def __gt__(self, other: Operand) -> Value:
        return self.compare(">", other)

    def __ge__(self, other: Operand) -> Value:
        return self.compare(">=", other)

    def equals(self, other: Operand) -> Value:
        return self.compare("==", other)

    def select(self, yes: Operand, no: Operand) -> Value:
        """`yes` where this condition is true, else `no`."""
        yes = yes if isinstance(yes, Value) else self.f.like(no, yes)
        return Value(self.f, self.f.builder.select(self.ir, yes.ir, self.f.like(yes, no).ir))

    # ---- conversions -----------------------------------------------------------------------

    def to(self, element: ir.Type, signed: bool = True) -> Value:
        """Convert the numbers to another type: widened, narrowed, or rounded toward zero."""
        b, source = self.f.builder, _element(self.type)
        target = _with_element(self.type, element)
        if self.type == target:
            return self
        if self.is_float and isinstance(element, ir.IntType):
            name = "fptosi" if signed else "fptoui"
        elif isinstance(element, ir.IntType):
            wider = element.width > source.width
            name = ("sext" if signed else "zext") if wider else "trunc"
        elif self.is_float:
            name = "fpext" if isinstance(element, ir.FloatType) else "fptrunc"
        else:
            name = "sitofp" if signed else "uitofp"
        return Value(self.f, getattr(b, name)(self.ir, target))

    def bits_as(self, target: ir.Type) -> Value:
        """Read the bits as another type of the same size."""
        return Value(self.f, self.f.builder.bitcast(self.ir, target))

    def splat(self, lanes: int = LANES) -> Value:
        """A vector that holds this number in every lane."""
        b, wide = self.f.builder, vec(self.type, lanes)
        first = b.insert_element(ir.Constant(wide, ir.Undefined), self.ir, I32(0))
        zeros = ir.Constant(vec(I32, lanes), [0] * lanes)
        return Value(self.f, b.shuffle_vector(first, ir.Constant(wide, ir.Undefined), zeros))

    def lanes(self, indices: Sequence[int], other: Value | None = None) -> Value:
        """The lanes of these numbers, of this vector and then of `other`."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.ir
        mask = ir.Constant(vec(I32, len(indices)), list(indices))
        return Value(self.f, self.f.builder.shuffle_vector(self.ir, second, mask))

    def lane(self, index: Operand) -> Value:
        index = index.ir if isinstance(index, Value) else I32(index)
        return Value(self.f, self.f.builder.extract_element(self.ir, index))


def joined(vectors: Sequence[Value]) -> Value:
    """The lanes of vectors of the same size, one after the other; a power of two of them."""
    while len(vectors) > 1:
        n = 2 * vectors[0].type.count
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [a.lanes(list(range(n)), b) for a, b in pairs]
    return vectors[0]


def _element(t: ir.Type) -> Any:
    return t.element if isinstance(t, ir.VectorType) else t


def _with_element(t: ir.Type, element: ir.Type) -> ir.Type:
    return vec(element, t.count) if isinstance(t, ir.VectorType) else element


class Variable:
    """A number or vector that changes in a loop."""

    def __init__(self, f: Function, initial: Value) -> None:
        self._f = f
        with f.builder.goto_entry_block():
            self._slot = f.builder.alloca(initial.type)
        self._type = initial.type
        self.value = initial

    @property
    def value(self) -> Value:
        return Value(self._f, self._f.builder.load(self._slot, typ=self._type))

    @value.setter
    def value(self, new: Value) -> None:
        self._f.builder.store(new.ir, self._slot)


class Target:
    """The instruction set: operations that not every processor has under one name.

    Attributes:
        name: `avx512vnni`, `avxvnni`, `avx2`, `neon` or `generic`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def is_x86(self) -> bool:
        return self.name in ("avx512vnni", "avxvnni", "avx2")

    @property
    def has_byte_dot(self) -> bool:
        """Whether sums of products of bytes are faster than those of 16-bit numbers."""
        return self.name in ("avx512vnni", "avxvnni")

    @property
    def tile(self) -> int:
        """Rows of activations for which a product of two strips keeps its sums in registers."""
        return {"avx512vnni": 6, "neon": 3}.get(self.name, 2)

    @property
    def fused_tile(self) -> int:
        """Rows of activations for which a product of one strip, decoded in registers, does so."""
        return {"avx512vnni": 8, "neon": 4}.get(self.name, 3)

    def dot_pairs(self, acc: Value, x: Value, y: Value) -> Value:
        """acc + x0 * y0 + x1 * y1 in every 32-bit lane, of signed 16-bit numbers x and y."""
        f = acc.f
        if self.name == "avx512vnni":
            return f.call("llvm.x86.avx512.vpdpwssd.512", acc.type, acc, *_as_arguments(f, x, y))
        if self.name == "avxvnni":
            return _in_halves(f, "llvm.x86.avx512.vpdpwssd.256", acc, x, y)
        wide = vec(I16, 2 * LANES)
        x, y = x.bits_as(wide), y.bits_as(wide)
        if self.name == "avx2":
            return acc + _halved(f, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), x, y)
        even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
        x0, x1 = (x.lanes(list(i)).to(I32) for i in (even, odd))
        y0, y1 = (y.lanes(list(i)).to(I32) for i in (even, odd))
        return acc + x0 * y0 + x1 * y1

    def dot_bytes(self, acc: Value, codes: Value, y: Value) -> Value:
        """acc + the sum of 4 products in every 32-bit lane, unsigned codes by signed bytes."""
        if self.name == "avx512vnni":
            return acc.f.call("llvm.x86.avx512.vpdpbusd.512", acc.type, acc, codes, y)
        return _in_halves(acc.f, "llvm.x86.avx512.vpdpbusd.256", acc, codes, y)

    def half_to_float(self, bits: Value) -> Value:
        """Numbers of float16, given as their bits, in float32."""
        if self.name != "generic":
            half = vec(F16, bits.type.count)
            return bits.bits_as(half).to(F32)
        wide = bits.to(I32, signed=False)
        size, floats = wide & 0x7FFF, vec(F32, bits.type.count)
        number = (size << 13) + (112 << 23)  # exponents differ by 112
        number = (size >= 0x7C00).select(number | 0x7F800000, number)
        # by way of an integer: XLA lets processors take subnormal numbers for 0
        subnormal = (size.to(F32) * 2.0**-24).bits_as(wide.type)
        number = (size < 0x400).select(subnormal, number)
        return (number | (wide & 0x8000) << 16).bits_as(floats)

    def float_to_half(self, x: Value) -> Value:
        """The bits of numbers rounded to float16 (to nearest, ties to even)."""
        shape = vec(I16, x.type.count)
        if self.name != "generic":
            return x.to(F16).bits_as(shape)
        bits = x.bits_as(vec(I32, x.type.count))
        size, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
        # a normal half: round the mantissa to 10 bits; a subnormal one: let the adder do it
        normal = (size + 0xFFF + ((size >> 13) & 1) - (112 << 23)) >> 13
        magic = f32_bits(0.5)
        small = (size.bits_as(x.type) + 0.5).bits_as(bits.type) - magic
        half = (size < 113 << 23).select(small, normal)
        half = (size >= 143 << 23).select(0x7C00, half)
        half = (size > 255 << 23).select(0x7E00, half)  # NaN
        return (half | sign).to(I16)

    def float_control(self, f: Function) -> Value:
        """How this thread rounds, and whether it takes subnormal numbers for 0, as XLA's do."""
        if self.is_x86:
            word = f.buffer(4)
            f.call("llvm.x86.sse.stmxcsr", VOID, word)
            return f.load(I32, word).to(I64)
        return f.call("llvm.aarch64.get.fpcr", I64) if self.name == "neon" else f.i64(0)

    def set_float_control(self, f: Function, control: Value) -> None:
        """Compute as the thread does whose `float_control` this is."""
        if self.is_x86:
            word = f.buffer(4)
            f.store(control.to(I32), word)
            f.call("llvm.x86.sse.ldmxcsr", VOID, word)
        elif self.name == "neon":
            f.call("llvm.aarch64.set.fpcr", VOID, control)

    def pause(self, f: Function) -> None:
        """Tell the processor that this thread only waits."""
        if self.is_x86:
            f.call("llvm.x86.sse2.pause", VOID)
        elif self.name == "neon":
            f.call("llvm.aarch64.hint", VOID, f.i32(1))


def _as_arguments(f: Function, *vectors: Value) -> list[Value]:
    return [v.bits_as(vec(I32)) for v in vectors]


def _halved(f: Function, name: str, result: ir.Type, *vectors: Value) -> Value:
    """Apply an operation that takes half as many lanes."""
    halves = []
    for half in range(2):
        parts = []
        for v in vectors:
            n = v.type.count // 2
            parts.append(v.lanes(list(range(half * n, half * n + n))))
        halves.append(f.call(name, result, *parts))
    return halves[0].lanes(list(range(LANES)), halves[1])


def _in_halves(f: Function, name: str, acc: Value, x: Value, y: Value) -> Value:
    return _halved(f, name, vec(I32, 8), acc, *_as_arguments(f, x, y))


class Module:
    """Functions that are compiled together."""

    def __init__(self, target: Target) -> None:
        self.ir = ir.Module()
        self.target = target

    def function(
        self,
        name: str,
        params: Sequence[ir.Type],
        body: Callable[..., Any],
        result: ir.Type = VOID,
        exported: bool = True,
    ) -> ir.Function:
        """Define a function; `body(f, *values)` writes its instructions and returns its result."""
        function = ir.Function(self.ir, ir.FunctionType(result, list(params)), name)
        if not exported:
            function.linkage = "internal"
        f = Function(self, function)
        returned = body(f, *(Value(f, a) for a in function.args))
        if not f.builder.block.is_terminated:
            if returned is None:
                f.builder.ret_void()
            else:
                f.builder.ret(returned.ir)
        return function


class Function:
    """A function being written."""

    def __init__(self, module: Module, function: ir.Function) -> None:
        self.module = module
        self.target = module.target
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    # ---- constants -------------------------------------------------------------------------

    def i32(self, n: int) -> Value:
        return Value(self, I32(n))

    def i64(self, n: int) -> Value:
        return Value(self, I64(n))

    def zeros(self, t: ir.Type) -> Value:
        return Value(self, ir.Constant(t, None))

    def f32(self, x: float) -> Value:
        return Value(self, ir.Constant(F32, x))

    def vector(self, numbers: Sequence[Value]) -> Value:
        """A vector of numbers of one type."""
        found = ir.Constant(vec(numbers[0].type, len(numbers)), ir.Undefined)
        for i, number in enumerate(numbers):
            found = self.builder.insert_element(found, number.ir, I32(i))
        return Value(self, found)

    def null(self) -> Value:
        return Value(self, ir.Constant(PTR, None))

    def is_not_null(self, pointer: Value) -> Value:
        number = self.builder.ptrtoint(pointer.ir, I64)
        return Value(self, self.builder.icmp_unsigned("!=", number, I64(0)))

    def address_of(self, named: ir.Function | ir.GlobalVariable) -> Value:
        """The address of a function or a global variable, as a pointer of any type."""
        return Value(self, _Address(named))

    def like(self, model: Value, x: Operand) -> Value:
        """`x` as the type of `model`, if it is a Python number."""
        if isinstance(x, Value):
            return x
        t = model.type
        if isinstance(t, ir.VectorType):
            return Value(self, ir.Constant(t, [x] * t.count))
        return Value(self, ir.Constant(t, x))

    # ---- memory ----------------------------------------------------------------------------

    def offset(self, pointer: Value, offset: Operand) -> Value:
        """A pointer some bytes further."""
        if isinstance(offset, int) and offset == 0:
            return pointer
        offset = offset.ir if isinstance(offset, Value) else I64(offset)
        return Value(self, self.builder.gep(pointer.ir, [offset], source_etype=I8))

    def load(self, t: ir.Type, pointer: Value, offset: Operand = 0, align: int = 1) -> Value:
        address = self.offset(pointer, offset)
        return Value(self, self.builder.load(address.ir, typ=t, align=align))

    def store(self, value: Value, pointer: Value, offset: Operand = 0, align: int = 1) -> None:
        self.builder.store(value.ir, self.offset(pointer, offset).ir, align=align)

    def buffer(self, size: int) -> Value:
        """Memory of a function call, of constant size, aligned for vectors."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(I8, size))
            slot.align = 64
            slot.type = PTR  # llvmlite makes a typed pointer
        return Value(self, slot)

    def pack(self, *values: Value) -> Value:
        """Memory with these 64-bit values, for the arguments of a job."""
        packed = self.buffer(8 * len(values))
        for i, value in enumerate(values):
            self.store(value, packed, 8 * i)
        return packed

    def align(self, pointer: Value, to: int) -> Value:
        """The next address that is a multiple of `to`."""
        number = Value(self, self.builder.ptrtoint(pointer.ir, I64))
        return self.offset(pointer, (self.i64(0) - number) & (to - 1))

    def prefetch(self, pointer: Value, offset: Operand) -> None:
        """Ask for the line at an address that may lie beyond the end of the data."""
        one, address = I32(1), self.offset(pointer, offset)
        f = self._intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
        self.builder.call(f, [address.ir, I32(0), I32(3), one])

    # ---- control ---------------------------------------------------------------------------

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    @contextmanager
    def loop(self, stop: Operand, start: Operand = 0, step: int = 1) -> Iterator[Value]:
        """Run the block for start, start + step, ... below stop (int64)."""
        i = self.variable(self.like(self.i64(0), start))
        condition, body, end = (self.builder.append_basic_block() for _ in range(3))
        self.builder.branch(condition)
        self.builder.position_at_end(condition)
        self.builder.cbranch((i.value < stop).ir, body, end)
        self.builder.position_at_end(body)
        yield i.value
        i.value = i.value + step
        self.builder.branch(condition)
        self.builder.position_at_end(end)

    @contextmanager
    def repeat_while(self, condition: Callable[[], Value]) -> Iterator[None]:
        check, body, end = (self.builder.append_basic_block() for _ in range(3))
        self.builder.branch(check)
        self.builder.position_at_end(check)
        self.builder.cbranch(condition().ir, body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(check)
        self.builder.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def if_else(self, condition: Value) -> Iterator[Any]:
        """`with f.if_else(condition) as (yes, no)`, and in it `with yes` and `with no`."""
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    # ---- calls -----------------------------------------------------------------------------

    def _intrinsic(self, name: str, result: ir.Type, params: list[ir.Type]) -> ir.Function:
        found = self.module.ir.globals.get(name)
        if found is None:
            found = ir.Function(self.module.ir, ir.FunctionType(result, params), name)
        return found

    def call(self, name: str, result: ir.Type, *args: Value) -> Value:
        """Call an LLVM intrinsic, a C function, or a function of this module."""
        function = self._intrinsic(name, result, [a.type for a in args])
        return Value(self, self.builder.call(function, [a.ir for a in args]))

    def call_pointer(self, pointer: Value, *args: Value) -> None:
        """Call a function without result by its address."""
        callee = _Callee(pointer.ir, ir.FunctionType(VOID, [a.type for a in args]))
        self.builder.call(callee, [a.ir for a in args])

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, rounded once where the processor can."""
        return self.call("llvm.fmuladd" + suffix(x.type), x.type, x, y, z)

    def maximum(self, x: Value, y: Value) -> Value:
        """The larger one; NaN if either is."""
        return self.call("llvm.maximum" + suffix(x.type), x.type, x, y)

    def larger(self, x: Value, y: Value) -> Value:
        """The larger one; where one is NaN, the other."""
        return self.call("llvm.maxnum" + suffix(x.type), x.type, x, y)

    def absolute(self, x: Value) -> Value:
        return self.call("llvm.fabs" + suffix(x.type), x.type, x)

    def round_even(self, x: Value) -> Value:
        # rint, not roundeven: not every C library has the latter, for processors without either
        return self.call("llvm.rint" + suffix(x.type), x.type, x)

    def sum_of_lanes(self, x: Value) -> Value:
        """The sum of a vector's lanes, added in pairs."""
        return self._reduce(x, lambda a, b: a + b)

    def maximum_of_lanes(self, x: Value) -> Value:
        return self._reduce(x, self.maximum)

    def _reduce(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        odd: list[Value] = []
        n = x.type.count
        while n > 1:
            if n % 2:
                odd.append(x.lane(n - 1))
            n //= 2
            x = combine(x.lanes(list(range(n))), x.lanes(list(range(n, 2 * n))))
        result = x.lane(0)
        for value in odd:
            result = combine(result, value)
        return result


class _Callee:
    """An address that is called; llvmlite asks a callee for its type, which pointers have not."""

    def __init__(self, pointer: ir.Value, function_type: ir.FunctionType) -> None:
        self.type = pointer.type
        self.function_type = function_type
        self.get_reference = pointer.get_reference


def suffix(t: ir.Type) -> str:
    """An overloaded intrinsic's type, as in `llvm.fabs.v16f32`."""
    if isinstance(t, ir.VectorType):
        return f".v{t.count}{suffix(t.element)[1:]}"
    if isinstance(t, ir.IntType):
        return f".i{t.width}"
    return ".f32" if isinstance(t, ir.FloatType) else ".f16"


class _Address:
    """A function or a global variable as an operand; llvmlite gives them typed pointers."""

    def __init__(self, named: ir.Function | ir.GlobalVariable) -> None:
        self.type = PTR
        self.get_reference = named.get_reference
