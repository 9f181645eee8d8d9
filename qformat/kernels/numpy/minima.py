"""Shared parts of the numpy kernels of block formats with a minimum. Twin of ``numba/minima.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F16, F32, U8
from qformat.kernels.numpy.blocks import Encoded, reciprocal


def extremes(values: F32) -> tuple[F32, F32]:
    """Return the smallest of each block (of several zeros the first) and the largest, as columns."""
    pattern = values.view(np.uint32)
    order = np.where(pattern >> 31 != 0, ~pattern, pattern | np.uint32(1 << 31))
    low, high = (np.take_along_axis(values, at[:, None], axis=1) for at in (order.argmin(axis=1), order.argmax(axis=1)))
    zero = np.take_along_axis(values, (values == 0).argmax(axis=1)[:, None], axis=1)
    return np.where(low == 0, zero, low), high


def naive_codes(values: F32, low: F32, scale: F32, top: int) -> U8:
    """Return the nearest codes from 0 to ``top``; all are 0 if the scale or its reciprocal is 0, infinite or a NaN."""
    inverse = reciprocal(scale)
    usable = (inverse > 0) & np.isfinite(inverse)
    shifted = (values - low) * inverse + np.float32(0.5)
    codes: U8 = np.where(usable, np.where(shifted < top, shifted, np.float32(top)), np.float32(0)).astype(np.uint8)
    return codes


def header(packed: U8) -> tuple[F32, F32]:
    """Return the scales and the minima that the blocks begin with, as columns."""
    halves = np.ascontiguousarray(packed[:, :4]).view(np.float16).astype(np.float32)
    return halves[:, :1], halves[:, 1:]


def store_line(packed: U8, scale: F16, low: F16, codes: U8) -> Encoded:
    """Store the scales and minima of blocks."""
    packed[:, :2] = scale.view(np.uint8)
    packed[:, 2:4] = low.view(np.uint8)
    decoded = codes.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)
    return decoded, ~(np.isfinite(scale) & np.isfinite(low)), (scale == 0) & (low == 0)
