"""Choose the headers of `nlm` blocks, in numpy. Twin of ``numba/nlm_search.py``, which documents it.

Arrays of weights have the shape (32, blocks, runs of 32 in a block), arrays with a number for each block (blocks, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F32, U32, Bools
from qformat.kernels.numpy.nlm import LEVELS, outer

START = np.float32(0.98)
SHIFT = np.float32(0.025)
FEWEST = np.float32(0.5)
CLOSE = np.float32(0.25)
FINEST = np.float32(2.0**-14)
LOST = np.float32(3e38)
INFINITE = 992
HUGE = np.float32(2.0**17)
FIRST = np.array([0.94, 0.97, 1.0, 1.03], np.float32)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)
REBIAS = np.uint32(112 << 23)
_CHUNK = 1 << 15  # elements at a time, so that temporary arrays stay in cache


class _Fit(NamedTuple):
    mean: F32
    spread: F32
    best: F32
    gain: F32


class _Place(NamedTuple):
    base: F32
    half: F32
    low: F32
    high: F32
    total: F32
    close: Bools


def _add(values: F32) -> F32:
    sums = values
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    return sums


def _sum(weights: F32) -> F32:
    total = np.zeros(weights.shape[1:], np.float32)
    for row in weights:
        total += row
    return _add(total)


def _greatest(weights: F32) -> F32:
    greatest: F32 = np.fmax.reduce(weights, axis=(0, 2), initial=-LOST)[:, None] + ZERO
    return greatest


def _level(position: F32, mapping: U32) -> F32:
    return np.copysign(LEVELS[mapping, outer(position, mapping)], position)


def _inverse(b: F32) -> F32:
    return np.where(b > 0, ONE / b, ZERO)


def _fit(y: F32, total: F32, mapping: U32, a: F32, b: F32) -> _Fit:
    size = np.float32(32 * y.shape[2])
    level = _level((y - a) * _inverse(b), mapping)
    levels, squares, products = _sum(level), _sum(level * level), _sum(y * level)
    mean = levels * (ONE / size)
    spread = squares - levels * mean
    common = products - total * mean
    slope = np.where(spread < FEWEST, ZERO, common / spread)
    best = np.where(slope > 0, slope, ZERO)
    return _Fit(mean, spread, best, best * common)


def _extremes(y: F32, mapping: U32, a: F32, b: F32) -> tuple[F32, F32]:
    offset = y - a
    error = offset - _level(offset * _inverse(b), mapping) * b
    return _greatest(error), ZERO - _greatest(-error)


def _loss(a: F32, b: F32, centre: F32, fit: _Fit, block: int) -> F32:
    offset: F32 = a + b * fit.mean - centre
    off: F32 = b - fit.best
    shifted: F32 = offset * offset * np.float32(block)
    return (shifted + off * off * fit.spread) - fit.gain


def _loss_of_squares(y: F32, total: F32, mapping: U32, a: F32, b: F32) -> F32:
    block = 32 * y.shape[2]
    return _loss(a, b, total * (ONE / np.float32(block)), _fit(y, total, mapping, a, b), block)


def _loss_of_maximum(y: F32, mapping: U32, a: F32, b: F32) -> F32:
    high, low = _extremes(y, mapping, a, b)
    loss = np.where(high > -low, high, -low)
    return np.where(loss < 0, LOST, loss)


def _half(patterns: NDArray[Any]) -> F32:
    return patterns.astype(np.uint16).view(np.float16).astype(np.float32)


def _minimum(value: F32) -> U32:
    pattern = value.view(np.uint32)
    magnitude = pattern & 0x7FFFFFFF
    normal = (magnitude + 0xFFFF + ((magnitude >> 17) & 1) - REBIAS) >> 17
    subnormal = (np.abs(value) + np.float32(8)).view(np.uint32) - np.uint32(0x41000000)
    nearest: U32 = np.minimum(np.where(np.abs(value) < FINEST, subnormal, normal), np.uint32(0x7C0))
    return nearest | ((pattern >> 20) & 0x800).astype(np.uint32)


def _range_below(value: F32) -> U32:
    small = (np.where(value < FINEST, value, FINEST) * np.float32(2**19)).astype(np.uint32)
    return np.minimum(np.where(value < FINEST, small, (value.view(np.uint32) - REBIAS) >> 18), np.uint32(INFINITE))


def _line(least: U32, width: U32, base: F32, half: F32) -> tuple[F32, F32]:
    size = _half(width << 5) * HALF
    inverse = ONE / half
    return ((_half(least << 4) - base) + size) * inverse, size * inverse


def _header(least: U32, width: U32, mapping: U32) -> U32:
    header: U32 = (width | (least << 10) | (mapping << 22)).astype(np.uint32)
    return header


def _rounded(width: U32, a: F32, base: F32, half: F32) -> tuple[U32, F32, F32]:
    least = _minimum((base + a * half) - _half(width << 5) * HALF)
    return (least, *_line(least, width, base, half))


def _round_fit(fit: _Fit, centre: F32, mapping: U32, place: _Place, block: int) -> tuple[U32, F32]:
    header, loss = np.full_like(mapping, INFINITE), np.full_like(centre, LOST)
    below = _range_below(fit.best * place.half * np.float32(2))
    for step in range(2):
        width = np.minimum(below + np.uint32(step), np.uint32(INFINITE))
        wanted = centre - _half(width << 5) * HALF / place.half * fit.mean
        least, a, b = _rounded(width, wanted, place.base, place.half)
        new = _loss(a, b, centre, fit, block)
        less = new < loss
        header = np.where(less, _header(least, width, mapping), header)
        loss = np.where(less, new, loss)
    return header, loss


def _positions(y: F32) -> _Place:
    high, low = _greatest(y), ZERO - _greatest(-y)
    half = high * HALF - low * HALF
    base = low + half
    size = np.abs(base)
    close = half < np.where(size > FINEST, size, FINEST) * (CLOSE * HALF)
    least = np.where(
        size * np.float32(2.0**-9) > np.float32(2.0**-30), size * np.float32(2.0**-9), np.float32(2.0**-30)
    )
    half = np.where(half > least, half, least)
    y[:] = (y - base) * (ONE / half)
    return _Place(base, half, low, high, _sum(y), close)


def _anchored(y: F32, place: _Place, header: U32, loss: F32, squares: bool) -> U32:
    if not place.close.any():
        return header
    size = np.abs(place.low) * np.float32(2.0**-7)
    least = _minimum(place.low - np.where(size > np.float32(2.0**-21), size, np.float32(2.0**-21)))
    above = place.high - _half(least << 4)
    below = _range_below(np.where(above > 0, above, ZERO))
    for number in range(4):
        mapping = np.full_like(header, number)
        for step in range(4):
            width = np.minimum(below + np.uint32(step), np.uint32(INFINITE))
            a, b = _line(least, width, place.base, place.half)
            new = _loss_of_squares(y, place.total, mapping, a, b) if squares else _loss_of_maximum(y, mapping, a, b)
            less = place.close & (new < loss)
            header = np.where(less, _header(least, width, mapping), header)
            loss = np.where(less, new, loss)
    return header


def _better(fit: _Fit, new: _Fit) -> _Fit:
    return _Fit(*(np.where(fit.gain < new.gain, theirs, ours) for ours, theirs in zip(fit, new, strict=True)))


def _best_squares(y: F32, place: _Place, block: int) -> U32:
    centre = place.total * (ONE / np.float32(block))
    zero = np.zeros_like(centre)
    mapping = zero.astype(np.uint32)
    fit = _Fit(zero, zero, zero, zero - LOST)
    for number in range(4):
        other = np.full_like(mapping, number)
        new = _fit(y, place.total, other, zero, zero + START)
        mapping = np.where(fit.gain < new.gain, other, mapping)
        fit = _better(fit, new)
    for shift in (-SHIFT, SHIFT):
        fit = _better(fit, _fit(y, place.total, mapping, zero + shift, zero + START))
    header, loss = _round_fit(fit, centre, mapping, place, block)
    return _anchored(y, place, header, loss, True)


def _best_maximum(y: F32, place: _Place, block: int) -> U32:
    del block
    zero = np.zeros_like(place.base)
    loss, a, b, mapping = zero + LOST, zero, zero + ONE, zero.astype(np.uint32)
    for number in range(4):
        other = np.full_like(mapping, number)
        for start in FIRST:
            high, low = _extremes(y, other, zero, zero + start)
            new = (high - low) * HALF
            less = new < loss
            a, b = np.where(less, (high + low) * HALF, a), np.where(less, start, b)
            mapping, loss = np.where(less, other, mapping), np.where(less, new, loss)
    header, loss, best_a = np.full_like(mapping, INFINITE), zero + LOST, a
    near = _range_below(b * place.half * np.float32(2))
    below = np.where(near < INFINITE, np.maximum(near, np.uint32(1)) - np.uint32(1), near)
    for step in range(4):
        width = np.minimum(below + np.uint32(step), np.uint32(INFINITE))
        for _ in range(2):
            high, low = _extremes(y, mapping, a, _half(width << 5) * HALF / place.half)
            least, a, b = _rounded(width, a + (high + low) * HALF, place.base, place.half)
            new = _loss_of_maximum(y, mapping, a, b)
            less = new < loss
            header = np.where(less, _header(least, width, mapping), header)
            best_a, loss = np.where(less, a, best_a), np.where(less, new, loss)
        a = best_a
    return _anchored(y, place, header, loss, False)


@np.errstate(all="ignore")
def _search(x: F32, headers: U32, block: int, best_of: Callable[[F32, _Place, int], Any]) -> None:
    step = max(1, _CHUNK // block)
    for start in range(0, x.size // block, step):
        y = x.reshape(-1, block // 32, 32)[start : start + step].transpose(2, 0, 1).copy()
        place = _positions(y)
        headers[start : start + step] = np.where(place.half < HUGE, best_of(y, place, block), INFINITE)[:, 0]


def rmse(x: F32, headers: U32, block: int) -> None:
    """Choose headers for the least squared error."""
    _search(x, headers, block, _best_squares)


def maximum(x: F32, headers: U32, block: int) -> None:
    """Choose headers for the least maximum of the absolute error within each block."""
    _search(x, headers, block, _best_maximum)
