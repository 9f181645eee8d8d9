"""Vectors and scalars from and to arrays. All indices are trusted: callers keep ``index`` and what follows it inside the array."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qformat.kernels.numba.simd import Vector, call_llvm, llvm_type, spread_value, suffix

_INT = ir.IntType(32)


def pointer_to(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, to: ir.Type) -> Any:
    """Return the address of an array's element, as that of another type; for intrinsics."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _read(context: Any, builder: ir.IRBuilder, array_type: Any, args: Any, to: ir.Type, align: int) -> Any:
    """Return the value of type `to` at (array, index), with no more than `align` bytes of alignment taken for granted."""
    value = builder.load(pointer_to(context, builder, array_type, args[0], args[1], to))
    value.align = align
    return value


def _write(context: Any, builder: ir.IRBuilder, array_type: Any, args: Any, align: int) -> Any:
    """Store a value at (array, index, value)."""
    builder.store(args[2], pointer_to(context, builder, array_type, args[0], args[1], args[2].type)).align = align
    return context.get_dummy_value()


def _read_floats(context: Any, builder: ir.IRBuilder, array_type: Any, args: Any, lanes: int | None) -> Any:
    """Return float32 values, a scalar if `lanes` is None, from an array of float32 or of bfloat16 patterns."""

    def shaped(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, lanes) if lanes else element

    stored = shaped(context.get_value_type(array_type.dtype))
    value = _read(context, builder, array_type, args, stored, array_type.dtype.bitwidth // 8)
    if array_type.dtype == types.float32:
        return value
    shifts = ir.Constant(shaped(_INT), [16] * lanes if lanes else 16)
    return builder.bitcast(builder.shl(builder.zext(value, shifts.type), shifts), shaped(ir.FloatType()))


@intrinsic(prefer_literal=True)
def load(typing: Any, array: Any, index: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Return elements ``index`` to ``index + lanes - 1`` of a contiguous one-dimensional array."""
    vector = Vector(array.dtype, lanes.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to = llvm_type(context, vector)
        return _read(context, builder, signature.args[0], args, to, array.dtype.bitwidth // 8)

    return vector(array, types.intp, lanes), generate


@intrinsic(prefer_literal=True)
def load_f32(typing: Any, array: Any, index: Any, lanes: Any) -> Any:  # noqa: ARG001
    """Do as `load` for an array of float32, or of bfloat16 patterns in uint16, which are widened."""
    vector = Vector(types.float32, lanes.literal_value)
    if array.dtype not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _read_floats(context, builder, signature.args[0], args, vector.lanes)

    return vector(array, types.intp, lanes), generate


@intrinsic
def float_at(typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Do as `load_f32` for one element, as a scalar."""
    if array.dtype not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _read_floats(context, builder, signature.args[0], args, None)

    return types.float32(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:  # noqa: ARG001
    """Put a vector at ``index`` of a contiguous one-dimensional array of its element type."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _write(context, builder, signature.args[0], args, array.dtype.bitwidth // 8)

    return types.void(array, types.intp, vector), generate


@intrinsic
def load_as(typing: Any, array: Any, index: Any, like: Any) -> Any:  # noqa: ARG001
    """Return one scalar of the type of ``like``, from the bytes at ``index`` of a uint8 array, of any alignment."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _read(context, builder, signature.args[0], args, context.get_value_type(like), 1)

    return like(array, types.intp, like), generate


@intrinsic
def store_as(typing: Any, array: Any, index: Any, value: Any) -> Any:  # noqa: ARG001
    """Put the bytes of a scalar at ``index`` of a uint8 array, of any alignment."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _write(context, builder, signature.args[0], args, 1)

    return types.void(array, types.intp, value), generate


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Fetch the cache line of an element that will be accessed soon; harmless past the end."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address = pointer_to(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        flags = [ir.Constant(_INT, value) for value in (0, 3, 1)]  # to read, to keep, data
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def take(typing: Any, table: Any, indices: Any) -> Any:  # noqa: ARG001
    """Return ``table[index]`` for each lane of ``indices`` (uint32)."""
    vector = Vector(table.dtype, indices.lanes)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        element = context.get_value_type(table.dtype)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        base = builder.ptrtoint(data, ir.IntType(64))
        wide = builder.zext(args[1], ir.VectorType(ir.IntType(64), vector.lanes))
        offsets = builder.mul(wide, ir.Constant(wide.type, [table.dtype.bitwidth // 8] * vector.lanes))
        bases = spread_value(context, builder, base, types.int64, Vector(types.int64, vector.lanes))
        pointers = builder.inttoptr(builder.add(offsets, bases), ir.VectorType(element.as_pointer(), vector.lanes))
        every = ir.Constant(ir.VectorType(ir.IntType(1), vector.lanes), [1] * vector.lanes)
        align = ir.Constant(_INT, table.dtype.bitwidth // 8)
        result = llvm_type(context, vector)
        name = f"llvm.masked.gather.{suffix(vector)}.v{vector.lanes}p0"
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
        source, to = signature.args[0], signature.args[2]
        word, lanes = ir.IntType(64), range(16)
        for half in (0, 16):
            places = [builder.add(args[1], ir.Constant(word, 32 * b + half)) for b in lanes]
            rows = [_read_floats(context, builder, source, (args[0], place), 16) for place in places]
            for step in (1, 2, 4, 8):  # a butterfly: swap the off-diagonal squares of this size
                low = ir.Constant(ir.VectorType(_INT, 16), [16 + i - step if i & step else i for i in lanes])
                high = ir.Constant(ir.VectorType(_INT, 16), [16 + i if i & step else i + step for i in lanes])
                for b in lanes:
                    if not b & step:
                        first, second = rows[b], rows[b + step]
                        rows[b] = builder.shuffle_vector(first, second, low)
                        rows[b + step] = builder.shuffle_vector(first, second, high)
            for i, row in enumerate(rows):
                _write(context, builder, to, (args[2], ir.Constant(word, 16 * (half + i)), row), 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, target), generate
