"""Explicit SIMD vectors for numba kernels.

numba unrolls short inner loops into scalar code and leaves LLVM's SLP vectorizer off, so a loop over the 32 weights of a block
never becomes vector code. Here a block is one value of a vector type instead, ``<32 x float>`` say, which LLVM splits into whatever
registers the processor has. Every operation rounds once per lane, in order: results do not depend on the processor.

Vectors are made by `load` and used with ``+ - * / & | ^ << >>``; scalars on either side are spread over the lanes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model


class Vector(types.Type):  # type: ignore[misc]
    """``<lanes x element>``; integers are named by numba's types, whose sign decides what ``>>`` and conversions do."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"vector<{lanes} x {element}>")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _llvm(context: Any, vector: Vector) -> ir.VectorType:
    return ir.VectorType(context.get_value_type(vector.element), vector.lanes)


def _spread(context: Any, builder: ir.IRBuilder, value: Any, source: types.Type, vector: Vector) -> Any:
    """Return `value` as a `vector`: unchanged if it is one, else converted to the element type and repeated."""
    if isinstance(source, Vector):
        return value
    scalar = context.cast(builder, value, source, vector.element)
    single = ir.VectorType(scalar.type, 1)
    one = builder.insert_element(ir.Constant(single, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(one, ir.Constant(single, ir.Undefined), zeros)


def pointer_to(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, to: ir.Type) -> Any:
    """Return the address of an array's element, as that of another type; for intrinsics."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


@intrinsic(prefer_literal=True)
def load(typing: Any, array: Any, index: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return elements ``index`` to ``index + lanes - 1`` of a contiguous one-dimensional array; no bounds check."""
    vector = Vector(array.dtype, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], args[0], args[1], _llvm(context, vector))
        value = builder.load(source)
        value.align = array.dtype.bitwidth // 8
        return value

    return vector(array, types.intp, lanes), generate


def _widen(builder: ir.IRBuilder, value: Any) -> Any:
    """Return the floats of a vector of bfloat16 patterns."""
    lanes = value.type.count
    wide = ir.VectorType(ir.IntType(32), lanes)
    shifted = builder.shl(builder.zext(value, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), lanes))


