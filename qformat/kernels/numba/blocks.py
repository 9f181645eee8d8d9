"""Shared parts of the compiled kernels of block formats: blocks of 32 weights with binary16 scales and packed codes."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U16, inline, kernel
from qformat.kernels.numba.halves import half_to_float
from qformat.kernels.numba.simd import maximum, zeros_u32
from qformat.kernels.numba.simd_casts import bits, to_f32, to_f64
from qformat.kernels.numba.simd_lanes import first_equal, high_half, largest, low_half
from qformat.kernels.numba.simd_memory import float_at, load, load_f32, prefetch, store, store_as

LANES = 16
PREFETCH_DISTANCE = 1024  # elements
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
INFINITY_BITS = 0x7F800000
#: signatures of ``quantize(x, blocks, lanes)``, of float32 and of bfloat16 patterns
QUANTIZE = tuple(f"UniTuple(int64, 4)({source}, uint8[::1], float64[::1])" for source in (F32, U16))


@inline
def quantize_blocks(x, blocks, lanes, encode_block, chosen):
    """Encode blocks of 32 one after the other, and measure the error.

    Parameters
    ----------
    x
        float32, or bfloat16 patterns as uint16; a multiple of 32 elements.
    blocks
        uint8: the result.
    lanes
        float64, `LANES` elements: the squared errors of elements i and i + 16 of each block, added as float32, are added to lane i.
    encode_block
        Compiled function of (x, number of the block, its values as a vector, ``blocks``, ``chosen``), which fills in the bytes of
        the block and returns (decoded values, whether a scale overflows, whether all that is stored is zero). A `compiler.Step`:
        numba compiles this loop anew for each.
    chosen
        Passed on to `encode_block`: the scales, say, that a search has chosen.

    Returns
    -------
    tuple of int
        Bits of the largest magnitude of ``x`` (at least those of infinity if ``x`` is not finite) and of the largest error;
        number of blocks whose scale overflows binary16; number of blocks, not all zero, whose scale is zero in binary16.
    """
    overflowed = np.int64(0)
    zeroed = np.int64(0)
    total = load(lanes, 0, LANES)
    peaks = zeros_u32(32)
    worst = zeros_u32(32)
    for block in range(x.size // 32):
        prefetch_block(x, block)
        values = load_f32(x, 32 * block, 32)
        decoded, too_large, too_small = encode_block(x, block, values, blocks, chosen)
        error = values - decoded
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
        peaks = keep_largest(peaks, values)
        overflowed += too_large
        if too_small:
            zeroed += largest(bits(values) & 0x7FFFFFFF) != 0
    store(lanes, 0, total)
    return np.int64(largest(peaks)), np.int64(largest(worst)), overflowed, zeroed


@inline
def prefetch_block(x, block):
    """Fetch the cache lines of a block that will be accessed soon; the hardware's own prefetcher stops at each page."""
    prefetch(x, 32 * block + PREFETCH_DISTANCE)
    prefetch(x, 32 * block + PREFETCH_DISTANCE + 16)


@inline
def extreme(x, block, values):
    """Return the first weight of largest magnitude of a block, with its sign."""
    magnitudes = bits(values) & 0x7FFFFFFF
    return float_at(x, 32 * block + first_equal(magnitudes, largest(magnitudes)))


@inline
def store_scale(blocks, at, half, levels):
    """Store the scale of a block; return what `quantize_blocks` expects of a block that decodes to scale * levels (int32)."""
    store_as(blocks, at, half)
    return to_f32(levels) * half_to_float(half), too_large(half), too_small(half)


@inline
def too_large(half):
    """Return whether a binary16 is infinite or a NaN."""
    return (half & 0x7FFF) >= 0x7C00


@inline
def too_small(half):
    """Return whether a binary16 is a zero."""
    return (half & 0x7FFF) == 0


@inline
def reciprocal(scale):
    """Return 1 / scale, or 0 for a scale of 0."""
    return ONE / scale if scale != ZERO else ZERO


@inline
def usable(inverse, mask):
    """Return ``mask`` for codes, or 0 where 1 / scale is infinite, as for subnormal scales, or a NaN: codes would be undefined."""
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


@kernel(f"int64({F32}, {F32}, float64[::1])")
def measure(x, decoded, lanes):
    """Add the squared errors of whole blocks to ``lanes`` as `quantize_blocks` does; return the bits of the largest error."""
    total = load(lanes, 0, LANES)
    worst = zeros_u32(32)
    for i in range(0, x.size // 32 * 32, 32):
        error = load(x, i, 32) - load(decoded, i, 32)
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
    store(lanes, 0, total)
    return np.int64(largest(worst))
