"""Shared parts of the compiled kernels of block formats with a minimum: x = scale * code + minimum."""

from __future__ import annotations

import numpy as np
from numba import uint32

from qformat.kernels.numba.blocks import INFINITY_BITS, ZERO, reciprocal, too_large, too_small
from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.halves import half_to_float
from qformat.kernels.numba.simd import minimum, select_nonzero
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32, to_i32
from qformat.kernels.numba.simd_lanes import largest, pack_bits
from qformat.kernels.numba.simd_memory import store_as

HALF = np.float32(0.5)
ALL = 0xFFFFFFFF
SIGN = 0x80000000


@inline
def extremes(values):
    """Return the smallest of a block of 32 values (of several zeros the first) and the largest.

    ``largest - smallest`` is never a negative zero.
    """
    pattern = bits(values)
    order = select_nonzero(pattern & SIGN, pattern ^ ALL, pattern | SIGN)  # in the order of the floats, -0 below 0
    top = largest(order)
    bottom = uint32(~largest(order ^ ALL))
    high = from_bits(uint32(top ^ SIGN) if top & SIGN else uint32(~top))
    low = from_bits(uint32(bottom ^ SIGN) if bottom & SIGN else uint32(~bottom))
    if low == ZERO:
        zeros = uint32(~pack_bits(pattern & 0x7FFFFFFF))
        first = uint32(zeros & uint32(-zeros))
        low = -ZERO if pack_bits(pattern & SIGN) & first else ZERO
    return low, high


@inline
def naive_codes(values, low, scale, top):
    """Return the nearest codes from 0 to ``top``, a float; all are 0 if the scale or its reciprocal is 0, infinite or a NaN."""
    inverse = reciprocal(scale)
    codes = to_i32(minimum((values - low) * inverse + HALF, top))  # NaN becomes `top`
    return codes & (31 if np.int64(bits(inverse)) - 1 < INFINITY_BITS - 1 and inverse != ZERO else 0)


@inline
def store_line(blocks, at, scale, low, codes):
    """Store the binary16 scale and minimum of a block; return what `blocks.quantize_blocks` expects of it."""
    store_as(blocks, at, scale)
    store_as(blocks, at + 2, low)
    decoded = to_f32(codes) * half_to_float(scale) + half_to_float(low)
    return decoded, too_large(scale) or too_large(low), too_small(scale) and too_small(low)
