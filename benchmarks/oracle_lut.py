"""Good codebooks of a tensor: by many steps of Lloyd's algorithm from several starts, and by dynamic programming."""

from __future__ import annotations

import numpy as np


def long_lloyd(values: np.ndarray, size: int, *, steps: int = 3000, random_starts: int = 3) -> float:
    """Return the least sum of squared errors that was found for `size` levels.

    The weights are sorted once; then the sums of those that are nearest to a level are differences of prefix sums, and a step costs
    no more than to look up the borders. The levels are float64.

    Parameters
    ----------
    values
        The weights.
    size
        Number of levels.
    steps
        How many to take at most; a run ends where the levels stay.
    random_starts
        Runs from random weights, beside those from quantiles, from equal steps, and from levels as dense as the cube root of the
        weights' density.
    """
    ordered, sums, squares = _prepared(values)
    rng = np.random.default_rng(0)
    middles = (np.arange(size) + 0.5) / size
    starts = [
        np.quantile(ordered, middles),
        ordered[0] + (ordered[-1] - ordered[0]) * middles,
        _spread(ordered, size),
        *(np.sort(rng.choice(ordered, size)) for _ in range(random_starts)),
    ]
    return min(_descend(ordered, sums, squares, start, steps) for start in starts)


def near_optimum(values: np.ndarray, size: int, *, cells: int = 800, steps: int = 3000) -> float:
    """Return the least sum of squared errors for `size` levels, nearly.

    Unlike Lloyd's algorithm alone this is not caught where no small step is better: it begins with the best of all ways to cut the
    sorted weights at the borders of so many cells, of which half are equally full and half equally wide.
    """
    ordered, sums, squares = _prepared(values)
    full = np.linspace(0, len(ordered), cells // 2 + 1).astype(np.int64)
    wide = np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], cells // 2 + 1)[1:-1])
    borders = np.union1d(full, wide)
    first, second, count = (
        np.subtract.outer(prefix[borders], prefix[borders]).T for prefix in (sums, squares, np.arange(len(sums)))
    )
    with np.errstate(all="ignore"):
        cost = np.where(count > 0, second - first * first / count, np.where(count == 0, 0.0, np.inf))
    best, choices = cost[0], []
    for _ in range(size - 1):
        every = best[:, None] + cost
        choices.append(every.argmin(axis=0))
        best = every.min(axis=0)
    cuts = [len(borders) - 1]
    for choice in reversed(choices):
        cuts.append(choice[cuts[-1]])
    ends = borders[np.array([0, *cuts[::-1]])]
    middles = ordered[np.minimum((ends[1:] + ends[:-1]) // 2, len(ordered) - 1)]
    counts = np.diff(ends)
    levels = np.divide(np.diff(sums[ends]), counts, out=middles, where=counts > 0)
    return _descend(ordered, sums, squares, np.sort(levels), steps)


def _prepared(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights in order, and prefix sums of them and of their squares."""
    ordered = np.sort(values.reshape(-1).astype(np.float64))
    sums, squares = (np.concatenate([[0.0], np.cumsum(powers)]) for powers in (ordered, ordered * ordered))
    return ordered, sums, squares


def _spread(ordered: np.ndarray, size: int) -> np.ndarray:
    """Return levels as dense as the cube root of the density, which is the best for many levels."""
    counts, edges = np.histogram(ordered, 2048)
    reached = np.cumsum(np.cbrt(counts))
    return np.interp((np.arange(size) + 0.5) / size * reached[-1], reached, edges[1:])


def _descend(ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, levels: np.ndarray, steps: int) -> float:
    for _ in range(steps):
        borders = _borders(ordered, levels)
        counts = np.diff(borders)
        means = np.divide(np.diff(sums[borders]), counts, out=levels.copy(), where=counts > 0)
        if np.array_equal(means, levels):
            break
        levels = np.sort(means)
    borders = _borders(ordered, levels)
    total = np.diff(sums[borders])
    cells = np.diff(squares[borders]) - 2 * levels * total + levels * levels * np.diff(borders)
    return float(cells.sum())


def _borders(ordered: np.ndarray, levels: np.ndarray) -> np.ndarray:
    inner = np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
    return np.concatenate([[0], inner, [len(ordered)]])
