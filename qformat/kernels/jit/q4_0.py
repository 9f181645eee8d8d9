"""Q4_0 blocks, compiled. Twin of ``plain/q4_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.blocks import AHEAD, LANES, add_squares, keep_largest, reciprocal, usable
from qformat.kernels.jit.compiler import F32, U8, U16, kernel
from qformat.kernels.jit.halves import float_to_half, half_to_float
from qformat.kernels.jit.simd import (
    bits,
    first_equal,
    float_at,
    high_half,
    join,
    largest,
    load,
    load_as,
    load_f32,
    low_half,
    minimum,
    prefetch,
    store,
    store_as,
    to_f32,
    to_i32,
    to_u8,
    zeros_u32,
)

EIGHTH = np.float32(-0.125)


@kernel(
    f"UniTuple(int64, 4)({F32}, uint8[::1], float64[::1])",
    f"UniTuple(int64, 4)({U16}, uint8[::1], float64[::1])",
)
def quantize(x, blocks, lanes):
    """Quantize blocks of 32 with the naive scale, and measure the error.

    Parameters
    ----------
    x
        float32, or bfloat16 patterns as uint16; a multiple of 32 elements.
    blocks
        uint8, 18 bytes for each block: the result.
    lanes
        float64, `LANES` elements: the squared errors of elements i and i + 16 of each block, added as float32, are added to lane i.

    Returns
    -------
    tuple of int
        Bits of the largest magnitude of ``x`` (at least those of infinity if ``x`` is not finite) and of the largest error;
        number of blocks whose scale overflows binary16; number of blocks, not all zero, whose scale vanishes in binary16.
    """
    peak = np.int64(0)
    overflowed = np.int64(0)
    vanished = np.int64(0)
    total = load(lanes, 0, LANES)
    worst = zeros_u32(32)
    for block in range(x.size // 32):
        prefetch(x, 32 * block + AHEAD)
        prefetch(x, 32 * block + AHEAD + 16)
        values = load_f32(x, 32 * block, 32)
        magnitudes = bits(values) & 0x7FFFFFFF
        top = largest(magnitudes)
        scale = float_at(x, 32 * block + first_equal(magnitudes, top)) * EIGHTH
        inverse = reciprocal(scale)
        mask = usable(inverse, 15)
        half = float_to_half(scale)
        codes = minimum(to_i32(values * inverse + 8.5), 15) & mask
        store_as(blocks, 18 * block, half)
        packed = to_u8(codes)
        store(blocks, 18 * block + 2, low_half(packed) | (high_half(packed) << 4))

        stored = half_to_float(half)
        error = values - to_f32(codes - 8) * stored
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
        peak = max(peak, np.int64(top))
        overflowed += (half & 0x7FFF) >= 0x7C00
        vanished += (half & 0x7FFF) == 0 and top != 0
    store(lanes, 0, total)
    return peak, np.int64(largest(worst)), overflowed, vanished


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 18 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        scale = half_to_float(load_as(blocks, 18 * block, np.uint16(0)))
        packed = load(blocks, 18 * block + 2, 16)
        codes = join(packed & 15, packed >> 4)
        store(x, 32 * block, to_f32(to_i32(codes) - 8) * scale)


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 16 codes occurs."""
    for block in range(blocks.size // 18):
        for i in range(18 * block + 2, 18 * block + 18):
            counts[blocks[i] & 15] += 1
            counts[blocks[i] >> 4] += 1
