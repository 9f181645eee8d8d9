"""Conversions between float formats, largest magnitudes and errors, in numpy. Twin of ``numba/floats.py``, which documents it."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U16

LANES = 32


@np.errstate(all="ignore")
def bf16_to_f32(source: U16, target: F32) -> None:
    """Widen bfloat16."""
    np.left_shift(source, 16, out=target.view(np.uint32), dtype=np.uint32)


@np.errstate(all="ignore")
def f16_to_f32(source: U16, target: F32) -> None:
    """Widen binary16."""
    target[:] = source.view(np.float16)


@np.errstate(all="ignore")
def f32_to_bf16(source: F32, target: U16) -> None:
    """Round to bfloat16, ties to even; a NaN stays one."""
    pattern = source.view(np.uint32)
    rounded = (pattern.astype(np.uint64) + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    target[:] = np.where(np.isnan(source), (pattern >> 16) | 0x40, rounded)


@np.errstate(all="ignore")
def f32_to_f16(source: F32, target: U16) -> None:
    """Round to binary16, ties to even; values from 65520 on become infinite."""
    halves = source.astype(np.float16).view(np.uint16)
    target[:] = np.where(np.isnan(source), (halves & 0x8000) | 0x7E00, halves)


@np.errstate(all="ignore")
def peak_f32(x: F32) -> int:
    """Return the bit pattern of the largest magnitude."""
    return int((x.view(np.uint32) & 0x7FFFFFFF).max(initial=0))


@np.errstate(all="ignore")
def peak_16(x: U16) -> int:
    """Do as `peak_f32` for binary16 or bfloat16 patterns."""
    return int((x & 0x7FFF).max(initial=0))


@np.errstate(all="ignore")
def difference(x: F32, y: F32, lanes: F64) -> int:
    """Add the squares of ``x - y`` to ``lanes``; return the bits of the largest ``|x - y|``."""
    error = x - y
    add_squares(error, lanes)
    return peak_f32(error)


def add_squares(error: F32, lanes: F64) -> None:
    """Add squares to the lanes, element i to lane i mod 32, as the compiled kernels do."""
    squares = error.astype(np.float64) ** 2
    whole = squares.size // LANES * LANES
    add_rows(squares[:whole].reshape(-1, LANES), lanes)
    lanes[: squares.size - whole] += squares[whole:]


def add_rows(rows: F64, lanes: F64) -> None:
    """Add rows to the lanes, one after the other."""
    lanes[:] = np.add.reduce(np.vstack([lanes[None], rows]), axis=0)


@np.errstate(all="ignore")
def error_histogram(x: F32, y: F32, counts: I64) -> None:
    """Count ``|x - y|`` in 2^19 buckets by the upper bits of the float32 pattern."""
    buckets = ((x - y).view(np.uint32) & 0x7FFFFFFF) >> 12
    counts += np.bincount(buckets, minlength=counts.size)
