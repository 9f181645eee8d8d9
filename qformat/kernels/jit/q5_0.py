"""Q5_0 blocks, compiled. Twin of ``plain/q5_0.py``."""

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
    pack_bits,
    prefetch,
    store,
    store_as,
    to_f32,
    to_i32,
    to_u8,
    to_u32,
    unpack_bits,
    zeros_u32,
)

SIXTEENTH = np.float32(-0.0625)


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
        uint8, 22 bytes for each block: the result.
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
        scale = float_at(x, 32 * block + first_equal(magnitudes, top)) * SIXTEENTH
        inverse = reciprocal(scale)
        mask = usable(inverse, 31)
        half = float_to_half(scale)
        codes = minimum(to_i32(values * inverse + 16.5), 31) & mask
        store_as(blocks, 22 * block, half)
        store_as(blocks, 22 * block + 2, pack_bits(codes & 16))
        packed = to_u8(codes & 15)
        store(blocks, 22 * block + 6, low_half(packed) | (high_half(packed) << 4))

        stored = half_to_float(half)
        error = values - to_f32(codes - 16) * stored
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
        peak = max(peak, np.int64(top))
        overflowed += (half & 0x7FFF) >= 0x7C00
        vanished += (half & 0x7FFF) == 0 and top != 0
    store(lanes, 0, total)
    return peak, np.int64(largest(worst)), overflowed, vanished


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 22 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        scale = half_to_float(load_as(blocks, 22 * block, np.uint16(0)))
        packed = load(blocks, 22 * block + 6, 16)
        fifth = unpack_bits(load_as(blocks, 22 * block + 2, np.uint32(0))) << 4
        codes = to_u32(join(packed & 15, packed >> 4)) | fifth
        store(x, 32 * block, to_f32(to_i32(codes) - 16) * scale)


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 32 codes occurs."""
    for block in range(blocks.size // 22):
        fifth = load_as(blocks, 22 * block + 2, np.uint32(0))
        for i in range(16):
            both = blocks[22 * block + 6 + i]
            counts[(both & 15) | ((fifth >> i) & 1) << 4] += 1
            counts[(both >> 4) | ((fifth >> (i + 16)) & 1) << 4] += 1
