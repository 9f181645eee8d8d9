"""Q5_0 blocks in numpy. Twin of ``numba/q5_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8, U16
from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import Encoded, first_largest, scales_of, store_scale, usable_reciprocal
from qformat.kernels.numpy.codes import count_codes, load_codes_5, store_codes_5


def quantize(x: F32 | U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 22, lanes)


def _encode(values: F32, packed: U8) -> Encoded:
    scale = first_largest(values) * np.float32(-0.0625)
    inverse, usable = usable_reciprocal(values, scale)
    shifted = np.where(usable, values * inverse + np.float32(16.5), np.float32(0))
    codes = np.minimum(shifted.astype(np.int32), 31)
    store_codes_5(packed[:, 2:], codes)
    return store_scale(packed, scale.astype(np.float16), codes - 16)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 22 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 22)
    x.reshape(-1, 32)[:] = (load_codes_5(packed[:, 2:]).astype(np.float32) - 16) * scales_of(packed)


def code_histogram(blocks: U8, counts: I64) -> None:
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes(load_codes_5(blocks.reshape(-1, 22)[:, 2:]), counts)
