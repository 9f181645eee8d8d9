"""Codes that name entries of codebooks, in numpy. Twin of ``numba/lut.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8
from qformat.kernels.numpy.blocks import LANES, add_error
from qformat.kernels.numpy.floats import add_rows, peak_f32
from qformat.kernels.numpy.packing import groups_of_runs, pack, unpack, valid_in_runs

_RUNS = 1 << 10  # at a time, so that temporary arrays stay in cache


@np.errstate(all="ignore")
def survey(x: F32, counts: I64, sums: F64) -> None:
    """Add how many values have each upper half of a pattern, and their sum."""
    finite = x[np.isfinite(x)]
    upper = finite.view(np.uint32) >> 16
    counts += np.bincount(upper, minlength=counts.size)
    # added one after the other to the sums so far, as the compiled kernel does
    every = np.concatenate([np.arange(sums.size), upper])
    sums[:] = np.bincount(every, np.concatenate([sums, finite.astype(np.float64)]), minlength=sums.size)


@np.errstate(all="ignore")
def row_squares(x: F32, padded: int, lanes: F64) -> None:
    """Add the squares of each row to 16 lanes of its own."""
    squares = (x * x).reshape(-1, padded // 32, 32)
    added = (squares[:, :, :16] + squares[:, :, 16:]).astype(np.float64)
    for row, target in zip(added, lanes.reshape(-1, LANES), strict=True):
        add_rows(row, target)


def _books_of_runs(padded: int, block: int, rows: int) -> I64:
    return groups_of_runs(padded, block or padded, rows) if block else np.zeros(rows * padded // 32, np.int64)


@np.errstate(all="ignore")
def encode(
    x: F32, cols: int, block: int, scales: F32, thresholds: F32, codebooks: F32, codes: U8, lanes: F64, width: int
) -> tuple[int, int]:
    """Write the codes, and measure the error."""
    padded = -(-cols // 32) * 32
    size = 1 << width
    runs = x.reshape(-1, 32)
    numbers = _books_of_runs(padded, block, scales.size)
    valid = valid_in_runs(padded, cols, scales.size)
    borders, books = thresholds.reshape(-1, size - 1), codebooks.reshape(-1, size)
    largest = 0
    for start in range(0, len(runs), _RUNS):
        here = slice(start, start + _RUNS)
        values, number = runs[here], numbers[here]
        scale = np.repeat(scales, padded // 32)[here, None]
        unscaled = values / scale
        chosen = np.zeros(values.shape, np.uint8)
        for i in range(size - 1):
            chosen += borders[number, i][:, None] < unscaled
        pack(chosen.ravel(), codes[4 * width * start : 4 * width * (start + len(values))], width)
        decoded = books[number[:, None], chosen] * scale
        inside = np.arange(32) < valid[here, None]
        largest = max(largest, add_error(np.where(inside, values - decoded, np.float32(0)), lanes))
    return peak_f32(x), largest


@np.errstate(all="ignore")
def dequantize(codebooks: F32, scales: F32, codes: U8, x: F32, padded: int, block: int, width: int) -> None:
    """Decode rows of `padded` elements, a multiple of 32."""
    numbers = _books_of_runs(padded, block, scales.size)
    chosen = np.empty(x.size, np.uint8)
    unpack(codes, chosen, width)
    entries = codebooks.reshape(-1, 1 << width)[numbers[:, None], chosen.reshape(-1, 32)]
    x.reshape(-1, 32)[:] = entries * np.repeat(scales, padded // 32)[:, None]
