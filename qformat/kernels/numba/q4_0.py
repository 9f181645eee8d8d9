"""Q4_0 blocks, compiled: 18 bytes, a binary16 scale and 32 codes of 4 bits; x = scale * (code - 8). Twin of ``numpy/q4_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import (
    QUANTIZE,
    extreme,
    prefetch_block,
    quantize_blocks,
    reciprocal,
    store_scale,
    usable,
)
from qformat.kernels.numba.codes import count_codes, load_codes, store_codes
from qformat.kernels.numba.compiler import F32, U8, U16, Step, inline, kernel
from qformat.kernels.numba.halves import float_to_half, half_at, half_to_float
from qformat.kernels.numba.simd import maximum, minimum
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import store

EIGHTH = np.float32(-0.125)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    scale = extreme(x, block, values) * EIGHTH
    inverse = reciprocal(scale)
    codes = minimum(to_i32(values * inverse + 8.5), 15) & usable(inverse, 15)
    return _pack(block, float_to_half(scale), codes, blocks)


@inline
def _pack(block, half, codes, blocks):
    store_codes(blocks, 18 * block + 2, codes)
    return store_scale(blocks, 18 * block, half, codes - 8)


@kernel(*QUANTIZE)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@Step
def _encode_nearest(x, block, values, blocks, scales):  # noqa: ARG001
    half = scales[block]
    codes = maximum(minimum(to_i32(values * reciprocal(half_to_float(half)) + 8.5), 15), 0)
    return _pack(block, half, codes, blocks)


@kernel(f"UniTuple(int64, 4)({F32}, {U16}, uint8[::1], float64[::1])")
def encode(x, scales, blocks, lanes):
    """Do as `quantize` with the binary16 scales that a search has chosen, and with the nearest codes."""
    return quantize_blocks(x, blocks, lanes, _encode_nearest, scales)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 18 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        codes = to_i32(load_codes(blocks, 18 * block + 2)) - 8
        store(x, 32 * block, to_f32(codes) * half_at(blocks, 18 * block))


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(blocks, 18, 2, counts)
