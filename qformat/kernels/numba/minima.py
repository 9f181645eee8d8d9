"""What the compiled kernels of the block formats with a minimum share."""

from __future__ import annotations

import numpy as np
from numba import uint32

from qformat.kernels.numba.blocks import INFINITY_BITS, ZERO, reciprocal
from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.simd import minimum, select_nonzero
from qformat.kernels.numba.simd_casts import bits, from_bits, to_i32
from qformat.kernels.numba.simd_lanes import largest, pack_bits

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
    """Return codes 0 to ``top``, a float; all are 0 if the scale or its reciprocal is not a number to divide by."""
    inverse = reciprocal(scale)
    codes = to_i32(minimum((values - low) * inverse + HALF, top))  # NaN becomes `top`
    return codes & (31 if np.int64(bits(inverse)) - 1 < INFINITY_BITS - 1 and inverse != ZERO else 0)
