"""Q5_0 blocks in numpy. Twin of ``numba/q5_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import F32, U8, U16, Bools, first_largest, reciprocal, scales


def quantize(x: F32 | U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    return shared.quantize(_encode, x, blocks, 22, lanes)


def _encode(values: F32, packed: U8) -> tuple[F32, Bools, Bools]:
    scale = first_largest(values) * np.float32(-0.0625)
    inverse, usable = reciprocal(values, scale)
    shifted = np.where(usable, values * inverse + np.float32(16.5), np.float32(0))
    half = scale.astype(np.float16)
    codes = np.minimum(shifted.astype(np.int32), 31)
    packed[:, :2] = half.view(np.uint8)
    packed[:, 2:6] = np.packbits(codes >> 4, axis=1, bitorder="little")
    packed[:, 6:] = (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)
    return (codes - 16).astype(np.float32) * half.astype(np.float32), ~np.isfinite(half), half == 0


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 22 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 22)
    x.reshape(-1, 32)[:] = (_codes(packed).astype(np.float32) - 16) * scales(packed)


def code_histogram(blocks: U8, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` how often each of the 32 codes occurs."""
    counts += np.bincount(_codes(blocks.reshape(-1, 22)).ravel(), minlength=32)


def _codes(packed: U8) -> U8:
    low = packed[:, 6:]
    fifth = np.unpackbits(packed[:, 2:6], axis=1, bitorder="little")
    codes: U8 = np.hstack([low & 15, low >> 4]) | (fifth << 4)
    return codes
