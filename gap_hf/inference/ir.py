"""Writing LLVM IR as if it were Python: values with operators, pointers with indices, `for` loops, variables.

Only what `gap_hf.inference.kernels` needs. Everything is emitted through llvmlite's `IRBuilder`; nothing here knows what a
kernel computes. Integers are 64 bits wide, floats are fp32, a vector is so many floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from llvmlite import ir

I64, I32, I16 = ir.IntType(64), ir.IntType(32), ir.IntType(16)
F32 = ir.FloatType()
POINTER = ir.PointerType()


class Value:
    """An integer, a float or a vector of floats. A product that is added becomes one fused multiply-add where the CPU has it."""

    def __init__(self, kernel: Kernel, value: Any) -> None:
        self.kernel, self.value = kernel, value

    def _binary(self, other: Value | int, of_int: str, of_float: str | None) -> Value:
        build = self.kernel.build
        if isinstance(self.value.type, ir.IntType):
            right = ir.Constant(self.value.type, other) if isinstance(other, int) else other.value
            return Value(self.kernel, getattr(build, of_int)(self.value, right))
        assert isinstance(other, Value) and of_float is not None
        return Value(self.kernel, getattr(build, of_float)(self.value, other.value, flags=["contract"]))

    def __add__(self, other: Value | int) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | int) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Value | int) -> Value:
        return self._binary(other, "mul", "fmul")

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary(other, "sdiv", None)

    def __lt__(self, other: Value | int) -> Value:
        right = ir.Constant(self.value.type, other) if isinstance(other, int) else other.value
        return Value(self.kernel, self.kernel.build.icmp_signed("<", self.value, right))

    def at_most(self, other: Value | int) -> Value:
        """min(self, other) of integers."""
        right = other if isinstance(other, Value) else self.kernel.int(other)
        return Value(self.kernel, self.kernel.build.select((self < right).value, self.value, right.value))

    def spread(self, width: int) -> Value:
        """A vector with this float in each of its places."""
        build = self.kernel.build
        vector = ir.VectorType(F32, width)
        first = build.insert_element(ir.Constant(vector, ir.Undefined), self.value, I32(0))
        everywhere = ir.Constant(ir.VectorType(I32, width), [0] * width)
        return Value(self.kernel, build.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere))

    def pick(self, other: Value, places: Sequence[int]) -> Value:
        """A vector of the named places of this one followed by the other."""
        chosen = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return Value(self.kernel, self.kernel.build.shuffle_vector(self.value, other.value, chosen))

    def place(self, index: int) -> Value:
        """One float of a vector."""
        return Value(self.kernel, self.kernel.build.extract_element(self.value, I32(index)))

    def is_nan(self) -> Value:
        """1 if this float is NaN, else 0."""
        unordered = self.kernel.build.fcmp_unordered("uno", self.value, self.value)
        return Value(self.kernel, self.kernel.build.zext(unordered, I64))

    def wide(self) -> Value:
        """A 32-bit integer as one of 64 bits."""
        return Value(self.kernel, self.kernel.build.sext(self.value, I64))

    def narrow(self) -> Value:
        """A 64-bit integer as one of 32 bits."""
        return Value(self.kernel, self.kernel.build.trunc(self.value, I32))

    def sum(self) -> Value:
        """Of all places of a vector, by halves."""
        total, width = self, self.value.type.count
        while width > 1:
            width //= 2
            total = total.pick(total, range(width)) + total.pick(total, range(width, 2 * width))
        return total.place(0)


class Variable:
    """A local variable. LLVM turns it into a register."""

    def __init__(self, start: Value) -> None:
        self.kernel, self.type = start.kernel, start.value.type
        with self.kernel.build.goto_entry_block():
            self.slot = self.kernel.build.alloca(self.type)
        self.set(start)

    def set(self, value: Value) -> None:
        self.kernel.build.store(value.value, self.slot)

    def get(self) -> Value:
        return Value(self.kernel, self.kernel.build.load(self.slot, typ=self.type))


class Array:
    """A pointer to ``f32``, ``bf16``, ``i64``, ``i32`` or ``u16``. Narrow elements are widened as they are read."""

    TYPES: ClassVar = {"f32": F32, "bf16": I16, "i64": I64, "i32": I32, "u16": I16}
    BYTES: ClassVar = {"f32": 4, "bf16": 2, "i64": 8, "i32": 4, "u16": 2}

    def __init__(self, kernel: Kernel, pointer: Any, kind: str) -> None:
        self.kernel, self.pointer, self.kind = kernel, pointer, kind

    def __add__(self, offset: Value | int) -> Array:
        return Array(self.kernel, self._address(offset), self.kind)

    def __getitem__(self, index: Value | int) -> Value:
        return self._load(self._address(index), 0)

    def __setitem__(self, index: Value | int, value: Value) -> None:
        self.kernel.build.store(value.value, self._address(index), align=self.BYTES[self.kind])

    def address(self) -> Value:
        """As an integer."""
        return Value(self.kernel, self.kernel.build.ptrtoint(self.pointer, I64))

    def vector(self, index: Value | int, width: int) -> Value:
        """`width` elements from `index` on."""
        return self._load(self._address(index), width)

    def at(self, places: Array, index: Value, width: int) -> Value:
        """A vector of ``self[places[index]], self[places[index + 1]], …``: words of several places are read and taken apart,
        which is faster than reading each place and, on AVX2, than the CPU's own gather.
        """
        build, bits = self.kernel.build, 8 * self.BYTES[places.kind]
        first, word = places._address(index), None
        vector = ir.Constant(ir.VectorType(F32, width), ir.Undefined)
        for i in range(width):
            in_word = i % (64 // bits)
            if in_word == 0:
                word = build.load(build.gep(first, [I64(i * bits // 64)], source_etype=I64), typ=I64, align=bits // 8)
            place = Value(self.kernel, build.and_(build.lshr(word, I64(in_word * bits)), I64((1 << bits) - 1)))
            vector = build.insert_element(vector, self[place].value, I32(i))
        return Value(self.kernel, vector)

    def _address(self, index: Value | int) -> Any:
        at = index if isinstance(index, Value) else self.kernel.int(index)
        return self.kernel.build.gep(self.pointer, [at.value], source_etype=self.TYPES[self.kind])

    def _load(self, address: ir.Value, width: int) -> Value:
        def wide(element: ir.Type) -> ir.Type:
            return ir.VectorType(element, width) if width else element

        build = self.kernel.build
        value = build.load(address, typ=wide(self.TYPES[self.kind]), align=self.BYTES[self.kind])
        if self.kind == "bf16":  # the upper half of a float
            shift = ir.Constant(wide(I32), [16] * width if width else 16)
            value = build.bitcast(build.shl(build.zext(value, wide(I32)), shift), wide(F32))
        elif self.kind in ("i32", "u16"):
            value = build.zext(value, wide(I64))
        return Value(self.kernel, value)


class Kernel:
    """One function that returns an integer, while it is being written.

    Args:
        module: Where it goes.
        name: Of the function.
        arguments: Names to kinds: an `Array`'s kind with a star, as ``f32*``, or ``int``.
    """

    def __init__(self, module: ir.Module, name: str, **arguments: str) -> None:
        types = [I64 if kind == "int" else POINTER for kind in arguments.values()]
        self.function = ir.Function(module, ir.FunctionType(I64, types), name)
        self.build = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._arguments = dict(zip(arguments, zip(self.function.args, arguments.values(), strict=True), strict=True))

    def arg(self, name: str) -> Value:
        return Value(self, self._arguments[name][0])

    def array(self, name: str) -> Array:
        pointer, kind = self._arguments[name]
        return Array(self, pointer, kind.rstrip("*"))

    def array_at(self, address: Value, kind: str) -> Array:
        """An array whose address was read as an integer."""
        return Array(self, self.build.inttoptr(address.value, POINTER), kind)

    def function_pointer(self, other: Kernel) -> Array:
        return Array(self, other.function, "i64")

    def local(self, length: int, kind: str) -> Array:
        """A short array on the stack."""
        with self.build.goto_entry_block():
            address = self.build.ptrtoint(self.build.alloca(Array.TYPES[kind], length), I64)
            return self.array_at(Value(self, address), kind)

    def int(self, value: int) -> Value:
        return Value(self, I64(value))

    def float(self, value: float) -> Value:
        return Value(self, F32(value))

    def zeros(self, width: int) -> Value:
        return Value(self, ir.Constant(ir.VectorType(F32, width), [0.0] * width))

    @contextmanager
    def loop(self, start: Value | int, stop: Value, step: int = 1) -> Iterator[Value]:
        """``for i in range(start, stop, step)``, the body being what is written inside."""
        index = Variable(start if isinstance(start, Value) else self.int(start))
        head, body, end = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        self.build.branch(head)
        self.build.position_at_end(head)
        self.build.cbranch((index.get() < stop).value, body, end)
        self.build.position_at_end(body)
        i = index.get()
        yield i
        index.set(i + step)
        self.build.branch(head)
        self.build.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """``if condition:``"""
        with self.build.if_then(condition.value):
            yield

    def call(self, function: Kernel | ir.Function, *values: Value | Array) -> Value:
        target = function.function if isinstance(function, Kernel) else function
        given = [v.value if isinstance(v, Value) else v.pointer for v in values]
        return Value(self, self.build.call(target, given))

    def result(self, value: Value) -> None:
        self.build.ret(value.value)
