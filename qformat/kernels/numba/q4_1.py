"""Q4_1 blocks, compiled: 20 bytes, a binary16 scale, a binary16 minimum and 32 codes of 4 bits; x = scale * code + minimum.

Twin of ``numpy/q4_1.py``.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import QUANTIZE, prefetch_block, quantize_blocks, reciprocal
from qformat.kernels.numba.codes import count_codes, load_codes, store_codes
from qformat.kernels.numba.compiler import F32, U8, U16, Step, inline, kernel
from qformat.kernels.numba.halves import float_to_half, half_at, half_to_float
from qformat.kernels.numba.minima import HALF, extremes, naive_codes, store_line
from qformat.kernels.numba.simd import maximum, minimum
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import store

TOP = np.float32(15.0)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    low, high = extremes(values)
    scale = (high - low) / TOP
    return _pack(block, float_to_half(scale), float_to_half(low), naive_codes(values, low, scale, TOP), blocks)


@inline
def _pack(block, scale, low, codes, blocks):
    store_codes(blocks, 20 * block + 4, codes)
    return store_line(blocks, 20 * block, scale, low, codes)


@kernel(*QUANTIZE)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale and minimum; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@Step
def _encode_nearest(x, block, values, blocks, chosen):  # noqa: ARG001
    scales, minima = chosen
    inverse = reciprocal(half_to_float(scales[block]))
    shifted = (values - half_to_float(minima[block])) * inverse + HALF
    codes = to_i32(maximum(minimum(shifted, TOP), np.float32(0.0)))
    return _pack(block, scales[block], minima[block], codes, blocks)


@kernel(f"UniTuple(int64, 4)({F32}, {U16}, {U16}, uint8[::1], float64[::1])")
def encode(x, scales, minima, blocks, lanes):
    """Do as `quantize` with the binary16 scales and minima that a search has chosen, and with the nearest codes."""
    return quantize_blocks(x, blocks, lanes, _encode_nearest, (scales, minima))


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 20 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        codes = to_f32(to_i32(load_codes(blocks, 20 * block + 4)))
        store(x, 32 * block, codes * half_at(blocks, 20 * block) + half_at(blocks, 20 * block + 2))


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(blocks, 20, 4, counts)
