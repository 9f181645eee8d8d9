"""Q8_0 blocks in numpy. Twin of ``numba/q8_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import F32, U8, U16, Bools, reciprocal, scales


def quantize(x: F32 | U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 34, lanes)


def _encode(values: F32, packed: U8) -> tuple[F32, Bools, Bools]:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    inverse, usable = reciprocal(values, scale)
    scaled = np.where(usable, values * inverse, np.float32(0))
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = whole + np.floor(2 * (size - whole))  # halves go away from zero
    codes = np.where(scaled < 0, -rounded, rounded).astype(np.int8)
    half = scale.astype(np.float16)
    packed[:, :2] = half.view(np.uint8)
    packed[:, 2:] = codes.view(np.uint8)
    return codes.astype(np.float32) * half.astype(np.float32), ~np.isfinite(half), half == 0


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 34 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 34)
    x.reshape(-1, 32)[:] = packed[:, 2:].view(np.int8).astype(np.float32) * scales(packed)
