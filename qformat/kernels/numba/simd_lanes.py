"""Vectors across their lanes: shuffles, reductions, and bit masks of one bit for each lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qformat.kernels.numba.simd import Vector, call_llvm, llvm_type, spread_value, suffix


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


def _reduction(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, vector: Any) -> Any:  # noqa: ARG001
        if not isinstance(vector.element, types.Integer):
            return None

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            scalar = context.get_value_type(signature.return_type)
            return call_llvm(builder, f"llvm.vector.reduce.{name}.{suffix(vector)}", scalar, [args[0]])

        return vector.element(vector), generate

    return operation


#: sum (modulo 2^bits) and bitwise or of all lanes of integers, as scalars
sum_lanes = _reduction("add")
or_lanes = _reduction("or")


@intrinsic
def largest(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return the largest lane of a vector of unsigned integers, as a scalar."""
    if not isinstance(vector.element, types.Integer) or vector.element.signed:
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        scalar = context.get_value_type(signature.return_type)
        return call_llvm(builder, f"llvm.vector.reduce.umax.{suffix(vector)}", scalar, [args[0]])

    return vector.element(vector), generate


@intrinsic
def sum_halves(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return the sum of all lanes of floats, in a fixed order: the upper half is added to the lower one until one lane is left."""
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
def first_equal(typing: Any, vector: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the number of the first lane that equals ``value`` (integers), or the number of lanes."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = spread_value(context, builder, args[1], signature.args[1], vector)
        bits = builder.bitcast(builder.icmp_unsigned("==", args[0], other), ir.IntType(vector.lanes))
        count = builder.cttz(bits, ir.Constant(ir.IntType(1), 0))
        target = context.get_value_type(types.intp)
        return builder.zext(count, target) if vector.lanes < 64 else count

    return types.intp(vector, value), generate


@intrinsic
def pack_bits(typing: Any, vector: Any) -> Any:  # noqa: ARG001
    """Return a uint32 whose bit i is set if lane i of 32 integers is not 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None)), ir.IntType(32))

    return types.uint32(vector), generate


@intrinsic
def unpack_bits(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return 32 lanes of uint32: bit i of a uint32 in lane i, as 0 or 1."""
    result = Vector(types.uint32, 32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.zext(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32)), llvm_type(context, result))

    return result(value), generate


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the number of the lowest bit of an integer that is set."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        count = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return context.cast(builder, count, signature.args[0], types.intp)

    return types.intp(value), generate
