"""Q4_0 blocks in numpy. Twin of ``numba/q4_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F16, F32, F64, I64, U8, U16
from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import Encoded, first_largest, scales_of, store_scale, usable_reciprocal
from qformat.kernels.numpy.codes import count_codes, load_codes, store_codes


def quantize(x: F32 | U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 18, lanes)


def encode(x: F32, scales: U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Do as `quantize` with chosen scales and the nearest codes."""
    return shared.quantize(_encode_nearest, x, blocks, 18, lanes, scales)


def _encode(values: F32, packed: U8) -> Encoded:
    scale = first_largest(values) * np.float32(-0.125)
    return _pack(values, scale, scale.astype(np.float16), packed)


def _encode_nearest(values: F32, packed: U8, scales: U16) -> Encoded:
    half = scales.view(np.float16)[:, None]
    return _pack(values, half.astype(np.float32), half, packed)


def _pack(values: F32, scale: F32, half: F16, packed: U8) -> Encoded:
    inverse, usable = usable_reciprocal(values, scale)
    shifted = np.where(usable, values * inverse + np.float32(8.5), np.float32(0))
    codes = np.clip(shifted.astype(np.int32), 0, 15)
    store_codes(packed[:, 2:], codes)
    return store_scale(packed, half, codes - 8)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 18 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 18)
    x.reshape(-1, 32)[:] = (load_codes(packed[:, 2:]).astype(np.float32) - 8) * scales_of(packed)


def code_histogram(blocks: U8, counts: I64) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(load_codes(blocks.reshape(-1, 18)[:, 2:]), counts)
