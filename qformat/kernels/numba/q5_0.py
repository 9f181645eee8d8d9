"""Q5_0 blocks, compiled. Twin of ``numpy/q5_0.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import (
    count_codes_5,
    load_codes_5,
    prefetch_block,
    quantize_blocks,
    reciprocal,
    store_codes_5,
    too_large,
    too_small,
    usable,
)
from qformat.kernels.numba.compiler import F32, U8, U16, Step, kernel
from qformat.kernels.numba.halves import float_to_half, half_to_float
from qformat.kernels.numba.simd import minimum
from qformat.kernels.numba.simd_casts import bits, to_f32, to_i32
from qformat.kernels.numba.simd_lanes import first_equal, largest
from qformat.kernels.numba.simd_memory import float_at, load_as, store, store_as

SIXTEENTH = np.float32(-0.0625)


@Step
def _encode_block(x, block, values, blocks, chosen):  # noqa: ARG001
    magnitudes = bits(values) & 0x7FFFFFFF
    scale = float_at(x, 32 * block + first_equal(magnitudes, largest(magnitudes))) * SIXTEENTH
    inverse = reciprocal(scale)
    half = float_to_half(scale)
    codes = minimum(to_i32(values * inverse + 16.5), 31) & usable(inverse, 31)
    store_as(blocks, 22 * block, half)
    store_codes_5(blocks, 22 * block + 2, codes)
    return to_f32(codes - 16) * half_to_float(half), too_large(half), too_small(half)


@kernel(
    f"UniTuple(int64, 4)({F32}, uint8[::1], float64[::1])",
    f"UniTuple(int64, 4)({U16}, uint8[::1], float64[::1])",
)
def quantize(x, blocks, lanes):
    """Quantize with the naive scale; see `blocks.quantize_blocks`."""
    return quantize_blocks(x, blocks, lanes, _encode_block, None)


@kernel(f"void({U8}, float32[::1])")
def dequantize(blocks, x):
    """Decode blocks of 22 bytes to 32 float32 each."""
    for block in range(x.size // 32):
        prefetch_block(x, block)
        scale = half_to_float(load_as(blocks, 22 * block, np.uint16(0)))
        codes = load_codes_5(blocks, 22 * block + 2)
        store(x, 32 * block, to_f32(to_i32(codes) - 16) * scale)


@kernel(f"void({U8}, int64[::1])")
def code_histogram(blocks, counts):
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes_5(blocks, 22, 2, counts)
