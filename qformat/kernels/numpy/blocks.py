"""Shared parts of the numpy kernels of block formats. Twin of ``numba/blocks.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F16, F32, F64, U8, U16, Bools
from qformat.kernels.numpy.floats import add_rows, peak_f32

_Float = TypeVar("_Float", np.float32, np.float64)
#: of some blocks: the decoded values, where a scale overflows binary16, and where all that is stored is zero
Encoded = tuple[F32, Bools, Bools]
#: takes blocks of 32 values and, for each, what a search has chosen; fills in their bytes
Encode = Callable[..., Encoded]

LANES = 16
_CHUNK = 1 << 15  # elements at a time, so that temporary arrays stay in cache


@np.errstate(all="ignore")
def quantize(
    encode: Encode, x: F32 | U16, blocks: U8, block_bytes: int, lanes: F64, *chosen: NDArray[Any]
) -> tuple[int, int, int, int]:
    """Encode blocks of 32 and measure the error; the arguments and results are those of a compiled ``quantize``."""
    packed = blocks.reshape(-1, block_bytes)
    peak = largest = overflowed = zeroed = 0
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        source: F32 = (
            (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else part.view(np.float32)
        )
        values = source.reshape(-1, 32)
        here = slice(start // 32, start // 32 + len(values))
        decoded, too_large, too_small = encode(values, packed[here], *(array[here] for array in chosen))
        error = values - decoded
        peak = max(peak, peak_f32(source))
        largest = max(largest, add_error(error, lanes))
        overflowed += int(too_large.sum())
        zeroed += int((too_small.reshape(-1) & values.any(axis=1)).sum())
    return peak, largest, overflowed, zeroed


@np.errstate(all="ignore")
def measure(x: F32, decoded: F32, lanes: F64) -> int:
    """Add the squared errors of whole blocks to ``lanes``; return the bits of the largest error."""
    return add_error(x - decoded, lanes)


def add_error(error: F32, lanes: F64) -> int:
    """Add the squares of errors, taken 32 by 32, to ``lanes``; return the bits of the largest."""
    squares = (error * error).reshape(-1, 32)
    add_rows((squares[:, :16] + squares[:, 16:]).astype(np.float64), lanes)
    return peak_f32(error.reshape(-1))


def fold(lanes: NDArray[_Float]) -> NDArray[_Float]:
    """Return the sums of rows of lanes, a power of two: the upper half is added to the lower one until one is left."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def reciprocal(scale: F32) -> F32:
    """Return 1 / scale, or 0 for a scale of 0."""
    inverse: F32 = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse


def usable_reciprocal(values: F32, scale: F32) -> tuple[F32, Bools]:
    """Return 1 / scale (0 for 0), and where codes may be used: where that and all values of the block are finite."""
    inverse = reciprocal(scale)
    return inverse, np.isfinite(inverse) & np.isfinite(values).all(axis=1, keepdims=True)


def first_largest(values: F32) -> F32:
    """Return the first value of largest magnitude of each block, with its sign."""
    first = np.abs(values).view(np.uint32).argmax(axis=1)[:, None]
    return np.take_along_axis(values, first, axis=1)


def store_scale(packed: U8, half: F16, levels: NDArray[Any]) -> Encoded:
    """Store the scales of blocks that decode to scale * levels."""
    packed[:, :2] = half.view(np.uint8)
    return levels.astype(np.float32) * half.astype(np.float32), ~np.isfinite(half), half == 0


def scales_of(packed: U8) -> F32:
    """Return the scales that the blocks begin with."""
    return np.ascontiguousarray(packed[:, :2]).view(np.float16).astype(np.float32)
