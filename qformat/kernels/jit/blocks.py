"""What the compiled kernels of block formats share."""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.compiler import inline
from qformat.kernels.jit.simd import bits, high_half, low_half, maximum, to_f64

LANES = 16
AHEAD = 1024  # elements to prefetch; the hardware's own prefetcher stops at each page
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
INFINITY_BITS = 0x7F800000


@inline
def reciprocal(scale):
    """Return 1 / scale, or 0 for a scale of 0."""
    return ONE / scale if scale != ZERO else ZERO


@inline
def usable(inverse, mask):
    """Return the mask for codes: none may be used where 1 / scale overflowed, as it does for subnormal scales."""
    return mask if (bits(inverse) & 0x7FFFFFFF) < INFINITY_BITS else 0


@inline
def add_squares(total, error):
    """Add squared errors of 32 elements to 16 sums: i and i + 16 together, first in float32."""
    squares = error * error
    return total + to_f64(low_half(squares) + high_half(squares))


@inline
def keep_largest(worst, error):
    """Return the larger magnitudes, as bit patterns."""
    return maximum(worst, bits(error) & 0x7FFFFFFF)
