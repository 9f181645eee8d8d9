"""Q5_1 blocks, compiled: 24 bytes, a binary16 scale, a binary16 minimum and 32 codes of 5 bits; x = scale * code + minimum.

Twin of ``numpy/q5_1.py``.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import QUANTIZE, prefetch_block, quantize_blocks
from qformat.kernels.numba.codes import count_codes_5, load_codes_5, store_codes_5
from qformat.kernels.numba.compiler import U8, Step, kernel
from qformat.kernels.numba.halves import float_to_half, half_at
from qformat.kernels.numba.minima import extremes, naive_codes, store_line
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import store

TOP = np.float32(31.0)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    low, high = extremes(values)
    scale = (high - low) / TOP
    codes = naive_codes(values, low, scale, TOP)
    store_codes_5(blocks, 24 * block + 4, codes)
    return store_line(blocks, 24 * block, float_to_half(scale), float_to_half(low), codes)


@kernel(*QUANTIZE)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale and minimum; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 24 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        codes = to_f32(to_i32(load_codes_5(blocks, 24 * block + 4)))
        store(x, 32 * block, codes * half_at(blocks, 24 * block) + half_at(blocks, 24 * block + 2))


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes_5(blocks, 24, 4, counts)
