"""Integers with a scale for each group of columns, in numpy. Twin of ``numba/affine.py``, which documents the functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F32, F64, U8, U32
from qformat.kernels.numpy.blocks import add_error, reciprocal
from qformat.kernels.numpy.floats import peak_f32
from qformat.kernels.numpy.packing import groups_of_runs, pack, unpack, valid_in_runs

ROUND = np.float32(3 << 22)
_RUNS = 1 << 10  # at a time, so that temporary arrays stay in cache


def nearest(values: F32, inverse: F32, low: F32, high: F32) -> F32:
    """Return ``values * inverse`` as the nearest integers from ``low`` to ``high``, in floats; ``low`` for a NaN."""
    scaled = values * inverse
    scaled = np.where(scaled > low, scaled, low)
    rounded: F32 = (np.where(scaled < high, scaled, high) + ROUND) - ROUND
    return rounded


@np.errstate(all="ignore")
def encode(
    x: F32, cols: int, group: int, scales: F32, zeros: U8, codes: U8, lanes: F64, width: int
) -> tuple[int, int, int]:
    """Write the nearest codes for given scales and zeros, and measure the error."""
    padded = -(-cols // 32) * 32
    runs = x.reshape(-1, 32)
    numbers = groups_of_runs(padded, group, x.size // padded)
    valid = valid_in_runs(padded, cols, x.size // padded)
    seen, made = (np.zeros(scales.size, bool) for _ in range(2))
    largest = 0
    for start in range(0, len(runs), _RUNS):
        here = slice(start, start + _RUNS)
        values, number = runs[here], numbers[here]
        scale = scales[number][:, None]
        zero = zeros[number][:, None].astype(np.int32)
        levels = nearest(
            values, reciprocal(scale), (-zero).astype(np.float32), ((1 << width) - 1 - zero).astype(np.float32)
        )
        stored = (levels.astype(np.int32) + zero).astype(np.uint8)
        pack(stored.ravel(), codes[4 * width * start : 4 * width * (start + len(values))], width)
        decoded = levels * scale
        error = np.where(np.arange(32) < valid[here, None], values - decoded, np.float32(0))
        largest = max(largest, add_error(error, lanes))
        seen[number[values.any(axis=1)]] = True
        made[number[decoded.any(axis=1)]] = True
    return peak_f32(x), largest, int((seen & ~made).sum())


@np.errstate(all="ignore")
def dequantize(scales: F32, zeros: U8, codes: U8, x: F32, padded: int, group: int, width: int) -> None:
    """Decode rows of `padded` elements, a multiple of 32."""
    numbers = groups_of_runs(padded, group, x.size // padded)
    levels: NDArray[Any] = np.empty(x.size, np.uint8)
    unpack(codes, levels, width)
    zero = zeros[numbers][:, None].astype(np.float32)
    x.reshape(-1, 32)[:] = (levels.reshape(-1, 32).astype(np.float32) - zero) * scales[numbers][:, None]


@np.errstate(all="ignore")
def dequantize_mapped(scales: F32, zeros: U8, places: U32, codes: U8, x: F32, width: int) -> None:
    """Decode rows of which column i is in group ``places[i]``."""
    rows, cols = x.shape
    levels = np.empty(rows * -(-cols // 32) * 32, np.uint8)
    unpack(codes, levels, width)
    numbers = levels.reshape(rows, -1)[:, :cols].astype(np.float32)
    x[:] = (numbers - zeros.reshape(rows, -1)[:, places].astype(np.float32)) * scales.reshape(rows, -1)[:, places]
