"""Explicit SIMD vectors for numba kernels: the type, its arithmetic, comparisons and constants.

numba unrolls short inner loops into scalar code and leaves LLVM's SLP vectorizer off, so that a loop over the 32 weights of a block
never becomes vector code. Here a block is one value of a vector type instead, ``<32 x float>`` say, which LLVM splits into whatever
registers the processor has. Every operation rounds once per lane, in the order written: results do not depend on the processor.

Vectors come from `simd_memory.load` and are used with ``+ - * / & | ^ << >>``; scalars on either side are repeated in every lane.
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
    """``<lanes x element>``; the signedness of numba's integer type decides on ``>>``, comparisons and conversions."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"vector<{lanes} x {element}>")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def llvm_type(context: Any, vector: Vector) -> ir.VectorType:
    """Return LLVM's type of a vector."""
    return ir.VectorType(context.get_value_type(vector.element), vector.lanes)


def spread_value(context: Any, builder: ir.IRBuilder, value: Any, source: types.Type, vector: Vector) -> Any:
    """Return `value` as a `vector`: unchanged if it is one, else converted to the element type and repeated."""
    if isinstance(source, Vector):
        return value
    scalar = context.cast(builder, value, source, vector.element)
    single = ir.VectorType(scalar.type, 1)
    one = builder.insert_element(ir.Constant(single, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(one, ir.Constant(single, ir.Undefined), zeros)


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Call one of LLVM's intrinsics by its name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def suffix(vector: Vector) -> str:
    """Return how the names of LLVM's intrinsics end for a vector, ``v32f32`` say."""
    letter = "f" if isinstance(vector.element, types.Float) else "i"
    return f"v{vector.lanes}{letter}{vector.element.bitwidth}"


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
                spread_value(context, builder, value, kind, vector)
                for value, kind in zip(args, signature.args, strict=True)
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


def _extremum(signed: str, unsigned: str, ordered: str) -> Any:
    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
        """Lane by lane; the second of floats of which neither is smaller (a NaN, zeros of both signs)."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            other = spread_value(context, builder, args[1], signature.args[1], a)
            if isinstance(a.element, types.Float):
                return builder.select(builder.fcmp_ordered(ordered, args[0], other), args[0], other)
            name = f"llvm.{signed if a.element.signed else unsigned}.{suffix(a)}"
            return call_llvm(builder, name, args[0].type, [args[0], other])

        return a(a, b), generate

    return operation


minimum = _extremum("smin", "umin", "<")
maximum = _extremum("smax", "umax", ">")


@intrinsic
def select_nonzero(typing: Any, condition: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane: ``a`` where ``condition`` (integers) is not 0, else ``b``; ``a`` is a vector, ``b`` may be a scalar."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, None)
        mask = builder.icmp_unsigned("!=", args[0], zero)
        return builder.select(mask, args[1], spread_value(context, builder, args[2], signature.args[2], a))

    return a(condition, a, b), generate


@intrinsic
def greater_equal(typing: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane, for integers: 1 where ``a >= b``, else 0, in the type of ``a``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = spread_value(context, builder, args[1], signature.args[1], a)
        compare = builder.icmp_signed if a.element.signed else builder.icmp_unsigned
        return builder.zext(compare(">=", args[0], other), args[0].type)

    return a(a, b), generate


@intrinsic
def select_less(typing: Any, left: Any, right: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Lane by lane: ``a`` where ``left < right`` (false for NaN), else ``b``; all but ``left`` and ``a`` may be scalars."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        other = spread_value(context, builder, args[1], signature.args[1], left)
        if isinstance(left.element, types.Float):
            mask = builder.fcmp_ordered("<", args[0], other)
        else:
            compare = builder.icmp_signed if left.element.signed else builder.icmp_unsigned
            mask = compare("<", args[0], other)
        return builder.select(mask, args[2], spread_value(context, builder, args[3], signature.args[3], a))

    return a(left, right, a, b), generate


@intrinsic(prefer_literal=True)
def zeros_u32(typing: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return a vector of uint32 zeros."""
    vector = Vector(types.uint32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(llvm_type(context, vector), None)

    return vector(lanes), generate


@intrinsic(prefer_literal=True)
def spread_f32(typing: Any, value: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return a float32 in each of ``lanes`` lanes."""
    vector = Vector(types.float32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return spread_value(context, builder, args[0], signature.args[0], vector)

    return vector(value, lanes), generate


@intrinsic(prefer_literal=True)
def count_up(typing: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return the uint32 numbers 0, 1, 2 ... in ``lanes`` lanes."""
    vector = Vector(types.uint32, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(llvm_type(context, vector), list(range(vector.lanes)))

    return vector(lanes), generate
