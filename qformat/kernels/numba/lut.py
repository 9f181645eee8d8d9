"""Codes that select entries of codebooks, compiled. Twin of ``numpy/lut.py``.

Rows are padded to whole runs of 32 elements. Each block of ``block`` columns, a multiple of 32, has a codebook of its own, with
2^width entries; if ``block`` is 0, one codebook serves all.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import LANES, add_squares, keep_largest, prefetch_block
from qformat.kernels.numba.compiler import F32, U8, kernel
from qformat.kernels.numba.packing import crop, pack_32, unpack_32
from qformat.kernels.numba.simd import select_less, spread_f32, zeros_u32
from qformat.kernels.numba.simd_casts import bits
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, store, take


@kernel(f"void({F32}, int64[::1], float64[::1])")
def survey(x, counts, sums):
    """Add to ``counts`` and ``sums`` (65536 each), for each pattern of the upper 16 bits of a float32, its values and their sum.

    Infinities and NaNs are skipped.
    """
    for i in range(x.size):
        upper = bits(x[i]) >> 16
        if (upper & 0x7FFF) < 0x7F80:
            counts[upper] += 1
            sums[upper] += np.float64(x[i])


@kernel(f"void({F32}, int64, float64[::1])")
def row_squares(x, padded, lanes):
    """Add the squares of each row of ``padded`` elements to 16 lanes of its own, in the order of `blocks.quantize_blocks`."""
    for row in range(x.size // padded):
        total = load(lanes, LANES * row, LANES)
        for at in range(row * padded, (row + 1) * padded, 32):
            total = add_squares(total, load(x, at, 32))
        store(lanes, LANES * row, total)


@kernel(f"UniTuple(int64, 2)({F32}, int64, int64, {F32}, {F32}, {F32}, uint8[::1], float64[::1], int64)")
def encode(x, cols, block, scales, thresholds, codebooks, codes, lanes, width):
    """Write the codes, and measure the error.

    Parameters
    ----------
    x
        float32: rows of ``cols`` elements, padded with zeros.
    scales
        For each row the factor of its entries.
    thresholds
        2^width - 1 for each codebook: a code is the number of thresholds below the value divided by its row's scale.
    codebooks
        The entries, ascending.
    codes, lanes, width
        As for `affine.encode`.

    Returns
    -------
    tuple of int
        Bits of the largest magnitude of ``x`` and of the largest error.
    """
    padded = (cols + 31) // 32 * 32
    size = 1 << width
    total = load(lanes, 0, LANES)
    peaks = zeros_u32(32)
    worst = zeros_u32(32)
    number = 0
    for row in range(x.size // padded):
        scale = spread_f32(scales[row], 32)
        for start in range(0, padded, block or padded):
            for col in range(start, min(start + (block or padded), padded), 32):
                at = row * padded + col
                values = load(x, at, 32)
                unscaled = values / scale
                chosen = zeros_u32(32)
                for i in range(number * (size - 1), (number + 1) * (size - 1)):
                    chosen = select_less(spread_f32(thresholds[i], 32), unscaled, chosen + 1, chosen)
                pack_32(chosen, codes, at // 32, width)
                decoded = take(codebooks, chosen + number * size) * scale
                error = values - decoded
                if col + 32 > cols:
                    error = crop(error, cols - col)
                total = add_squares(total, error)
                worst = keep_largest(worst, error)
                peaks = keep_largest(peaks, values)
            if block:
                number += 1
    store(lanes, 0, total)
    return np.int64(largest(peaks)), np.int64(largest(worst))


@kernel(f"void({F32}, {F32}, {U8}, float32[::1], int64, int64, int64)")
def dequantize(codebooks, scales, codes, x, padded, block, width):
    """Decode rows of ``padded`` elements, a multiple of 32."""
    size = 1 << width
    number = 0
    for row in range(x.size // padded):
        scale = scales[row]
        for start in range(0, padded, block or padded):
            for col in range(start, min(start + (block or padded), padded), 32):
                at = row * padded + col
                prefetch_block(x, at // 32)
                store(x, at, take(codebooks, unpack_32(codes, at // 32, width) + number * size) * scale)
            if block:
                number += 1
