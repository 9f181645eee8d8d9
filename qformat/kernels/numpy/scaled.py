"""Integers with float scales and zeros, in numpy. Twin of ``numba/scaled.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, U8, U32
from qformat.kernels.numpy.packing import unpack


@np.errstate(all="ignore")
def dequantize(
    scales: F32, zeros: F32, bands: U32, codes: U8, x: F32, group: int, width: int, offset: int, subtract: bool
) -> None:
    """Decode rows, of which row i has the scales and zeros of band ``bands[i]``."""
    rows, cols = x.shape
    if not x.size:
        return
    levels = np.empty(rows * -(-cols // 32) * 32, np.uint8)
    unpack(codes, levels, width)
    x[:] = levels.reshape(rows, -1)[:, :cols]
    x -= np.float32(offset)
    places = np.arange(cols) // group
    groups = int(places[-1]) + 1
    scale, zero = (numbers.reshape(-1, groups)[bands][:, places] for numbers in (scales, zeros))
    if subtract:
        x -= zero
        x *= scale
    else:
        x *= scale
        x += zero
