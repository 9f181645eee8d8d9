"""One codebook for a whole tensor, from a histogram of its values.

Values are counted and summed in bins by the upper 16 bits of their float32 patterns, with 7 bits of mantissa; so the mean of a cell
of whole bins is exact. The bytes of a file depend on the result: sums are added in a fixed order (numpy's ``sum`` picks one by the
processor, ``cumsum`` does not), and the last digits of a library's logarithms and powers play no part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from qformat.kernels.arrays import F16, F32, F64, I64

BINS = 1 << 16
_NEGATIVE = 1 << 15
_COARSE = 256  # groups of points in the exact search for a start
_FEW = 1024  # fewer bins than this are divided: values far from zero fall into few
_PARTS = 8
_ROUNDS = 500
_GAIN = 1e-9  # of the error; an improvement below it ends the search


class Survey(NamedTuple):
    """The number of values in each of 65536 bins, and their sums."""

    counts: I64
    sums: F64

    @classmethod
    def empty(cls) -> Survey:
        """Return the survey of no values."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS))

    def add(self, other: Survey) -> None:
        """Add other values to this survey."""
        self.counts[:] += other.counts
        self.sums[:] += other.sums

    @classmethod
    def total(cls, parts: Iterable[Survey]) -> Survey:
        """Return one survey of all parts, added in order."""
        whole = cls.empty()
        for part in parts:
            whole.add(part)
        return whole


@dataclass(frozen=True)
class Codebook:
    """Entries in binary16, ascending, and the float32 thresholds between values of one code and the next."""

    entries: F16
    thresholds: F32

    @classmethod
    def nearest(cls, levels: F64) -> Codebook:
        """Return the entries nearest to some levels, each the code of the values nearest to it."""
        with np.errstate(over="ignore"):
            entries = levels.astype(np.float16)
        return cls(entries, midpoints(entries))


def midpoints(entries: F16) -> F32:
    """Return the points half-way between neighbours in the last dimension."""
    exact = entries.astype(np.float64)
    with np.errstate(invalid="ignore"):  # entries may be infinite
        halfway: F32 = ((exact[..., 1:] + exact[..., :-1]) * 0.5).astype(np.float32)
    return halfway


class Points(NamedTuple):
    """The bins with values, in ascending order: bounds, number of values, their sum and mean."""

    low: F64
    high: F64
    counts: F64
    sums: F64
    means: F64

    @classmethod
    def of(cls, survey: Survey) -> Points:
        """Return the points of a survey."""
        order = np.concatenate([np.arange(BINS - 1, _NEGATIVE - 1, -1), np.arange(_NEGATIVE)])
        order = order[survey.counts[order] > 0]
        inner, outer = (
            ((order & (_NEGATIVE - 1)) + step << 16).astype(np.uint32).view(np.float32).astype(np.float64)
            for step in (0, 1)
        )
        negative = order >= _NEGATIVE
        counts, sums = survey.counts[order].astype(np.float64), survey.sums[order]
        low, high = np.where(negative, -outer, inner), np.where(negative, -inner, outer)
        return cls(low, high, counts, sums, sums / counts)

    def finer(self) -> Points:
        """Return bins cut into parts, as if values were spread evenly about the mean as far as the bin reaches on both sides."""
        reach = np.minimum(self.means - self.low, self.high - self.means)
        parts = np.where(reach > 0, _PARTS, 1)
        bins = np.repeat(np.arange(parts.size), parts)
        number = np.arange(bins.size) - np.repeat(np.cumsum(parts) - parts, parts)
        half = (reach / parts)[bins]
        means = (self.means - reach)[bins] + half * (2 * number + 1)
        counts = (self.counts / parts)[bins]
        return Points(means - half, means + half, counts, counts * means, means)


