"""Q4_1 blocks in numpy. Twin of ``numba/q4_1.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import F32, U8, U16, Bools
from qformat.kernels.numpy.minima import extremes, header, naive_codes

F16 = NDArray[np.float16]


def quantize(x: F32 | U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale and minimum, and measure the error."""
    return shared.quantize(_encode, x, blocks, 20, lanes)


def encode(x: F32, scales: U16, minima: U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Do as `quantize` with chosen scales and minima and the nearest codes."""
    return shared.quantize(_encode_nearest, x, blocks, 20, lanes, scales, minima)


def _encode(values: F32, packed: U8) -> tuple[F32, Bools, Bools]:
    low, high = extremes(values)
    scale = (high - low) / np.float32(15)
    return _pack(scale.astype(np.float16), low.astype(np.float16), naive_codes(values, low, scale, 15), packed)


def _encode_nearest(values: F32, packed: U8, scales: U16, minima: U16) -> tuple[F32, Bools, Bools]:
    scale, low = (array.view(np.float16)[:, None] for array in (scales, minima))
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale.astype(np.float32))
    shifted = (values - low.astype(np.float32)) * inverse + np.float32(0.5)
    shifted = np.where(shifted < 15, shifted, np.float32(15))
    return _pack(scale, low, np.where(shifted > 0, shifted, np.float32(0)).astype(np.uint8), packed)


def _pack(scale: F16, low: F16, codes: U8, packed: U8) -> tuple[F32, Bools, Bools]:
    packed[:, :2] = scale.view(np.uint8)
    packed[:, 2:4] = low.view(np.uint8)
    packed[:, 4:] = codes[:, :16] | (codes[:, 16:] << 4)
    decoded = codes.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)
    return decoded, ~(np.isfinite(scale) & np.isfinite(low)), (scale == 0) & (low == 0)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 20 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 20)
    scale, low = header(packed)
    codes = packed[:, 4:]
    values = x.reshape(-1, 32)
    values[:, :16] = (codes & 15).astype(np.float32) * scale + low
    values[:, 16:] = (codes >> 4).astype(np.float32) * scale + low


def code_histogram(blocks: U8, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    codes = blocks.reshape(-1, 20)[:, 4:]
    counts += np.bincount((codes & 15).ravel(), minlength=16) + np.bincount((codes >> 4).ravel(), minlength=16)
