"""A small language for vector kernels: Python that writes LLVM IR.

A kernel is a Python function that runs once, on symbols instead of numbers, and writes the
instructions that compute with them. So Python loops are unrolled; `Function.loop` writes a loop
that runs. Vectors may have any width, since LLVM splits them to fit the processor's registers. So
one source serves every instruction set. Only the few operations of `Target` differ: some
processors have an instruction for them, and on others they take several.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()
VOID = ir.VoidType()


def f32_bits(x: float) -> int:
    """Return the bits of a float32 number as an integer."""
    return int.from_bytes(struct.pack("<f", x), "little")


LANES = 16  # rows of a matrix that a vector holds


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


Operand = Any
"""A `Value`, or a Python number that becomes a constant of the other operand's type."""


class Value:
    """A number, vector or pointer of a kernel, with Python's operators.

    On integers `/`, `//`, `%` and `>>` are unsigned, and comparisons are signed.
    """

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
        """Shift to the right and keep the sign."""
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
        """Return `yes` where this condition is true, else `no`."""
        yes = yes if isinstance(yes, Value) else self.f.like(no, yes)
        return Value(self.f, self.f.builder.select(self.ir, yes.ir, self.f.like(yes, no).ir))

    # ---- conversions -----------------------------------------------------------------------

    def to(self, element: ir.Type, signed: bool = True) -> Value:
        """Convert the numbers to another type; floats become integers by rounding toward zero."""
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
        """Reinterpret the bits as another type of equal size."""
        return Value(self.f, self.f.builder.bitcast(self.ir, target))

    def splat(self, lanes: int = LANES) -> Value:
        """Return a vector that holds this number in every lane."""
        b, wide = self.f.builder, vec(self.type, lanes)
        first = b.insert_element(ir.Constant(wide, ir.Undefined), self.ir, I32(0))
        zeros = ir.Constant(vec(I32, lanes), [0] * lanes)
        return Value(self.f, b.shuffle_vector(first, ir.Constant(wide, ir.Undefined), zeros))

    def lanes(self, indices: Sequence[int], other: Value | None = None) -> Value:
        """Return the lanes with these indices, which count through this vector and then `other`."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.ir
        mask = ir.Constant(vec(I32, len(indices)), list(indices))
        return Value(self.f, self.f.builder.shuffle_vector(self.ir, second, mask))

    def lane(self, index: Operand) -> Value:
        index = index.ir if isinstance(index, Value) else I32(index)
        return Value(self.f, self.f.builder.extract_element(self.ir, index))


def joined(vectors: Sequence[Value]) -> Value:
    """Concatenate vectors of equal size; the number of vectors must be a power of two."""
    while len(vectors) > 1:
        n = 2 * vectors[0].type.count
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [a.lanes(list(range(n)), b) for a, b in pairs]
    return vectors[0]


def sums_in_pairs(
    n: int, terms: Callable[[int], list[Value]], odd: tuple[Callable[[], list[Value]], ...] = ()
) -> list[Value]:
    """Return the sums of terms(0), ..., terms(n - 1), in the order of `Function.sum_of_lanes`.

    So a sum over vectors has the bits of a sum over lanes. Terms are computed as late as possible:
    few of them are in registers at a time.

    Args:
        terms: Returns the terms with this index of all sums.
        odd: Terms without a partner, which are added at the end.
    """

    def added(x: list[Value], y: list[Value]) -> list[Value]:
        return [a + b for a, b in zip(x, y, strict=True)]

    if n == 1:
        return reduce(added, (term() for term in odd), terms(0))
    if n % 2:
        odd = (*odd, lambda: terms(n - 1))
    half = n // 2
    return sums_in_pairs(half, lambda i: added(terms(i), terms(i + half)), odd)


def _element(t: ir.Type) -> Any:
    return t.element if isinstance(t, ir.VectorType) else t


def _with_element(t: ir.Type, element: ir.Type) -> ir.Type:
    return vec(element, t.count) if isinstance(t, ir.VectorType) else element


class Variable:
    """A number or vector of a kernel that can be assigned anew, for example in a loop."""

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
    """An instruction set, with the operations that are written differently for each.

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
        """Say whether the target has `dot_bytes`, which is faster than `dot_pairs`."""
        return self.name in ("avx512vnni", "avxvnni")

    @property
    def has_byte_pairs(self) -> bool:
        """Say whether the target has `dot_byte_pairs`, which is faster than `dot_pairs`."""
        return self.name == "avx2"

    def dot_pairs(self, acc: Value, x: Value, y: Value) -> Value:
        """Return acc + x0 * y0 + x1 * y1 in every 32-bit lane, of signed 16-bit numbers x and y."""
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
        """Return acc + 4 products in every 32-bit lane, of unsigned bytes `codes` and signed y."""
        if self.name == "avx512vnni":
            return acc.f.call("llvm.x86.avx512.vpdpbusd.512", acc.type, acc, codes, y)
        return _in_halves(acc.f, "llvm.x86.avx512.vpdpbusd.256", acc, codes, y)

    def dot_byte_pairs(self, codes: Value, y: Value) -> Value:
        """Return the sum of 2 products in every 16-bit lane, of unsigned bytes and signed y."""
        codes, y = (v.bits_as(vec(I8, 4 * LANES)) for v in (codes, y))
        return _halved(codes.f, "llvm.x86.avx2.pmadd.ub.sw", vec(I16, LANES), codes, y)

    def in_order(self, values: Sequence[Value]) -> list[Value]:
        """Return the same vectors, which nothing uses until (nearly) all of them are computed.

        LLVM would finish one sum after the other, and keep what they share in memory meanwhile.
        """
        if self.name != "avx2":
            return list(values)
        found, most = [], 6  # of the 16 registers, 12
        for start in range(0, len(values), most):
            found += _tied(values[start : start + most])
        return found

    def half_to_float(self, bits: Value) -> Value:
        """Convert float16 numbers, given as their bits, to float32."""
        if self.name != "generic":
            half = vec(F16, bits.type.count)
            return bits.bits_as(half).to(F32)
        wide = bits.to(I32, signed=False)
        size, floats = wide & 0x7FFF, vec(F32, bits.type.count)
        number = (size << 13) + (112 << 23)  # the exponents' biases differ by 112
        number = (size >= 0x7C00).select(number | 0x7F800000, number)
        # converted as an integer, because XLA's threads treat subnormal numbers as 0
        subnormal = (size.to(F32) * 2.0**-24).bits_as(wide.type)
        number = (size < 0x400).select(subnormal, number)
        return (number | (wide & 0x8000) << 16).bits_as(floats)

    def float_to_half(self, x: Value) -> Value:
        """Round numbers to float16 (to nearest, ties to even) and return their bits."""
        shape = vec(I16, x.type.count)
        if self.name != "generic":
            return x.to(F16).bits_as(shape)
        bits = x.bits_as(vec(I32, x.type.count))
        size, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
        # normal halves: round the mantissa to 10 bits; subnormal ones: a float addition rounds
        normal = (size + 0xFFF + ((size >> 13) & 1) - (112 << 23)) >> 13
        magic = f32_bits(0.5)
        small = (size.bits_as(x.type) + 0.5).bits_as(bits.type) - magic
        half = (size < 113 << 23).select(small, normal)
        half = (size >= 143 << 23).select(0x7C00, half)
        half = (size > 255 << 23).select(0x7E00, half)  # NaN
        return (half | sign).to(I16)

    def float_control(self, f: Function) -> Value:
        """Return this thread's floating-point control register, as int64.

        It says how the thread rounds and whether it treats subnormal numbers as 0, as XLA's do.
        """
        if self.is_x86:
            word = f.buffer(4)
            f.call("llvm.x86.sse.stmxcsr", VOID, word)
            return f.load(I32, word).to(I64)
        return f.call("llvm.aarch64.get.fpcr", I64) if self.name == "neon" else f.i64(0)

    def set_float_control(self, f: Function, control: Value) -> None:
        """Set this thread's floating-point control register to a value of `float_control`."""
        if self.is_x86:
            word = f.buffer(4)
            f.store(control.to(I32), word)
            f.call("llvm.x86.sse.ldmxcsr", VOID, word)
        elif self.name == "neon":
            f.call("llvm.aarch64.set.fpcr", VOID, control)

    def pause(self, f: Function) -> None:
        """Tell the processor that this thread waits in a loop."""
        if self.is_x86:
            f.call("llvm.x86.sse2.pause", VOID)
        elif self.name == "neon":
            f.call("llvm.aarch64.hint", VOID, f.i32(1))


