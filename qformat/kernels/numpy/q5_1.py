"""Q5_1 blocks in numpy. Twin of ``numba/q5_1.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8, U16
from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import Encoded
from qformat.kernels.numpy.codes import count_codes, load_codes_5, store_codes_5
from qformat.kernels.numpy.minima import extremes, header, naive_codes, store_line


def quantize(x: F32 | U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale and minimum, and measure the error."""
    return shared.quantize(_encode, x, blocks, 24, lanes)


def _encode(values: F32, packed: U8) -> Encoded:
    low, high = extremes(values)
    scale = (high - low) / np.float32(31)
    codes = naive_codes(values, low, scale, 31)
    store_codes_5(packed[:, 4:], codes)
    return store_line(packed, scale.astype(np.float16), low.astype(np.float16), codes)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 24 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 24)
    scale, low = header(packed)
    x.reshape(-1, 32)[:] = load_codes_5(packed[:, 4:]).astype(np.float32) * scale + low


def code_histogram(blocks: U8, counts: I64) -> None:
    """Add to ``counts`` how often each of the 32 codes occurs."""
    count_codes(load_codes_5(blocks.reshape(-1, 24)[:, 4:]), counts)
