"""Good scales for Q4_0 blocks, in numpy. Twin of ``numba/q4_0_table.py``, with the same operations in the same order."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, U16, U32
from qformat.kernels.numpy.q4_0_search import from_half_bits, half_bits, search
from qformat.kernels.tables import DIVISORS

_TO_INTEGER = np.float32(1.5 * 2**23)


def choose(x: F32, scales: U16) -> None:
    """Choose for each block the best of the scales in `DIVISORS`, refined by least squares."""
    search(x, scales, _table, 1 << 12)


def _table(values: F32, first: F32) -> U32:
    columns = np.ascontiguousarray(values.T)
    inverse = np.float32(-1) / first
    best = np.zeros(len(values), np.uint32)
    most = np.full(len(values), -np.inf, np.float32)
    refined = np.zeros_like(first)
    for c in [*DIVISORS, None]:
        factor = inverse * c if c is not None else np.float32(1) / refined
        a, b = np.zeros_like(first), np.zeros_like(first)
        for column in columns:
            k = np.maximum(np.minimum(column * factor, np.float32(7)), np.float32(-8))
            k += _TO_INTEGER
            k -= _TO_INTEGER
            a += column * k
            b += np.square(k)
        ratio = a / b
        half = half_bits(ratio)
        d = from_half_bits(half)
        v = (d + d) * a - d * d * b
        best = np.where(most < v, half, best)
        refined = np.where(most < v, ratio, refined)
        most = np.where(v > most, v, most)
    return best
