"""Searches for the scales and minima of Q4_1 blocks in numpy. Twin of ``numba/q4_1_search.py``, which documents the functions.

Blocks are columns here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qformat.kernels.arrays import F32, U16, Bools
from qformat.kernels.numpy.blocks import reciprocal
from qformat.kernels.tables import FEW, FEW_LEVELS, MORE, MORE_LEVELS

ZERO, HALF, ONE, TOP = (np.float32(value) for value in (0, 0.5, 1, 15))
ROUND = np.float32(2.0**23)
PART = np.float32(1 / 32)
TINY = np.float32(2.0**-100)
FAR = np.float32(64)
FINE = np.float32(2.0**-16)
_CHUNK = 1 << 15  # elements at a time, so that temporary arrays stay in cache


class Line(NamedTuple):
    """A least-squares line for some codes, by their sums."""

    products: F32
    variance: F32
    mean: F32


class Choice(NamedTuple):
    """Binary16 scales and minima, and the squared errors that they lead to."""

    error: F32
    scale: U16
    low: U16


def _total(rows: F32) -> F32:
    """Return the sum of rows, added one after the other."""
    total = np.zeros(rows.shape[1], np.float32)
    for row in rows:
        total = total + row
    return total


def _limited(codes: F32) -> F32:
    codes = np.where(codes < TOP, codes, TOP)
    return np.where(codes > ZERO, codes, ZERO)


def _trial(y: F32, slope: F32, offset: F32, best: Line) -> tuple[F32, F32, Line]:
    codes = (_limited(y * slope + offset) + ROUND) - ROUND
    count = _total(codes)
    mean: F32 = count * PART
    variance: F32 = _total(codes * codes) - count * mean
    products: F32 = np.where(variance > ZERO, _total(codes * y), ZERO)
    more = best.products * best.products * variance < products * products * best.variance
    line = Line(
        np.where(more, products, best.products),
        np.where(more, variance, best.variance),
        np.where(more, mean, best.mean),
    )
    next_slope: F32 = variance / products
    return next_slope, mean, line


def _error(x: F32, scale: F32, low: F32) -> F32:
    inverse = reciprocal(scale)
    codes = np.floor(_limited((x - low) * inverse + HALF))
    error = x - (codes * scale + low)
    return _total(error * error)


def _better(x: F32, scale: F32, low: F32, best: Choice) -> Choice:
    half_scale, half_low = scale.astype(np.float16), low.astype(np.float16)
    error = _error(x, half_scale.astype(np.float32), half_low.astype(np.float32))
    less = error < best.error
    return Choice(
        np.where(less, error, best.error),
        np.where(less, half_scale.view(np.uint16), best.scale),
        np.where(less, half_low.view(np.uint16), best.low),
    )


def _step(values: F32, by: int) -> F32:
    """Return the binary16 numbers that are ``by`` steps up from those nearest to the values."""
    halves = values.astype(np.float16).view(np.uint16).astype(np.int32)
    order = np.where(halves & 0x8000, -(halves & 0x7FFF), halves & 0x7FFF) + by
    patterns = np.where(order < 0, 0x8000 - order, order).astype(np.uint16)
    return patterns.view(np.float16).astype(np.float32)


def _fixed(x: F32, low: F32, high: F32, levels: F32) -> F32:
    best_products, best_squares = np.zeros_like(low), np.ones_like(low)
    values = x - low
    for k in range(levels.size + 1):
        inverse = levels[k] / (high - low) if k < levels.size else best_squares / best_products
        codes = (_limited(values * inverse) + ROUND) - ROUND
        squares = _total(codes * codes)
        products = np.where(squares > ZERO, _total(codes * values), ZERO)
        more = best_products * best_products * squares < products * products * best_squares
        best_products = np.where(more, products, best_products)
        best_squares = np.where(more, squares, best_squares)
    scale = best_products / best_squares
    return np.where(scale > ZERO, scale, ZERO)


def _extremes(x: F32) -> tuple[F32, F32]:
    low = high = x[0]
    for row in x[1:]:
        low = np.where(row < low, row, low)
        high = np.where(row > high, row, high)
    return low, high


def _naive(x: F32, low: F32, step: F32) -> Choice:
    zeros = np.zeros(low.size, np.uint16)
    best = _better(x, step, low, Choice(np.full(low.size, np.inf, np.float32), zeros, zeros))
    scale, least = step.astype(np.float16), low.astype(np.float16)
    error = np.where(np.isfinite(scale) & np.isfinite(least), best.error, -ONE)
    return Choice(error, scale.view(np.uint16), least.view(np.uint16))


def _normalize(x: F32, low: F32, extent: F32) -> tuple[F32, F32]:
    y = (x - low) * np.where(extent < TINY, ZERO, TOP / extent)
    middle = _total(y) * PART
    return y - middle, middle


def _tries(y: F32, middle: F32, starts: F32, turns: int, line: Line) -> Line:
    for first_slope, shift in starts:
        slope = np.full_like(middle, first_slope)
        offset = middle * slope + shift
        for _ in range(turns):
            slope, offset, line = _trial(y, slope, offset, line)
    return _trial(y, line.variance / line.products, line.mean, line)[2]


def _settle(x: F32, line: Line, centre: F32, step: F32, high: F32, levels: F32, best: Choice) -> Choice:
    scale: F32 = step * (line.products / line.variance)
    rounded: F32 = scale.astype(np.float16).astype(np.float32)
    best = _better(x, rounded, centre - rounded * line.mean, best)
    least: F32 = centre - scale * line.mean
    coarse: Bools = ((scale * FAR < np.abs(least)) | (scale < FINE)) & (best.error > 0)
    if not coarse.any():
        return best
    x, high, centre, mean = x[:, coarse], high[coarse], centre[coarse], line.mean[coarse]
    tried = Choice(best.error[coarse], best.scale[coarse], best.low[coarse])
    for by in range(-1, 2):
        near = _step(least[coarse], by)
        tried = _better(x, _fixed(x, near, high, levels), near, tried)
        near = _step(scale[coarse], by)
        near = np.where(near > ZERO, near, ZERO)
        tried = _better(x, near, centre - near * mean, tried)
    best.error[coarse], best.scale[coarse], best.low[coarse] = tried
    return best


def _choose(x: F32, thorough: bool) -> Choice:
    low, high = _extremes(x)
    extent = high - low
    step = extent / TOP
    best = _naive(x, low, step)
    y, middle = _normalize(x, low, extent)
    centre = low + step * middle
    line = _tries(y, middle, FEW, 1, Line(np.zeros_like(low), np.ones_like(low), np.zeros_like(low)))
    best = _settle(x, line, centre, step, high, FEW_LEVELS, best)
    if thorough:
        line = _tries(y, middle, MORE, 2, line)
        best = _settle(x, line, centre, step, high, MORE_LEVELS, best)
    return best


@np.errstate(all="ignore")
def search(x: F32, scales: U16, minima: U16, *, thorough: bool) -> None:
    """Choose scales and minima for blocks of 32."""
    for start in range(0, x.size, _CHUNK):
        columns = np.ascontiguousarray(x[start : start + _CHUNK].reshape(-1, 32).T)
        chosen = _choose(columns, thorough)
        here = slice(start // 32, start // 32 + columns.shape[1])
        scales[here], minima[here] = chosen.scale, chosen.low
