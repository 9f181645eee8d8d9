"""Q4_0 blocks in numpy. Twin of ``numba/q4_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import F32, U8, U16, Bools, first_largest, reciprocal, scales


def quantize(x: F32 | U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 18, lanes)


def encode(x: F32, scales: U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Do as `quantize` with chosen scales and the nearest codes."""
    return shared.quantize(_encode_nearest, x, blocks, 18, lanes, scales)


def _encode(values: F32, packed: U8) -> tuple[F32, Bools, Bools]:
    scale = first_largest(values) * np.float32(-0.125)
    inverse, usable = reciprocal(values, scale)
    shifted = np.where(usable, values * inverse + np.float32(8.5), np.float32(0))
    return _pack(scale.astype(np.float16), np.minimum(shifted.astype(np.int32), 15), packed)


def _encode_nearest(values: F32, packed: U8, scales: U16) -> tuple[F32, Bools, Bools]:
    half = scales.view(np.float16)[:, None]
    inverse, usable = reciprocal(values, half.astype(np.float32))
    shifted = np.where(usable, values * inverse + np.float32(8.5), np.float32(0))
    return _pack(half, np.clip(shifted.astype(np.int32), 0, 15), packed)


def _pack(half: NDArray[np.float16], codes: NDArray[np.int32], packed: U8) -> tuple[F32, Bools, Bools]:
    packed[:, :2] = half.view(np.uint8)
    packed[:, 2:] = codes[:, :16] | (codes[:, 16:] << 4)
    return (codes - 8).astype(np.float32) * half.astype(np.float32), ~np.isfinite(half), half == 0


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 18 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 18)
    codes = packed[:, 2:]
    values = x.reshape(-1, 32)
    values[:, :16] = ((codes & 15).astype(np.float32) - 8) * scales(packed)
    values[:, 16:] = ((codes >> 4).astype(np.float32) - 8) * scales(packed)


def code_histogram(blocks: U8, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    codes = blocks.reshape(-1, 18)[:, 2:]
    counts += np.bincount((codes & 15).ravel(), minlength=16) + np.bincount((codes >> 4).ravel(), minlength=16)
