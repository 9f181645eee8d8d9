"""Few levels, with a scale for each group of columns of a row or none; in numpy. Twin of the documented ``numba/levels.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F32, F64, U8, U32
from qformat.kernels.numpy.blocks import fold


def _groups(x: NDArray[Any], cols: int, group: int) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the number of each group, counted from column to column, and its elements in all rows."""
    rows = x.reshape(-1, cols)
    each = -(-cols // group)
    for number, start in enumerate(range(0, cols, group)):
        yield slice(number, None, each), rows[:, start : start + group]


def _sums(terms: F64) -> F64:
    """Return the sum of each row."""
    lanes = np.pad(terms, ((0, 0), (0, -terms.shape[1] % 32))).reshape(len(terms), -1, 32)
    total = np.zeros((len(terms), 32))
    for i in range(lanes.shape[1]):
        total = total + lanes[:, i]
    return fold(total)


@np.errstate(all="ignore")
def measure(x: F32, cols: int, group: int, squares: F64, magnitudes: U32) -> None:
    """Compute the sum of squares of each group, and the bits of its magnitude if all but zeros have the same one, else 0."""
    for here, values in _groups(x, cols, group):
        squares[here] = _sums(np.square(values.astype(np.float64)))
        patterns = np.ascontiguousarray(values).view(np.uint32) & 0x7FFFFFFF
        top = patterns.max(axis=1)
        same = ((patterns == 0) | (patterns == top[:, None])).all(axis=1)
        magnitudes[here] = np.where(same, top, 0)


@np.errstate(all="ignore")
def unscale(x: F32, cols: int, group: int, scales: F32, least: F32, y: F32) -> None:
    """Divide by the scale of the group; values of a magnitude below ``least`` of their group become 0."""
    limits = least.view(np.uint32)
    outs = _groups(y, cols, group)
    for (here, values), (_, out) in zip(_groups(x, cols, group), outs, strict=True):
        patterns = np.ascontiguousarray(values).view(np.uint32) & 0x7FFFFFFF
        out[:] = np.where(patterns < limits[here, None], np.float32(0), values) / scales[here, None]


def classify(y: F32, thresholds: F32, codes: U8) -> None:
    """Count the thresholds strictly below each value."""
    codes[:] = 0
    for threshold in thresholds:
        codes += threshold < y


@np.errstate(all="ignore")
def products(x: F32, codes: U8, entries: F32, cols: int, group: int, common: F64, squares: F64) -> None:
    """Compute for each group the sum of values times the entries of their codes, and of the squares of these entries."""
    chosen = _groups(entries.astype(np.float64)[codes], cols, group)
    for (here, values), (_, entry) in zip(_groups(x, cols, group), chosen, strict=True):
        common[here] = _sums(values.astype(np.float64) * entry)
        squares[here] = _sums(np.square(entry))


@np.errstate(all="ignore")
def rescale(values: F32, cols: int, group: int, scales: F32) -> None:
    """Multiply by the scale of the group."""
    for here, part in _groups(values, cols, group):
        np.multiply(part, scales[here, None], out=part)
