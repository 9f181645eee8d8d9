"""Q4_0 blocks, compiled. Twin of ``plain/q4_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.blocks import quantize_blocks, reciprocal, too_large, too_small, usable
from qformat.kernels.jit.compiler import F32, U8, U16, callback, inline, kernel
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
    low_half,
    maximum,
    minimum,
    store,
    store_as,
    to_f32,
    to_i32,
    to_u8,
)

EIGHTH = np.float32(-0.125)


@callback
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    magnitudes = bits(values) & 0x7FFFFFFF
    scale = float_at(x, 32 * block + first_equal(magnitudes, largest(magnitudes))) * EIGHTH
    inverse = reciprocal(scale)
    half = float_to_half(scale)
    codes = minimum(to_i32(values * inverse + 8.5), 15) & usable(inverse, 15)
    return _pack(block, half, codes, blocks)


@inline
def _pack(block, half, codes, blocks):
    store_as(blocks, 18 * block, half)
    packed = to_u8(codes)
    store(blocks, 18 * block + 2, low_half(packed) | (high_half(packed) << 4))
    return to_f32(codes - 8) * half_to_float(half), too_large(half), too_small(half)


@kernel(
    f"UniTuple(int64, 4)({F32}, uint8[::1], float64[::1])",
    f"UniTuple(int64, 4)({U16}, uint8[::1], float64[::1])",
)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@callback
def _encode_nearest(x, block, values, blocks, scales):  # noqa: ARG001
    half = scales[block]
    inverse = reciprocal(half_to_float(half))
    codes = maximum(minimum(to_i32(values * inverse + 8.5), 15), 0)
    return _pack(block, half, codes, blocks)


@kernel(f"UniTuple(int64, 4)({F32}, {U16}, uint8[::1], float64[::1])")
def encode(x, scales, blocks, lanes):
    """Do as `quantize` with the binary16 scales that a search has chosen, and with the nearest codes."""
    return quantize_blocks(x, blocks, lanes, _encode_nearest, scales)


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
