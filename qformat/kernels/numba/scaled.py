"""Integers with float scales and zeros, compiled. Twin of ``numpy/scaled.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U8, U32, kernel
from qformat.kernels.numba.packing import unpack_any
from qformat.kernels.numba.simd_casts import to_f32, to_i32
from qformat.kernels.numba.simd_memory import store


@kernel(f"void({F32}, {F32}, {U32}, {U8}, float32[:, ::1], int64, int64, int64, boolean)")
def dequantize(scales, zeros, bands, codes, x, group, width, offset, subtract):
    """Decode rows, of which row i has the scales and zeros of band ``bands[i]``, below scales.size // groups of a row.

    ``x`` has the true shape; the codes, of ``width`` bits, have rows padded to whole runs of 32. ``group`` columns share a scale,
    the last ones of a row may be fewer. A code less ``offset`` is multiplied by the scale and the zero is added; or, with
    ``subtract``, the zero is subtracted before.
    """
    rows, cols = x.shape
    runs = (cols + 31) // 32
    levels = np.empty(32 * runs, np.float32)
    groups = (cols + group - 1) // max(1, group)
    for row in range(rows):
        for run in range(runs):
            store(levels, 32 * run, to_f32(to_i32(unpack_any(codes, row * runs + run, width)) - np.int32(offset)))
        number = np.int64(bands[row]) * groups
        for start in range(0, cols, group):
            scale = scales[number]
            zero = zeros[number]
            number += 1
            if subtract:
                for col in range(start, min(start + group, cols)):
                    x[row, col] = (levels[col] - zero) * scale
            else:
                for col in range(start, min(start + group, cols)):
                    x[row, col] = levels[col] * scale + zero
