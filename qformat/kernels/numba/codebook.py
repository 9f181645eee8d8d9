"""Codes that select entries of one table, compiled. Twin of ``numpy/codebook.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U8, kernel
from qformat.kernels.numba.packing import unpack_32
from qformat.kernels.numba.simd_memory import store, take


@kernel(f"void({F32}, {F32}, float32, int64[::1], {U8}, float32[:, ::1], int64, int64)")
def dequantize(table, scales, factor, starts, codes, x, group, width):
    """Decode rows: the entry of each code times the scale of its group, and that times ``factor``.

    Parameters
    ----------
    table
        2^width entries.
    scales
        One for each group.
    factor
        Factor of all products.
    starts
        For each row the position of its first element among those that groups are runs of; each element has a scale.
    codes
        Codes of ``width`` bits, in rows that are padded to whole runs of 32.
    x
        Result, in its true shape.
    group
        Elements of a group.
    width
        4 or 8.
    """
    rows, cols = x.shape
    runs = (cols + 31) // 32
    entries = np.empty(32 * runs, np.float32)
    for row in range(rows):
        for run in range(runs):
            store(entries, 32 * run, take(table, unpack_32(codes, row * runs + run, width)))
        number = starts[row] // group
        start = 0
        stop = (number + 1) * group - starts[row]
        while start < cols:
            scale = scales[number]
            stop = min(stop, cols)
            for col in range(start, stop):
                x[row, col] = (entries[col] * scale) * factor
            start = stop
            stop += group
            number += 1
