"""binary16 in integer arithmetic, for other kernels to call.

LLVM turns its own ``half`` into F16C instructions or, on processors without them, into calls of a run-time library that numba does
not link, and the process crashes. These few operations give the same bits everywhere. No operand is a subnormal float32 that
matters, so a host process that flushes subnormals to zero changes nothing.
"""

from __future__ import annotations

import numpy as np
from numba import float32, uint16, uint32

from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.simd import greater_equal, select_nonzero
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32
from qformat.kernels.numba.simd_memory import load_as

HALF = np.float32(0.5)
HALF_BITS = 0x3F000000
SUBNORMAL_UNIT = np.float32(2.0**-24)
REBIAS = 112 << 23  # between the exponent biases of binary16 (15) and binary32 (127)


@inline
def half_to_float(half):
    """Return the float32 that equals a binary16 given as uint16."""
    magnitude = uint32(half & 0x7FFF)
    if magnitude < 0x400:
        value = bits(float32(magnitude) * SUBNORMAL_UNIT)
    elif magnitude < 0x7C00:
        value = uint32((magnitude << 13) + REBIAS)
    else:
        value = uint32((magnitude << 13) + 2 * REBIAS)
    return from_bits(uint32(value | (uint32(half & 0x8000) << 16)))


@inline
def half_at(array, at):
    """Return the float32 that equals the binary16 at byte ``at`` of a uint8 array."""
    return half_to_float(load_as(array, at, uint16(0)))


@inline
def float_to_half(x):
    """Return a float32 rounded to binary16 (nearest, ties to even) as uint16."""
    pattern = bits(x)
    magnitude = pattern & 0x7FFFFFFF
    if magnitude >= 0x47800000:  # 2^16 and above, infinity, NaN
        value = uint32(0x7E00) if magnitude > 0x7F800000 else uint32(0x7C00)
    elif magnitude >= 0x38800000:  # 2^-14: normal; a carry out of 65504 gives infinity
        value = uint32((magnitude + 0xFFF + ((magnitude >> 13) & 1) - REBIAS) >> 13)
    else:  # the addition of 0.5 rounds to a multiple of 2^-24, the distance of subnormal binary16 numbers
        value = uint32(bits(from_bits(uint32(magnitude)) + HALF) - HALF_BITS)
    return uint16(value | ((pattern >> 16) & 0x8000))


@inline
def halves_to_floats(halves):
    """Do as `half_to_float` for a vector of uint32 with a binary16 in each lane."""
    magnitude = halves & 0x7FFF
    normal = (magnitude << 13) + REBIAS
    special = normal + REBIAS
    subnormal = bits(to_f32(magnitude) * SUBNORMAL_UNIT)
    value = select_nonzero(greater_equal(magnitude, 0x400), normal, subnormal)
    value = select_nonzero(greater_equal(magnitude, 0x7C00), special, value)
    return from_bits(value | ((halves & 0x8000) << 16))


@inline
def floats_to_halves(x):
    """Do as `float_to_half` for a vector; the result has uint32 lanes."""
    pattern = bits(x)
    magnitude = pattern & 0x7FFFFFFF
    normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - REBIAS) >> 13
    subnormal = bits(from_bits(magnitude) + HALF) - HALF_BITS
    value = select_nonzero(greater_equal(magnitude, 0x38800000), normal, subnormal)
    infinity = (magnitude & 0) + 0x7C00
    value = select_nonzero(greater_equal(magnitude, 0x47800000), infinity, value)
    value = select_nonzero(greater_equal(magnitude, 0x7F800001), infinity + 0x200, value)
    return value | ((pattern >> 16) & 0x8000)
