"""Conversions of vectors lane by lane, and the bit patterns of floats (vectors or scalars)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qformat.kernels.numba.simd import Vector, llvm_type


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
    """Make an intrinsic that converts each lane to `target`.

    A float has to be clamped to the range of an integer target first: of others, and of a NaN, the result is undefined.
    """

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
            return getattr(builder, method)(args[0], llvm_type(context, result))

        return result(vector), generate

    return operation


to_f32 = _conversion(types.float32)
to_f64 = _conversion(types.float64)
to_i32 = _conversion(types.int32)
to_u32 = _conversion(types.uint32)
to_u16 = _conversion(types.uint16)
to_u8 = _conversion(types.uint8)
