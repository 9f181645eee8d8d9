"""Q5_1 blocks, compiled. Twin of ``numpy/q5_1.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import (
    count_codes_5,
    load_codes_5,
    prefetch_block,
    quantize_blocks,
    store_codes_5,
    too_large,
    too_small,
)
from qformat.kernels.numba.compiler import F32, U8, U16, Step, kernel
from qformat.kernels.numba.halves import float_to_half, half_to_float
from qformat.kernels.numba.minima import extremes, naive_codes
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import load_as, store, store_as

TOP = np.float32(31.0)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    low, high = extremes(values)
    wide = (high - low) / TOP
    codes = naive_codes(values, low, wide, TOP)
    scale, least = float_to_half(wide), float_to_half(low)
    store_as(blocks, 24 * block, scale)
    store_as(blocks, 24 * block + 2, least)
    store_codes_5(blocks, 24 * block + 4, codes)
    decoded = to_f32(codes) * half_to_float(scale) + half_to_float(least)
    return decoded, too_large(scale) or too_large(least), too_small(scale) and too_small(least)


@kernel(
    f"UniTuple(int64, 4)({F32}, uint8[::1], float64[::1])",
    f"UniTuple(int64, 4)({U16}, uint8[::1], float64[::1])",
)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale and minimum; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 24 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        scale = half_to_float(load_as(blocks, 24 * block, np.uint16(0)))
        low = half_to_float(load_as(blocks, 24 * block + 2, np.uint16(0)))
        codes = load_codes_5(blocks, 24 * block + 4)
        store(x, 32 * block, to_f32(to_i32(codes)) * scale + low)


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes_5(blocks, 24, 4, counts)
