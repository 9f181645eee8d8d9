"""Q5_0 blocks, compiled: 22 bytes, a binary16 scale and 32 codes of 5 bits; x = scale * (code - 16). Twin of ``numpy/q5_0.py``."""

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
from qformat.kernels.numba.codes import count_codes_5, load_codes_5, store_codes_5
from qformat.kernels.numba.compiler import U8, Step, kernel
from qformat.kernels.numba.halves import float_to_half, half_at
from qformat.kernels.numba.simd import minimum
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import store

SIXTEENTH = np.float32(-0.0625)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    scale = extreme(x, block, values) * SIXTEENTH
    inverse = reciprocal(scale)
    codes = minimum(to_i32(values * inverse + 16.5), 31) & usable(inverse, 31)
    store_codes_5(blocks, 22 * block + 2, codes)
    return store_scale(blocks, 22 * block, float_to_half(scale), codes - 16)


@kernel(*QUANTIZE)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 22 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        codes = to_i32(load_codes_5(blocks, 22 * block + 2)) - 16
        store(x, 32 * block, to_f32(codes) * half_at(blocks, 22 * block))


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes_5(blocks, 22, 2, counts)
