"""Integers with a scale for each group of columns, compiled. Twin of ``numpy/affine.py``.

Rows are padded to whole runs of 32 elements; ``cols`` is their true length, ``group`` the columns of a group, a multiple of 32. The
arrays of scales (float32) and zeros (uint8) have a number for each group of each row, row by row.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import LANES, add_squares, keep_largest, prefetch_block, reciprocal
from qformat.kernels.numba.compiler import F32, U8, U32, inline, kernel
from qformat.kernels.numba.packing import crop, pack_32, unpack_32
from qformat.kernels.numba.simd import maximum, minimum, zeros_u32
from qformat.kernels.numba.simd_casts import bits, to_f32, to_i32, to_u32
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, store

ZERO = np.float32(0.0)
# added and subtracted again, it rounds what is small against it to an integer, ties to even
ROUND = np.float32(3 << 22)


@inline
def nearest(values, inverse, low, high):
    """Return ``values * inverse`` as the nearest integers from ``low`` to ``high``, in floats; ``low`` for a NaN."""
    return (minimum(maximum(values * inverse, low), high) + ROUND) - ROUND


@kernel(f"UniTuple(int64, 3)({F32}, int64, int64, {F32}, {U8}, uint8[::1], float64[::1], int64)")
def encode(x, cols, group, scales, zeros, codes, lanes, width):
    """Write the nearest codes of ``width`` bits for given scales and zeros, and measure the error.

    ``x`` are padded rows, ``codes`` has ``4 * width`` bytes for each run, ``lanes`` are those of `blocks.quantize_blocks`.

    Returns
    -------
    tuple of int
        Bits of the largest magnitude of ``x`` and of the largest error, as in `blocks.quantize_blocks`; number of groups, not all
        zero, that decode to zeros.
    """
    padded = (cols + 31) // 32 * 32
    total = load(lanes, 0, LANES)
    peaks = zeros_u32(32)
    worst = zeros_u32(32)
    zeroed = np.int64(0)
    number = 0
    for row in range(x.size // padded):
        for start in range(0, padded, group):
            scale = scales[number]
            inverse = reciprocal(scale)
            zero = np.int32(zeros[number])
            low = np.float32(-zero)
            high = np.float32((1 << width) - 1 - zero)
            seen = zeros_u32(32)
            made = zeros_u32(32)
            for col in range(start, min(start + group, padded), 32):
                at = row * padded + col
                values = load(x, at, 32)
                levels = nearest(values, inverse, low, high)
                pack_32(to_u32(to_i32(levels) + zero), codes, at // 32, width)
                decoded = levels * scale
                error = values - decoded
                if col + 32 > cols:
                    error = crop(error, cols - col)
                total = add_squares(total, error)
                worst = keep_largest(worst, error)
                seen = seen | bits(values)
                made = made | bits(decoded)
                peaks = keep_largest(peaks, values)
            if largest(made & 0x7FFFFFFF) == 0:
                zeroed += largest(seen & 0x7FFFFFFF) != 0
            number += 1
    store(lanes, 0, total)
    return np.int64(largest(peaks)), np.int64(largest(worst)), zeroed


@kernel(f"void({F32}, {U8}, {U8}, float32[::1], int64, int64, int64)")
def dequantize(scales, zeros, codes, x, padded, group, width):
    """Decode rows of ``padded`` elements, a multiple of 32."""
    number = 0
    for row in range(x.size // padded):
        for start in range(0, padded, group):
            scale = scales[number]
            zero = np.int32(zeros[number])
            number += 1
            for col in range(start, min(start + group, padded), 32):
                at = row * padded + col
                prefetch_block(x, at // 32)
                store(x, at, to_f32(to_i32(unpack_32(codes, at // 32, width)) - zero) * scale)


@kernel(f"void({F32}, {U8}, {U32}, {U8}, float32[:, ::1], int64)")
def dequantize_mapped(scales, zeros, places, codes, x, width):
    """Decode rows of which column i is in group ``places[i]``, below scales.size // rows; ``x`` has the true shape, not padded."""
    rows, cols = x.shape
    groups = scales.size // rows
    runs = (cols + 31) // 32
    levels = np.empty(32 * runs, np.float32)
    for row in range(rows):
        for run in range(runs):
            store(levels, 32 * run, to_f32(unpack_32(codes, row * runs + run, width)))
        first = row * groups
        for col in range(cols):
            number = first + np.int64(places[col])
            x[row, col] = (levels[col] - np.float32(zeros[number])) * scales[number]
