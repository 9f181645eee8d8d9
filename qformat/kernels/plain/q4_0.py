"""Q4_0 blocks in numpy. Twin of ``jit/q4_0.py``, which documents the functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.plain.floats import add_rows, peak_f32

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

LANES = 16
_CHUNK = 1 << 15  # elements at a time, so that temporary arrays stay in cache


@np.errstate(all="ignore")
def quantize(x: F32 | NDArray[np.uint16], blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Quantize blocks of 32 with the naive scale, and measure the error."""
    found = (0, 0, 0, 0)
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        values: F32 = (
            (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else part.view(np.float32)
        )
        peak, largest, overflowed, vanished = _quantize(
            values, blocks[start // 32 * 18 : (start + part.size) // 32 * 18], lanes
        )
        found = (max(found[0], peak), max(found[1], largest), found[2] + overflowed, found[3] + vanished)
    return found


@np.errstate(all="ignore")
def _quantize(x: F32, blocks: U8, lanes: NDArray[np.float64]) -> tuple[int, int, int, int]:
    values = x.reshape(-1, 32)
    packed = blocks.reshape(-1, 18)
    magnitudes = np.abs(values)
    first = magnitudes.view(np.uint32).argmax(axis=1)[:, None]
    scale = np.take_along_axis(values, first, axis=1) * np.float32(-0.125)
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    usable = np.isfinite(inverse) & np.isfinite(magnitudes).all(axis=1, keepdims=True)
    shifted = np.where(usable, values * inverse + np.float32(8.5), np.float32(0))
    half = scale.astype(np.float16)
    codes = np.minimum(shifted.astype(np.int32), 15)
    packed[:, :2] = half.view(np.uint8)
    packed[:, 2:] = codes[:, :16] | (codes[:, 16:] << 4)
    error = values - (codes - 8).astype(np.float32) * half.astype(np.float32)
    squares = error * error
    add_rows((squares[:, :16] + squares[:, 16:]).astype(np.float64), lanes)
    vanished = (half == 0) & np.any(values, axis=1, keepdims=True)
    return peak_f32(x), peak_f32(error.reshape(-1)), int((~np.isfinite(half)).sum()), int(vanished.sum())


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32) -> None:
    """Decode blocks of 18 bytes to 32 float32 each."""
    packed = blocks.reshape(-1, 18)
    scale = np.ascontiguousarray(packed[:, :2]).view(np.float16).astype(np.float32)
    codes = packed[:, 2:]
    values = x.reshape(-1, 32)
    values[:, :16] = ((codes & 15).astype(np.float32) - 8) * scale
    values[:, 16:] = ((codes >> 4).astype(np.float32) - 8) * scale


@np.errstate(all="ignore")
def code_histogram(blocks: U8, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    codes = blocks.reshape(-1, 18)[:, 2:]
    counts += np.bincount((codes & 15).ravel(), minlength=16) + np.bincount((codes >> 4).ravel(), minlength=16)
