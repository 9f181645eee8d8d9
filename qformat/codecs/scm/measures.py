"""Measurements for the rate control of `scm`: the sizes of sections, and the errors at each depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qformat.codecs.scm.grid import CHUNK, CLASSES, DEPTHS, PARTS, PHASES, Grid, planes
from qformat.entropy.frequencies import logarithms
from qformat.kernels import load
from qformat.kernels.arrays import F32, F64, I64, U32


def bits_before(numbers: U32, size: int, deepest: int) -> I64:
    """Return how many bits are 0 and 1, in all parts before each one and in all: shape (planes, 33, 3 classes, 2)."""
    shape = deepest * PHASES, PARTS, CLASSES, 2
    counts = np.zeros(math.prod(shape), np.int64)
    load("planes").count_bits(numbers, size, deepest, counts)
    before = np.zeros((deepest * PHASES, PARTS + 1, CLASSES, 2), np.int64)
    np.cumsum(counts.reshape(shape), axis=1, out=before[:, 1:])
    return before


class SectionCosts:
    """Estimated sizes of layers, to within a few bytes.

    Parameters
    ----------
    sizes
        The number of stored elements of each chunk.
    before
        The result of `bits_before` for each chunk.
    """

    def __init__(self, sizes: Sequence[int], before: Sequence[I64]) -> None:
        self._chunks = len(sizes)
        self._elements = sum(sizes)
        self._known: dict[tuple[int, ...], int] = {}
        self._before = np.stack(before)

    def of(self, start: int, end: int) -> int:
        """Return the bytes of a layer of the positions from `start` to before `end`."""
        return CHUNK * self._chunks + sum(self._section(*section) for section in planes(start, end))

    def _section(self, *section: int) -> int:
        if section not in self._known:
            self._known[section] = load("estimates").section_of_chunks(self._before, *section, logarithms())
        return self._known[section]

    def last_end(self, start: int, room: int, most: int) -> int:
        """Return the largest end, up to `most`, for which a layer from `start` has no more than `room` bytes; at least `start`."""
        low, high = start, max(start, most)
        # most bits take a bit, so the answer is near, or a little above
        guess = start + int(8 * max(0, room) * PHASES * PARTS // max(1, self._elements))
        step = 1
        while low < high:
            middle = min(max(guess, low + 1), high)
            if self.of(start, middle) <= room:
                low, guess, step = middle, middle + step, 2 * step
            else:
                high, guess = middle - 1, (low + middle) // 2
        return low


@dataclass(frozen=True)
class Errors:
    """The errors of a tensor at each depth of each part.

    Attributes
    ----------
    count
        Number of weights.
    squares, sums, peaks
        Sums of squared and of absolute errors, and the largest absolute ones, of shape (2 phases, 32 parts, 9 depths).
    """

    count: int
    squares: F64
    sums: F64
    peaks: F32

    @classmethod
    def of(cls, values: F32, numbers: U32, size: int, deepest: int, grid: Grid) -> Errors:
        """Measure `size` elements, padded to whole blocks, with magnitudes at depth `deepest`."""
        kernels = load("planes")
        shape = PHASES, PARTS, DEPTHS, kernels.LANES
        squares, sums, peaks = (np.zeros(math.prod(shape), dtype) for dtype in (np.float64, np.float64, np.uint32))
        scale = math.ldexp(1.0, -math.frexp(grid.steps[0])[1])  # so that squares are neither too large nor too small
        places = grid.single_widths, grid.places, np.float32(scale)
        kernels.measure(values, numbers, size, deepest, *places, squares, sums, peaks)
        largest = peaks.view(np.float32).reshape(shape).max(axis=3)
        return cls(
            size, _folded(squares.reshape(shape)) / (scale * scale), _folded(sums.reshape(shape)) / scale, largest
        )

    @classmethod
    def total(cls, parts: Sequence[Errors]) -> Errors:
        """Return the errors of all chunks together; sums are exact, so that their order does not matter."""
        shape = PHASES, PARTS, DEPTHS
        every = [(part.squares.ravel().tolist(), part.sums.ravel().tolist()) for part in parts]
        squares, sums = (
            np.array([math.fsum(column) for column in zip(*rows, strict=True)]).reshape(shape)
            for rows in zip(*every, strict=True)
        )
        peaks = np.max(np.stack([part.peaks for part in parts]), axis=0)
        return cls(sum(part.count for part in parts), squares, sums, peaks)

    @cached_property
    def _by_depth(self) -> tuple[list[list[float]], ...]:
        """Squares, sums and peaks of each depth, in the order of positions."""
        every = self.squares, self.sums, self.peaks
        return tuple(values.reshape(PHASES * PARTS, DEPTHS).T.tolist() for values in every)

    def at(self, end: int) -> tuple[float, float, float]:
        """Return root mean square, largest and mean absolute error after `end` positions."""
        depth, deeper = divmod(end, PHASES * PARTS)
        squares, sums, peaks = (
            (rows[depth + 1][:deeper] if deeper else []) + rows[depth][deeper:] for rows in self._by_depth
        )
        count = max(1, self.count)
        return math.sqrt(math.fsum(squares) / count), max(peaks), math.fsum(sums) / count


def _folded(lanes: F64) -> F64:
    """Return the sum over the last dimension: the upper half is added to the lower one until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
