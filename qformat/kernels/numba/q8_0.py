"""Q8_0 blocks, compiled: 34 bytes, a binary16 scale and 32 codes of int8; x = scale * code. Twin of ``numpy/q8_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import QUANTIZE, prefetch_block, quantize_blocks, reciprocal, store_scale, usable
from qformat.kernels.numba.compiler import U8, Step, kernel
from qformat.kernels.numba.halves import float_to_half, half_at
from qformat.kernels.numba.simd import select_nonzero
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32, to_i32, to_u8
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, store

LEVELS = np.float32(127.0)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    scale = from_bits(largest(bits(values) & 0x7FFFFFFF)) / LEVELS
    inverse = reciprocal(scale)
    scaled = values * inverse
    size = from_bits(bits(scaled) & 0x7FFFFFFF)
    whole = to_i32(size)
    fraction = size - to_f32(whole)
    rounded = whole + to_i32(fraction + fraction)  # halves go away from zero
    codes = select_nonzero(bits(scaled) >> 31, 0 - rounded, rounded) & usable(inverse, -1)
    store(blocks, 34 * block + 2, to_u8(codes))
    return store_scale(blocks, 34 * block, float_to_half(scale), codes)


@kernel(*QUANTIZE)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 34 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        codes = (to_i32(load(blocks, 34 * block + 2, 32)) << 24) >> 24  # the sign extended
        store(x, 32 * block, to_f32(codes) * half_at(blocks, 34 * block))
