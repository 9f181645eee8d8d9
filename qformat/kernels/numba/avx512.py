"""AVX-512 instructions that portable vectors cannot express: 16 table lookups at once, and words dealt out to lanes in order."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qformat.kernels.numba.compiler import has_feature
from qformat.kernels.numba.simd import Vector, call_llvm
from qformat.kernels.numba.simd_memory import pointer_to

AVAILABLE = has_feature("avx512f")

_VECTOR = Vector(types.uint32, 16)
_INT = ir.IntType(32)
_INTS = ir.VectorType(_INT, 16)
_MASK = ir.VectorType(ir.IntType(1), 16)


@intrinsic
def gather(typing: Any, table: Any, indices: Any) -> Any:  # noqa: ARG001
    """Return the uint32 that begins at each index of a table of uint8 or uint32.

    Of a table of bytes, 4 are read for each lane: it needs 3 bytes more than its largest index asks for.
    """
    scale = table.dtype.bitwidth // 8

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        first = ir.Constant(ir.IntType(64), 0)
        base = pointer_to(context, builder, signature.args[0], args[0], first, ir.IntType(8))
        zeros, every = ir.Constant(_INTS, None), ir.Constant(_MASK, [1] * 16)
        parts = [zeros, base, args[1], every, ir.Constant(_INT, scale)]
        return call_llvm(builder, "llvm.x86.avx512.mask.gather.dpi.512", _INTS, parts)

    return _VECTOR(table, indices), generate


@intrinsic
def refill(typing: Any, states: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Append a word to each state below 2^16, taking words in order from the bytes at ``index``; 32 bytes are read from there.

    Returns
    -------
    tuple of (vector, uint64)
        ``state * 2^16 + word`` in those lanes, the others unchanged; and the index after the last word taken.
    """
    result = types.Tuple([_VECTOR, types.uint64])

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        halves = ir.VectorType(ir.IntType(16), 16)
        loaded = builder.load(pointer_to(context, builder, signature.args[1], args[1], args[2], halves))
        loaded.align = 1
        words = builder.zext(loaded, _INTS)
        short = builder.icmp_unsigned("<", args[0], ir.Constant(_INTS, [1 << 16] * 16))
        shifted = builder.shl(args[0], ir.Constant(_INTS, [16] * 16))
        given = call_llvm(builder, "llvm.x86.avx512.mask.expand.v16i32", _INTS, [words, words, short])
        states = builder.select(short, builder.or_(shifted, given), args[0])
        bits = builder.bitcast(short, ir.IntType(16))
        count = builder.zext(builder.ctpop(bits), ir.IntType(64))
        stop = builder.add(args[2], builder.shl(count, ir.Constant(ir.IntType(64), 1)))
        return context.make_tuple(builder, result, (states, stop))

    return result(states, array, types.uint64), generate