def running(values: F64) -> F64:
    """Return the sum of all values before each one, and of all, added in order."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _exact_borders(counts: F64, sums: F64, cells: int) -> I64:
    """Return the borders of the best cells of a few points, more than cells, by dynamic programming (Bruce, 1965)."""
    size = counts.size
    before, sum_before = running(counts), running(sums)
    sum_before = sum_before - before * (sum_before[-1] / before[-1])  # about the mean, for accuracy
    with np.errstate(all="ignore"):
        gains = np.square(sum_before[None] - sum_before[:, None]) / (before[None] - before[:, None])
    gains[np.tri(size + 1, dtype=bool)] = -np.inf  # [i, j]: a cell of the points i to j - 1
    best, choices = gains[0], []
    for _ in range(cells - 1):
        every = best[:, None] + gains
        choices.append(every.argmax(axis=0))
        best = every[choices[-1], np.arange(size + 1)]
    borders = [size]
    for choice in reversed(choices):
        borders.append(int(choice[borders[-1]]))
    return np.array([0, *borders[::-1]])


def _coarse(points: Points) -> I64:
    """Return the borders of groups of neighbours that contribute about equally to the error."""
    # For n values over a width w this is about the cube root of n w² (Bennett's theorem). Square roots are the same everywhere.
    widths = np.diff(points.means, prepend=points.means[:1])
    fourth = np.sqrt(np.sqrt(points.counts * np.square(widths)))
    weight = np.cumsum(fourth * np.sqrt(np.sqrt(fourth)))
    groups = np.minimum(weight * (_COARSE / weight[-1]), _COARSE - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.append(starts, points.counts.size)


def lloyd(points: Points, borders: I64) -> tuple[F64, list[float]]:
    """Improve cells by Lloyd's method (1957): each level becomes the mean of its cell, each point moves to the nearest level.

    Parameters
    ----------
    points
        More points than cells.
    borders
        The first point of each cell, and the number of points; no cell is empty.

    Returns
    -------
    tuple of (array, list of float)
        The levels, and the squared error after each round (which never rises), without that within the bins.
    """
    before, sum_before = running(points.counts), running(points.sums)
    shifted = points.means - sum_before[-1] / before[-1]
    squares = float(running(points.counts * np.square(shifted))[-1])
    centred = sum_before - before * (sum_before[-1] / before[-1])
    history: list[float] = []
    cells = borders.size - 1
    for _ in range(_ROUNDS):
        counts = np.diff(before[borders])
        levels = np.diff(sum_before[borders]) / counts
        history.append(squares - float(running(np.square(np.diff(centred[borders])) / counts)[-1]))
        moved = np.searchsorted(points.means, (levels[1:] + levels[:-1]) * 0.5, side="right")
        # a cell that would be empty takes a point from a neighbour, which reduces the error, too
        moved = np.maximum.accumulate(np.maximum(moved, 1) - np.arange(cells - 1)) + np.arange(cells - 1)
        moved = np.minimum(moved, points.counts.size - cells + 1 + np.arange(cells - 1))
        moved = np.concatenate([borders[:1], moved, borders[-1:]])
        converged = len(history) > 1 and history[-2] - history[-1] <= _GAIN * history[-1]
        if converged or np.array_equal(moved, borders):
            break
        borders = moved
    return levels, history


def fit_lloyd(survey: Survey, size: int) -> tuple[Codebook, list[float]]:
    """Return the codebook of least squared error, and the errors of `lloyd`'s rounds.

    `lloyd` finds the nearest local optimum, and with outliers there are poor ones. So it starts from the exact optimum for a
    histogram of fewer bins.
    """
    points = Points.of(survey)
    if points.counts.size <= size:
        levels = points.means if points.counts.size else np.zeros(1)
        return Codebook.nearest(np.pad(levels, (0, size - levels.size), mode="edge")), [0.0]
    if points.counts.size < _FEW:
        points = points.finer()
    groups = _coarse(points) if points.counts.size > _COARSE else np.arange(points.counts.size + 1)
    if groups.size - 1 <= size:
        groups = np.arange(points.counts.size + 1)[:: max(1, points.counts.size // _COARSE)]
        groups = np.append(groups[groups < points.counts.size], points.counts.size)
    before, sum_before = running(points.counts)[groups], running(points.sums)[groups]
    borders = groups[_exact_borders(np.diff(before), np.diff(sum_before), size)]
    levels, history = lloyd(points, borders)
    return Codebook.nearest(levels), history


def fit_percentile(survey: Survey, size: int) -> Codebook:
    """Return the quantiles at (2k + 1) / (2 size + 2), k from 0 to size, without the middle one.

    For 16 entries these are 1/34, 3/34 ... 33/34 without 17/34, the median. Values are taken to be spread evenly over a bin.
    """
    points = Points.of(survey)
    if not points.counts.size:
        return Codebook.nearest(np.zeros(size))
    reached = np.cumsum(points.counts)
    numbers = np.delete(np.arange(size + 1), size // 2)
    ranks = (2 * numbers + 1) * (reached[-1] / (2 * size + 2))
    bins = np.searchsorted(reached, ranks, side="right")
    share = (ranks - (reached - points.counts)[bins]) / points.counts[bins]
    with np.errstate(invalid="ignore"):  # the outermost bins end at infinity, beyond binary16 anyway
        levels = points.low[bins] + share * (points.high - points.low)[bins]
    # the inner end of a bin: all its values are there if none has more digits
    inner = np.where(points.low < 0, points.high, points.low)[bins]
    return Codebook.nearest(np.where(points.means[bins] == inner, inner, levels))


def fit_gauss(sigma: float, size: int) -> Codebook:
    """Return the codebook whose entries are equally frequent for Gaussian values of standard deviation `sigma`.

    The distribution function maps values to (0, 1), which is cut into equal buckets; entries are the middles of these.
    """
    quantile = NormalDist().inv_cdf  # rounded below, because its last digits come from the C library's logarithm
    middles, borders = (
        np.array([round(quantile(share / (2 * size)), 12) for share in shares]) * sigma
        for shares in (range(1, 2 * size, 2), range(2, 2 * size, 2))
    )
    with np.errstate(over="ignore"):
        return Codebook(middles.astype(np.float16), borders.astype(np.float32))


def deviation(survey: Survey) -> float:
    """Return the root mean square of the values, from the bins: exact to about 1 part in 100,000."""
    points = Points.of(survey)
    if not points.counts.size:
        return 0.0
    squares: Any = running(points.sums * points.means)[-1]
    return float(np.sqrt(squares / running(points.counts)[-1]))