@intrinsic(prefer_literal=True)
def load_f32(typing: Any, array: Any, index: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Do as `load` for an array of float32, or of bfloat16 patterns in uint16, which are widened."""
    vector = Vector(types.float32, lanes.literal_value)
    if array.dtype not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        stored = ir.VectorType(context.get_value_type(array.dtype), vector.lanes)
        value = builder.load(pointer_to(context, builder, signature.args[0], args[0], args[1], stored))
        value.align = array.dtype.bitwidth // 8
        return value if array.dtype == types.float32 else _widen(builder, value)

    return vector(array, types.intp, lanes), generate


@intrinsic(prefer_literal=True)
def zeros_u32(typing: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return a vector of uint32 zeros."""
    vector = Vector(types.uint32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(_llvm(context, vector), None)

    return vector(lanes), generate


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Ask for the cache line of an element that will be read soon; harmless past the end."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address = pointer_to(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        flags = [ir.Constant(ir.IntType(32), value) for value in (0, 3, 1)]  # to read, to keep, data
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def float_at(typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Do as `load_f32` for one element, as a scalar."""
    if array.dtype not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        stored = context.get_value_type(array.dtype)
        value = builder.load(pointer_to(context, builder, signature.args[0], args[0], args[1], stored))
        if array.dtype == types.float32:
            return value
        shifted = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:  # noqa: ARG001
    """Put a vector at ``index`` of a contiguous one-dimensional array of its element type; no bounds check."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target = pointer_to(context, builder, signature.args[0], args[0], args[1], _llvm(context, vector))
        instruction = builder.store(args[2], target)
        instruction.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def load_as(typing: Any, array: Any, index: Any, like: Any) -> Any:  # noqa: ARG001
    """Return one scalar of the type of ``like``, from the bytes at ``index`` of a uint8 array, of any alignment."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], args[0], args[1], context.get_value_type(like))
        value = builder.load(source)
        value.align = 1
        return value

    return like(array, types.intp, like), generate


@intrinsic
def store_as(typing: Any, array: Any, index: Any, value: Any) -> Any:  # noqa: ARG001
    """Put the bytes of a scalar at ``index`` of a uint8 array, of any alignment."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target = pointer_to(context, builder, signature.args[0], args[0], args[1], context.get_value_type(value))
        instruction = builder.store(args[2], target)
        instruction.align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


def _binary(floating: str | None, signed: str, unsigned: str | None = None) -> Any:
    """Make an intrinsic that applies a builder method to two vectors, or to a vector and a scalar."""

    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
        vector = a if isinstance(a, Vector) else b
        if isinstance(a, Vector) and isinstance(b, Vector) and a != b:
            return None
        integer = signed if getattr(vector.element, "signed", True) else unsigned or signed
        method = floating if isinstance(vector.element, types.Float) else integer
        if method is None:
            return None

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            left, right = (
                _spread(context, builder, value, kind, vector) for value, kind in zip(args, signature.args, strict=True)
            )
            return getattr(builder, method)(left, right)

        return vector(a, b), generate

    return operation


def _operator(function: Callable[..., Any], operation: Any) -> None:
    @overload(function)  # numba compares the parameters with those of the lambda, annotations included
    def implementation(a, b):
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: operation(a, b)  # noqa: PLW0108  numba wants a Python function
        return None


_operator(operator.add, _binary("fadd", "add"))
_operator(operator.sub, _binary("fsub", "sub"))
_operator(operator.mul, _binary("fmul", "mul"))
_operator(operator.truediv, _binary("fdiv", "sdiv", "udiv"))
_operator(operator.and_, _binary(None, "and_"))
_operator(operator.or_, _binary(None, "or_"))
_operator(operator.xor, _binary(None, "xor"))
_operator(operator.lshift, _binary(None, "shl"))
_operator(operator.rshift, _binary(None, "ashr", "lshr"))


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Call an intrinsic of LLVM's by its name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _suffix(vector: Vector) -> str:
    letter = "f" if isinstance(vector.element, types.Float) else "i"
    return f"v{vector.lanes}{letter}{vector.element.bitwidth}"


def _extremum(signed: str, unsigned: str, ordered: str) -> Any:
    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
        """Lane by lane; of floats that do not compare (a NaN, zeros of both signs) the second is taken."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            other = _spread(context, builder, args[1], signature.args[1], a)
            if isinstance(a.element, types.Float):
                return builder.select(builder.fcmp_ordered(ordered, args[0], other), args[0], other)
            name = f"llvm.{signed if a.element.signed else unsigned}.{_suffix(a)}"
            return call_llvm(builder, name, args[0].type, [args[0], other])

        return a(a, b), generate

    return operation


minimum = _extremum("smin", "umin", "<")
maximum = _extremum("smax", "umax", ">")


@intrinsic
def largest(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return the largest lane of a vector of unsigned integers, as a scalar."""
    if not isinstance(vector.element, types.Integer) or vector.element.signed:
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        scalar = context.get_value_type(signature.return_type)
        return call_llvm(builder, f"llvm.vector.reduce.umax.{_suffix(vector)}", scalar, [args[0]])

    return vector.element(vector), generate


@intrinsic
def first_equal(typing: Any, vector: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the number of the first lane that equals ``value`` (integers), or the number of lanes."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = _spread(context, builder, args[1], signature.args[1], vector)
        bits = builder.bitcast(builder.icmp_unsigned("==", args[0], other), ir.IntType(vector.lanes))
        count = builder.cttz(bits, ir.Constant(ir.IntType(1), 0))
        target = context.get_value_type(types.intp)
        return builder.zext(count, target) if vector.lanes < 64 else count

    return types.intp(vector, value), generate


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the number of the lowest bit of an integer that is set."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        count = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return context.cast(builder, count, signature.args[0], types.intp)

    return types.intp(value), generate


@intrinsic
def pack_bits(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return a uint32 whose bit i tells whether lane i of 32 integers is not 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None)), ir.IntType(32))

    return types.uint32(vector), generate


@intrinsic
def unpack_bits(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return 32 lanes of uint32: bit i of a uint32 in lane i."""
    result = Vector(types.uint32, 32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.zext(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32)), _llvm(context, result))

    return result(value), generate


@intrinsic
def select_nonzero(typing: Any, condition: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane: ``a`` where ``condition`` (integers) is not 0, else ``b``; ``a`` is a vector, ``b`` may be a scalar."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, None)
        mask = builder.icmp_unsigned("!=", args[0], zero)
        return builder.select(mask, args[1], _spread(context, builder, args[2], signature.args[2], a))

    return a(condition, a, b), generate


@intrinsic
def greater_equal(typing: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane, for integers: 1 where ``a >= b``, else 0, in the type of ``a``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = _spread(context, builder, args[1], signature.args[1], a)
        compare = builder.icmp_signed if a.element.signed else builder.icmp_unsigned
        return builder.zext(compare(">=", args[0], other), args[0].type)

    return a(a, b), generate


@intrinsic
def select_less(typing: Any, left: Any, right: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane: ``a`` where ``left < right`` (false for NaN), else ``b``; all but ``left`` and ``a`` may be scalars."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = _spread(context, builder, args[1], signature.args[1], left)
        if isinstance(left.element, types.Float):
            mask = builder.fcmp_ordered("<", args[0], other)
        else:
            compare = builder.icmp_signed if left.element.signed else builder.icmp_unsigned
            mask = compare("<", args[0], other)
        return builder.select(mask, args[2], _spread(context, builder, args[3], signature.args[3], a))

    return a(left, right, a, b), generate


@intrinsic(prefer_literal=True)
def spread_f32(typing: Any, value: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return a float32 in each of ``lanes`` lanes."""
    vector = Vector(types.float32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _spread(context, builder, args[0], signature.args[0], vector)

    return vector(value, lanes), generate


@intrinsic(prefer_literal=True)
def count_up(typing: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return the uint32 numbers 0, 1, 2 ... in ``lanes`` lanes."""
    vector = Vector(types.uint32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(_llvm(context, vector), list(range(vector.lanes)))

    return vector(lanes), generate


def _reduction(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, vector: Any) -> Any:  # noqa: ARG001
        if not isinstance(vector.element, types.Integer):
            return None

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            scalar = context.get_value_type(signature.return_type)
            return call_llvm(builder, f"llvm.vector.reduce.{name}.{_suffix(vector)}", scalar, [args[0]])

        return vector.element(vector), generate

    return operation


#: all lanes of integers together, as a scalar
sum_lanes = _reduction("add")
or_lanes = _reduction("or")


@intrinsic
def sum_halves(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return the sum of all lanes of floats: the upper half is added to the lower one until a single lane is left."""
    if not isinstance(vector.element, types.Float):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        value, lanes = args[0], vector.lanes
        while lanes > 1:
            lanes //= 2
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(i, i + lanes))) for i in (0, lanes)]
            low, high = (builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask) for mask in masks)
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.element(vector), generate


@intrinsic
def take(typing: Any, table: Any, indices: Any) -> Any:  # noqa: ARG001
    """Return ``table[index]`` for each lane of ``indices`` (uint32); no bounds check."""
    vector = Vector(table.dtype, indices.lanes)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        element = context.get_value_type(table.dtype)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        base = builder.ptrtoint(data, ir.IntType(64))
        wide = builder.zext(args[1], ir.VectorType(ir.IntType(64), vector.lanes))
        offsets = builder.mul(wide, ir.Constant(wide.type, [table.dtype.bitwidth // 8] * vector.lanes))
        addresses = builder.add(
            offsets, _spread(context, builder, base, types.int64, Vector(types.int64, vector.lanes))
        )
        pointers = builder.inttoptr(addresses, ir.VectorType(element.as_pointer(), vector.lanes))
        every = ir.Constant(ir.VectorType(ir.IntType(1), vector.lanes), [1] * vector.lanes)
        align = ir.Constant(ir.IntType(32), table.dtype.bitwidth // 8)
        result = _llvm(context, vector)
        name = f"llvm.masked.gather.{_suffix(vector)}.v{vector.lanes}p0"
        return call_llvm(builder, name, result, [pointers, align, every, ir.Constant(result, ir.Undefined)])

    return vector(table, indices), generate


@intrinsic
def transpose_blocks(typing: Any, array: Any, index: Any, target: Any) -> Any:  # noqa: ARG001
    """Read 16 blocks of 32 elements as `load_f32` does, and put element i of block b at ``target[16 * i + b]``.

    ``target`` is float32 of 512 elements. So a kernel can treat 16 blocks at once, each in a lane of its own.
    """
    if array.dtype not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), 16)
        word = ir.IntType(64)
        for half in (0, 16):
            rows = [
                _load_floats(context, builder, signature, args, builder.add(args[1], ir.Constant(word, 32 * b + half)))
                for b in range(16)
            ]
            for step in (1, 2, 4, 8):  # a butterfly: swap the off-diagonal squares of this size
                low = ir.Constant(
                    ir.VectorType(ir.IntType(32), 16), [i if not i & step else 16 + i - step for i in range(16)]
                )
                high = ir.Constant(
                    ir.VectorType(ir.IntType(32), 16), [i + step if not i & step else 16 + i for i in range(16)]
                )
                for b in range(16):
                    if not b & step:
                        first, second = rows[b], rows[b + step]
                        rows[b] = builder.shuffle_vector(first, second, low)
                        rows[b + step] = builder.shuffle_vector(first, second, high)
            for i, row in enumerate(rows):
                place = pointer_to(
                    context, builder, signature.args[2], args[2], ir.Constant(word, 16 * (half + i)), floats
                )
                builder.store(row, place).align = 4
        return context.get_dummy_value()

    def _load_floats(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, index: Any) -> Any:
        stored = ir.VectorType(context.get_value_type(array.dtype), 16)
        value = builder.load(pointer_to(context, builder, signature.args[0], args[0], index, stored))
        value.align = array.dtype.bitwidth // 8
        return value if array.dtype == types.float32 else _widen(builder, value)

    return types.void(array, types.intp, target), generate


def _bits_type(kind: types.Type) -> types.Type:
    return {32: types.uint32, 64: types.uint64}[kind.bitwidth]


@intrinsic
def bits(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the bit pattern of a float, or of a vector of floats, as unsigned integers."""
    vector = isinstance(value, Vector)
    result = Vector(_bits_type(value.element), value.lanes) if vector else _bits_type(value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(value), generate


@intrinsic
def from_bits(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the float32 (or vector of them) that has the bit pattern of a uint32."""
    vector = isinstance(value, Vector)
    result = Vector(types.float32, value.lanes) if vector else types.float32

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(value), generate


def _conversion(target: types.Type) -> Any:
    """Make an intrinsic that converts each lane to `target`; a float has to be in the range of an integer target."""

    @intrinsic
    def operation(typing: Any, vector: Any) -> Any:  # noqa: ARG001
        result = Vector(target, vector.lanes)
        source = vector.element
        if isinstance(source, types.Float) and isinstance(target, types.Float):
            method = "fpext" if target.bitwidth > source.bitwidth else "fptrunc"
        elif isinstance(source, types.Float):
            method = "fptosi" if target.signed else "fptoui"
        elif isinstance(target, types.Float):
            method = "sitofp" if source.signed else "uitofp"
        elif target.bitwidth < source.bitwidth:
            method = "trunc"
        elif target.bitwidth > source.bitwidth:
            method = "sext" if source.signed else "zext"
        else:
            method = "bitcast"

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
            return getattr(builder, method)(args[0], _llvm(context, result))

        return result(vector), generate

    return operation


to_f32 = _conversion(types.float32)
to_f64 = _conversion(types.float64)
to_i32 = _conversion(types.int32)
to_u32 = _conversion(types.uint32)
to_u16 = _conversion(types.uint16)
to_u8 = _conversion(types.uint8)


def _shuffle(lanes_of: Callable[[int], list[int]]) -> Any:
    @intrinsic
    def operation(typing: Any, vector: Any) -> Any:  # noqa: ARG001
        chosen = lanes_of(vector.lanes)
        result = Vector(vector.element, len(chosen))

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)
            return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), mask)

        return result(vector), generate

    return operation


low_half = _shuffle(lambda lanes: list(range(lanes // 2)))
high_half = _shuffle(lambda lanes: list(range(lanes // 2, lanes)))
#: lanes 0 and 1, 2 and 3 ... exchanged; lanes 0 and 2, 1 and 3 ...
swap_1 = _shuffle(lambda lanes: [i ^ 1 for i in range(lanes)])
swap_2 = _shuffle(lambda lanes: [i ^ 2 for i in range(lanes)])
even_lanes = _shuffle(lambda lanes: list(range(0, lanes, 2)))
odd_lanes = _shuffle(lambda lanes: list(range(1, lanes, 2)))


@intrinsic(prefer_literal=True)
def lane(typing: Any, vector: Any, number: Any) -> Any:  # noqa: ARG001
    """Return one lane of a vector as a scalar; the number is a constant."""
    place = ir.Constant(ir.IntType(32), number.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.extract_element(args[0], place)

    return vector.element(vector, number), generate


@intrinsic
def join(typing: Any, low: Any, high: Any) -> Any:  # noqa: ARG001
    """Return a vector of twice as many lanes: ``low``, then ``high``."""
    result = Vector(low.element, 2 * low.lanes)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        mask = ir.Constant(ir.VectorType(ir.IntType(32), result.lanes), list(range(result.lanes)))
        return builder.shuffle_vector(args[0], args[1], mask)

    return result(low, high), generate
