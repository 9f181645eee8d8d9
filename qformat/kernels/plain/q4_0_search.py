"""Scales for Q4_0 blocks that minimise the squared error, in numpy. Twin of ``jit/q4_0_search.py``, which documents the functions.

The table is gone through with the same operations in the same order. The exact search is another one, with the same results: it
tries the codes of every scale, which is some hundred times slower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.plain.blocks import F32, U16, first_largest
from qformat.kernels.tables import DIVISORS

U32 = NDArray[np.uint32]

SMALLEST = 0x33000000
HALF_INFINITY = 0x7C00
_TO_INTEGER = np.float32(1.5 * 2**23)
_CHUNK = 1 << 9  # blocks at a time
_CODES = np.arange(1, 9)


@np.errstate(all="ignore")
def table(x: F32, scales: U16) -> None:
    """Choose for each block the best of the scales in `DIVISORS`, each refined by least squares."""
    _search(x, scales, _table)


@np.errstate(all="ignore")
def exact(x: F32, scales: U16) -> None:
    """Choose for each block the binary16 scale with the least squared error there is."""
    _search(x, scales, _exact)


def _search(x: F32, scales: U16, choose: Callable[[F32, F32], U32]) -> None:
    blocks = x.reshape(-1, 32)
    for start in range(0, len(blocks), _CHUNK):
        values = blocks[start : start + _CHUNK]
        first = first_largest(values)[:, 0]
        best = choose(values, first)
        alone, one_sign = _one_magnitude(values, first)
        best[alone] = _for_one_magnitude(first, one_sign)[alone]
        naive = _half_bits(first * np.float32(-0.125)) & 0x7FFF
        best = np.where(naive >= HALF_INFINITY, naive, best)
        scales[start : start + _CHUNK] = np.where(np.abs(first).view(np.uint32) > SMALLEST, best, 0)


def _table(values: F32, first: F32) -> U32:
    inverse = np.float32(-1) / first
    best = np.zeros(len(values), np.uint32)
    most = np.full(len(values), -np.inf, np.float32)
    for c in DIVISORS:
        factor = inverse * c
        a, b = np.zeros_like(first), np.zeros_like(first)
        for column in values.T:
            scaled = column * factor
            below = np.where(scaled < 7, scaled, np.float32(7))
            k = (np.where(below > -8, below, np.float32(-8)) + _TO_INTEGER) - _TO_INTEGER
            a = a + column * k
            b = b + k * k
        half = _half_bits(a / b)
        d = _from_half_bits(half)
        v = (d + d) * a - d * d * b
        best = np.where(most < v, half, best)
        most = np.where(v > most, v, most)
    return best


def _exact(values: F32, first: F32) -> U32:
    del first
    size = np.abs(values).astype(np.float64)
    negative = np.signbit(values)
    most = np.zeros(len(values))
    best = np.zeros(len(values), np.uint32)
    for sign in (0, 1):
        limit = np.where(negative == bool(sign), 7, 8)
        allowed = limit[:, :, None] >= _CODES
        at = np.where(allowed, size[:, :, None] / (_CODES - 0.5), -1.0).reshape(len(values), -1)
        da = np.where(allowed, size[:, :, None], 0.0).reshape(at.shape)
        db = np.where(allowed, 2.0 * _CODES - 1, 0.0).reshape(at.shape)
        order = np.argsort(-at, axis=1, kind="stable")
        a = np.cumsum(np.take_along_axis(da, order, axis=1), axis=1)
        b = np.cumsum(np.take_along_axis(db, order, axis=1), axis=1)
        halves = np.minimum(a / b, 65504).astype(np.float16)
        d = halves.astype(np.float64)
        v = 2 * d * a - d * d * b
        largest = v.max(axis=1)
        pattern = np.where(v == largest[:, None], halves.view(np.uint16), 0).max(axis=1).astype(np.uint32)
        better = (largest > most) | ((largest == most) & (pattern > (best & 0x7FFF)))
        most = np.where(better, largest, most)
        best = np.where(better, pattern | (sign << 15), best)
    return best


def _one_magnitude(values: F32, first: F32) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where all weights that are not zero have one magnitude, and where they have one sign."""
    zero = np.abs(values) == 0
    same = np.abs(values).view(np.uint32) == np.abs(first).view(np.uint32)[:, None]
    same_sign = values.view(np.uint32) == first.view(np.uint32)[:, None]
    return (zero | same).all(axis=1), (zero | same_sign).all(axis=1)


def _for_one_magnitude(first: F32, one_sign: NDArray[np.bool_]) -> U32:
    size = np.abs(first)
    negative = ((first.view(np.uint32) >> 16) & 0x8000) ^ 0x8000
    best = _half_bits(size)
    rest = np.abs(size - _from_half_bits(best))
    for k in range(2, 9):
        nearest = _half_bits(size / np.float32(k))
        for step in range(3):
            half = np.maximum(nearest + 2 - step, 1) - 1
            left = np.abs(size - _from_half_bits(half) * np.float32(k))
            if k == 8:
                half = half | negative
                left = np.where(one_sign, left, size)
            best = np.where(left < rest, half, best)
            rest = np.where(left < rest, left, rest)
    return best


def _half_bits(x: NDArray[np.floating]) -> U32:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _from_half_bits(half: U32) -> F32:
    return half.astype(np.uint16).view(np.float16).astype(np.float32)
