"""Q8_0 blocks, compiled. Twin of ``plain/q8_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.blocks import AHEAD, LANES, add_squares, keep_largest, reciprocal, usable
from qformat.kernels.jit.compiler import F32, U8, U16, kernel
from qformat.kernels.jit.halves import float_to_half, half_to_float
from qformat.kernels.jit.simd import (
    bits,
    from_bits,
    largest,
    load,
    load_as,
    load_f32,
    prefetch,
    select_nonzero,
    store,
    store_as,
    to_f32,
    to_i32,
    to_u8,
    zeros_u32,
)

LEVELS = np.float32(127.0)


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
        uint8, 34 bytes for each block: the result.
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
        scale = from_bits(top) / LEVELS
        inverse = reciprocal(scale)
        mask = usable(inverse, -1)
        half = float_to_half(scale)
        scaled = values * inverse
        size = from_bits(bits(scaled) & 0x7FFFFFFF)
        whole = to_i32(size)
        rest = size - to_f32(whole)
        rounded = whole + to_i32(rest + rest)  # halves go away from zero
        codes = select_nonzero(bits(scaled) >> 31, 0 - rounded, rounded) & mask
        store_as(blocks, 34 * block, half)
        store(blocks, 34 * block + 2, to_u8(codes))

        stored = half_to_float(half)
        error = values - to_f32(codes) * stored
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
        peak = max(peak, np.int64(top))
        overflowed += (half & 0x7FFF) >= 0x7C00
        vanished += (half & 0x7FFF) == 0 and top != 0
    store(lanes, 0, total)
    return peak, np.int64(largest(worst)), overflowed, vanished


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 34 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        scale = half_to_float(load_as(blocks, 34 * block, np.uint16(0)))
        codes = (to_i32(load(blocks, 34 * block + 2, 32)) << 24) >> 24  # the sign extended
        store(x, 32 * block, to_f32(codes) * scale)