def _as_arguments(f: Function, *vectors: Value) -> list[Value]:
    return [v.bits_as(vec(I32)) for v in vectors]


def _tied(values: Sequence[Value]) -> list[Value]:
    """Return the same vectors, as results of an instruction that takes all and does nothing."""
    f = values[0].f
    halves = [half for v in values for half in _halves(v)]
    types, places = [h.type for h in halves], range(len(halves))
    constraints = ["=x" for _ in places] + [str(i) for i in places]
    kind = ir.FunctionType(ir.LiteralStructType(types), types)
    nothing = ir.InlineAsm(kind, "", ",".join(constraints))
    together = f.builder.call(nothing, [h.ir for h in halves])
    halves = [Value(f, f.builder.extract_value(together, i)) for i in places]
    return [joined(pair) for pair in zip(halves[::2], halves[1::2], strict=True)]


def _halves(v: Value) -> list[Value]:
    n = v.type.count // 2
    return [v.lanes(list(range(n))), v.lanes(list(range(n, 2 * n)))]


def _halved(f: Function, name: str, result: ir.Type, *vectors: Value) -> Value:
    """Apply an operation of half as many lanes to both halves of vectors, and join the results."""
    halves = zip(*map(_halves, vectors), strict=True)
    return joined([f.call(name, result, *parts) for parts in halves])


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
    """A function that is being written; its methods write instructions."""

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
        """Return a vector of numbers of one type."""
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
        """Return the address of a function or a global variable, as an untyped pointer."""
        return Value(self, _Address(named))

    def like(self, model: Value, x: Operand) -> Value:
        """Convert `x`, if it is a Python number, to a constant of the type of `model`."""
        if isinstance(x, Value):
            return x
        t = model.type
        if isinstance(t, ir.VectorType):
            return Value(self, ir.Constant(t, [x] * t.count))
        return Value(self, ir.Constant(t, x))

    # ---- memory ----------------------------------------------------------------------------

    def offset(self, pointer: Value, offset: Operand) -> Value:
        """Return a pointer `offset` bytes beyond `pointer`."""
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
        """Reserve `size` bytes on the stack until the function returns, aligned for vectors."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(I8, size))
            slot.align = 64
            slot.type = PTR  # llvmlite makes a typed pointer
        return Value(self, slot)

    def pack(self, *values: Value) -> Value:
        """Store 64-bit values on the stack, as arguments of a job, and return their address."""
        packed = self.buffer(8 * len(values))
        for i, value in enumerate(values):
            self.store(value, packed, 8 * i)
        return packed

    def align(self, pointer: Value, to: int) -> Value:
        """Round an address up to a multiple of `to`, a power of two."""
        number = Value(self, self.builder.ptrtoint(pointer.ir, I64))
        return self.offset(pointer, (self.i64(0) - number) & (to - 1))

    def prefetch(self, pointer: Value, offset: Operand, level: int = 1) -> None:
        """Prefetch the cache line at an address, which may lie beyond the end of the data.

        Args:
            level: The cache that it goes to: 1 is the smallest and nearest.
        """
        one, address = I32(1), self.offset(pointer, offset)
        f = self._intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
        self.builder.call(f, [address.ir, I32(0), I32(4 - level), one])

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
        """Run one of two blocks: `with f.if_else(x) as (yes, no)`, then `with yes`, `with no`."""
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
        """Call a function without a result by its address."""
        callee = _Callee(pointer.ir, ir.FunctionType(VOID, [a.type for a in args]))
        self.builder.call(callee, [a.ir for a in args])

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """Return x * y + z, rounded once if the processor has an instruction for that."""
        return self.call("llvm.fmuladd" + suffix(x.type), x.type, x, y, z)

    def maximum(self, x: Value, y: Value) -> Value:
        """Return the larger number, or NaN if either is NaN."""
        return self.call("llvm.maximum" + suffix(x.type), x.type, x, y)

    def larger(self, x: Value, y: Value) -> Value:
        """Return the larger number, or if one is NaN, the other."""
        return self.call("llvm.maxnum" + suffix(x.type), x.type, x, y)

    def absolute(self, x: Value) -> Value:
        return self.call("llvm.fabs" + suffix(x.type), x.type, x)

    def round_even(self, x: Value) -> Value:
        # Not roundeven: processors without it would call the C library, which may lack it, too.
        return self.call("llvm.rint" + suffix(x.type), x.type, x)

    def sum_of_lanes(self, x: Value) -> Value:
        """Return the sum of a vector's lanes, added in pairs."""
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
    """A pointer to call. llvmlite asks a callee for its function type, which pointers lack."""

    def __init__(self, pointer: ir.Value, function_type: ir.FunctionType) -> None:
        self.type = pointer.type
        self.function_type = function_type
        self.get_reference = pointer.get_reference


def suffix(t: ir.Type) -> str:
    """Return the type suffix of an overloaded intrinsic: `.v16f32` in `llvm.fabs.v16f32`."""
    if isinstance(t, ir.VectorType):
        return f".v{t.count}{suffix(t.element)[1:]}"
    if isinstance(t, ir.IntType):
        return f".i{t.width}"
    return ".f32" if isinstance(t, ir.FloatType) else ".f16"


class _Address:
    """A function or a global variable as an operand of type PTR; llvmlite types its pointers."""

    def __init__(self, named: ir.Function | ir.GlobalVariable) -> None:
        self.type = PTR
        self.get_reference = named.get_reference
