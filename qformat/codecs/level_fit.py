"""A few levels around a fixed zero for a whole tensor, from a histogram of its values (a `codebooks.Survey`).

Cells are runs of points, the bins of the histogram; the one in the middle has the level 0. As in `codebooks`, nothing depends on
how numpy orders sums or on the last digits of a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qformat.codecs.codebooks import Points, Survey, running
from qformat.entropy.frequencies import COST_BITS, log2
from qformat.kernels.arrays import F32, F64, I64

_COARSE = 256  # groups of points in the exact search for a start
_ROUNDS = 100
_GAIN = 1e-8  # of the cost; an improvement below it ends the search
_HALVINGS = 24
_DEAREST = 64  # highest price of a bit, over the largest square
#: bits that coding takes for each bit of entropy, and for each value besides
_OVERHEAD, _LOSS = 1.004, 0.002
_TINY = 1e-150
_LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class Levels:
    """Entries, 0 in the middle, and thresholds: the code of a value is the number of thresholds strictly below it."""

    entries: F32
    thresholds: F32


@dataclass(frozen=True)
class _Problem:
    """The points, those that must be in the middle cell (`first` to `last` - 1), and whether these are all that may be."""

    points: Points
    first: int
    last: int
    fixed: bool

    def running(self, values: F64) -> F64:
        """Return the sums of values before each point, added from the middle outwards, so that small ones keep their precision."""
        below, above = np.cumsum(values[: self.first][::-1]), np.cumsum(values[self.first :])
        return np.concatenate([-below[::-1], [0.0], above])

    def side(self, *, negative: bool) -> tuple[F64, F64]:
        """Return the counts and sums of the points on one side, outwards."""
        chosen = slice(0, self.first) if negative else slice(self.last, None)
        counts, sums = self.points.counts[chosen], self.points.sums[chosen]
        return (counts[::-1], sums[::-1]) if negative else (counts, sums)


def fit(survey: Survey, size: int, *, sparsity: float = 0.0, bits: float | None = None) -> Levels:
    """Return the levels of least squared error.

    Parameters
    ----------
    survey
        The histogram.
    size
        The number of levels, odd.
    sparsity
        At least this share of the values, those nearest to zero, get the level 0. If it is 0, as many as is best.
    bits
        A limit of bits per value after entropy coding, for which the error is the least (entropy-constrained scalar quantization:
        Chou, Lookabaugh and Gray, 1989). Excludes a sparsity.
    """
    points = Points.of(survey)
    if not points.counts.size:
        return Levels(np.zeros(size, np.float32), np.full(size - 1, np.inf, np.float32))
    reach = _smallest(points, sparsity) if sparsity else 0.0
    middle = (points.low >= -reach) & (points.high <= reach) | (points.low <= 0) & (points.high >= 0)
    first = int(np.count_nonzero(~middle & (points.means < 0)))
    problem = _Problem(points, first, first + int(np.count_nonzero(middle)), bool(sparsity))
    borders = _lloyd(problem, _best(problem, size // 2), 0.0)
    if bits is not None:
        borders = _constrained(problem, borders, bits)
    return _levels(problem, borders)


def _smallest(points: Points, share: float) -> float:
    """Return a magnitude that this share of the values does not exceed, or as little more as the bins allow."""
    outer = np.maximum(-points.low, points.high)
    order = np.argsort(outer, kind="stable")
    reached = running(points.counts[order])[1:]
    needed = np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))
    return float(outer[order[min(int(needed), order.size - 1)]])


def _best(problem: _Problem, half: int) -> I64:
    """Return the borders of the best cells of both sides."""
    below = _outwards(*problem.side(negative=True), half, pinned=not problem.fixed)
    above = _outwards(*problem.side(negative=False), half, pinned=not problem.fixed)
    return np.concatenate([problem.first - below[::-1], problem.last + above])


def _outwards(counts: F64, sums: F64, cells: int, *, pinned: bool) -> I64:
    """Return the borders of the best cells of one side; if pinned, points before the first cell have the level 0."""
    if counts.size <= cells:  # each has a level of its own
        return np.minimum(np.arange(cells + 1), counts.size)
    starts = np.unique(np.arange(_COARSE + 1) * counts.size // _COARSE)
    before, sum_before = running(counts)[starts], running(sums)[starts]
    with np.errstate(all="ignore"):
        gains = np.square(sum_before[None] - sum_before[:, None]) / (before[None] - before[:, None])
    gains[np.tri(starts.size, k=-1, dtype=bool)] = -np.inf  # [i, j]: a cell of the groups i to j - 1
    np.fill_diagonal(gains, 0.0)  # which may be empty
    best = np.zeros(starts.size)
    if not pinned:
        best[1:] = -np.inf
    choices = []
    for _ in range(cells):
        every = best[:, None] + gains
        choices.append(every.argmax(axis=0))
        best = every[choices[-1], np.arange(starts.size)]
    borders = [starts.size - 1]
    for choice in reversed(choices):
        borders.append(int(choice[borders[-1]]))
    return starts[borders[::-1]]


def _lloyd(problem: _Problem, borders: I64, price: float) -> I64:
    """Improve cells in turns by the squared error plus `price` times the bits; cells may become empty."""
    points, half = problem.points, borders.size // 2 - 1
    before, sum_before = problem.running(points.counts), problem.running(points.sums)
    last_cost = np.inf
    for _ in range(_ROUNDS):
        counts, sums = np.diff(before[borders]), np.diff(sum_before[borders])
        used = counts > 0
        levels = np.where(used, sums, 0.0) / np.where(used, counts, 1.0)
        levels[half] = 0.0
        lengths = _lengths(counts)
        cost = float(running(counts * (price * lengths - np.square(levels)))[-1])
        if last_cost - cost <= _GAIN * abs(cost):
            break
        last_cost = cost
        used[half] = True
        alive = np.flatnonzero(used)
        low, high = levels[alive[:-1]], levels[alive[1:]]
        apart = np.maximum(high - low, _TINY)  # means that differ may be equal once rounded
        between = (low + high) / 2 + price * np.diff(lengths[alive]) / (2 * apart)
        moved = borders.copy()
        moved[: alive[0] + 1], moved[alive[-1] + 1 :] = 0, points.counts.size
        for cell, following, border in zip(alive, alive[1:], np.searchsorted(points.means, between), strict=False):
            moved[cell + 1 : following + 1] = border
        moved[: half + 1] = np.minimum(moved[: half + 1], problem.first)
        moved[half + 1 :] = np.maximum(moved[half + 1 :], problem.last)
        if problem.fixed:
            moved[half], moved[half + 1] = problem.first, problem.last
        moved = np.maximum.accumulate(moved)
        if np.array_equal(moved, borders):
            break
        borders = moved
    return borders


def _lengths(counts: F64) -> F64:
    """Return the bits of ideal codes with these counts; a code that does not occur counts as if it did once."""
    whole = np.maximum(counts, 1).astype(np.int64)
    total = log2(np.array([max(1, int(counts.sum()))]))
    bits: F64 = (total - log2(whole)) / float(1 << COST_BITS)
    return bits


def _bits(problem: _Problem, borders: I64) -> float:
    """Return the bits per value after entropy coding, by estimate."""
    counts = np.diff(problem.running(problem.points.counts)[borders])
    return float(running(counts * _lengths(counts))[-1] / counts.sum()) * _OVERHEAD + _LOSS


def _constrained(problem: _Problem, borders: I64, bits: float) -> I64:
    """Return the cells of least error that take no more than `bits` per value."""
    if _bits(problem, borders) <= bits:
        return borders

    def from_best(price: float) -> I64:
        return _lloyd(problem, borders, price)

    def from_uniform(price: float) -> I64:
        # At high rates uniform levels are best, with an error of step^2 / 12 that halves twice for each bit
        step = math.sqrt(6 * price / _LN_2)
        inner = np.arange(1, borders.size - 1) - (borders.size - 1) / 2
        start = np.concatenate([[0], np.searchsorted(problem.points.means, inner * step), borders[-1:]])
        start[: borders.size // 2] = np.minimum(start[: borders.size // 2], problem.first)
        start[borders.size // 2 :] = np.maximum(start[borders.size // 2 :], problem.last)
        return _lloyd(problem, start, price)

    candidates = [_cheapest(problem, at_price, bits) for at_price in (from_best, from_uniform)]
    return min((found for found in candidates if found is not None), key=lambda found: _error(problem, found))


def _cheapest(problem: _Problem, at_price: Callable[[float], I64], bits: float) -> I64 | None:
    """Return the cells for the lowest price at which they take no more than `bits` per value.

    From uniform cells there always is one: at the highest price all values are in the middle. From others turns may get stuck.
    """
    low, high = 0.0, _DEAREST * float(np.square(problem.points.means).max())
    found = at_price(high)
    if _bits(problem, found) > bits:
        return None
    for _ in range(_HALVINGS):
        price = (low + high) / (2 if low > high / 8 else 8)
        tried = at_price(price)
        if _bits(problem, tried) <= bits:
            high, found = price, tried
        else:
            low = price
    return found


def _error(problem: _Problem, borders: I64) -> float:
    """Return the squared error, less that of zeros alone."""
    counts, sums = (np.diff(problem.running(of)[borders]) for of in (problem.points.counts, problem.points.sums))
    gains = np.square(sums) / np.maximum(counts, 1)
    gains[gains.size // 2] = 0.0
    return -float(running(gains)[-1])


def _levels(problem: _Problem, borders: I64) -> Levels:
    points = problem.points
    counts, sums = (np.diff(problem.running(of)[borders]) for of in (points.counts, points.sums))
    levels = np.where(counts > 0, sums, 0.0) / np.where(counts > 0, counts, 1.0)
    levels[levels.size // 2] = 0.0
    inner = borders[1:-1]
    # A negative bin ends at its inner edge, which belongs to it; one that is not negative begins with its own.
    low = np.append(points.low, np.inf).astype(np.float32)[inner]
    high = np.append(-np.inf, points.high).astype(np.float32)[inner]
    with np.errstate(over="ignore"):
        thresholds = np.where(low < 0, high, np.nextafter(low, np.float32(-np.inf)))
        thresholds[inner == points.low.size] = np.inf
        return Levels(levels.astype(np.float32), thresholds)
