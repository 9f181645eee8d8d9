"""Q5_1 blocks in numpy. Twin of ``numba/q5_1.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.numpy import blocks as shared
from qformat.kernels.numpy.blocks import F32, U8, U16, Bools
from qformat.kernels.numpy.minima import extremes, header, naive_codes


def quantize(x: F32 | U16, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale and minimum, and measure the error."""
    return shared.quantize(_encode, x, blocks, 24, lanes)


def _encode(values: F32, packed: U8) -> tuple[F32, Bools, Bools]:
    low, high = extremes(values)
    wide = (high - low) / np.float32(31)
    codes = naive_codes(values, low, wide, 31)
    scale, least = wide.astype(np.float16), low.astype(np.float16)
    packed[:, :2] = scale.view(np.uint8)
    packed[:, 2:4] = least.view(np.uint8)
    packed[:, 4:8] = np.packbits(codes >> 4, axis=1, bitorder="little")
    packed[:, 8:] = (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)
    decoded = codes.astype(np.float32) * scale.astype(np.float32) + least.astype(np.float32)
    return decoded, ~(np.isfinite(scale) & np.isfinite(least)), (scale == 0) & (least == 0)


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 24 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 24)
    scale, low = header(packed)
    x.reshape(-1, 32)[:] = _codes(packed).astype(np.float32) * scale + low


def code_histogram(blocks: U8, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` how often each of the 32 codes occurs."""
    counts += np.bincount(_codes(blocks.reshape(-1, 24)).ravel(), minlength=32)


def _codes(packed: U8) -> U8:
    low = packed[:, 8:]
    fifth = np.unpackbits(packed[:, 4:8], axis=1, bitorder="little")
    codes: U8 = np.hstack([low & 15, low >> 4]) | (fifth << 4)
    return codes
