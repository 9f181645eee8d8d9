"""Q4_1 blocks in numpy. Twin of ``numba/q4_1.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8, U16
from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import Encoded, reciprocal
from qformat.kernels.numpy.codes import count_codes, load_codes, store_codes
from qformat.kernels.numpy.minima import extremes, header, naive_codes, store_line


def quantize(x: F32 | U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale and minimum, and measure the error."""
    return shared.quantize(_encode, x, blocks, 20, lanes)


def encode(x: F32, scales: U16, minima: U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Do as `quantize` with chosen scales and minima and the nearest codes."""
    return shared.quantize(_encode_nearest, x, blocks, 20, lanes, scales, minima)


def _encode(values: F32, packed: U8) -> Encoded:
    low, high = extremes(values)
    scale = (high - low) / np.float32(15)
    codes = naive_codes(values, low, scale, 15)
    store_codes(packed[:, 4:], codes)
    return store_line(packed, scale.astype(np.float16), low.astype(np.float16), codes)


def _encode_nearest(values: F32, packed: U8, scales: U16, minima: U16) -> Encoded:
    scale, low = (array.view(np.float16)[:, None] for array in (scales, minima))
    inverse = reciprocal(scale.astype(np.float32))
    shifted = (values - low.astype(np.float32)) * inverse + np.float32(0.5)
    shifted = np.where(shifted < 15, shifted, np.float32(15))
    codes = np.where(shifted > 0, shifted, np.float32(0)).astype(np.uint8)
    store_codes(packed[:, 4:], codes)
    return store_line(packed, scale, low, codes)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 20 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 20)
    scale, low = header(packed)
    x.reshape(-1, 32)[:] = load_codes(packed[:, 4:]).astype(np.float32) * scale + low


def code_histogram(blocks: U8, counts: I64) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(load_codes(blocks.reshape(-1, 20)[:, 4:]), counts)
