"""Q8_0 blocks in numpy. Twin of ``numba/q8_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, U8, U16
from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import Encoded, scales_of, store_scale, usable_reciprocal


def quantize(x: F32 | U16, blocks: U8, lanes: F64) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 34, lanes)


def _encode(values: F32, packed: U8) -> Encoded:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    inverse, usable = usable_reciprocal(values, scale)
    scaled = np.where(usable, values * inverse, np.float32(0))
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = whole + np.floor(2 * (size - whole))  # halves go away from zero
    codes = np.where(scaled < 0, -rounded, rounded).astype(np.int8)
    packed[:, 2:] = codes.view(np.uint8)
    return store_scale(packed, scale.astype(np.float16), codes)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 34 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 34)
    x.reshape(-1, 32)[:] = packed[:, 2:].view(np.int8).astype(np.float32) * scales_of(packed)
