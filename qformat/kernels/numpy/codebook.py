"""Codes that select entries of one table, in numpy. Twin of ``numba/codebook.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, I64, U8
from qformat.kernels.numpy.packing import unpack

_ELEMENTS = 1 << 18  # at a time, so that temporary arrays stay small


@np.errstate(all="ignore")
def dequantize(
    table: F32, scales: F32, factor: np.float32, starts: I64, codes: U8, x: F32, group: int, width: int
) -> None:
    """Decode rows: the entry of each code times the scale of its group, and that times `factor`."""
    rows, cols = x.shape
    padded = -(-cols // 32) * 32
    step = max(1, _ELEMENTS // max(1, padded))
    column = np.arange(cols)
    for row in range(0, rows, step):
        here = slice(row, row + step)
        part = x[here]
        stored = np.empty(len(part) * padded, np.uint8)
        size = padded * width // 8
        unpack(codes[row * size : (row + len(part)) * size], stored, width)
        entries = table[stored.reshape(len(part), padded)[:, :cols]]
        part[:] = (entries * scales[(starts[here, None] + column) // max(1, group)]) * factor
