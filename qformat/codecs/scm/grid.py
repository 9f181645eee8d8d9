"""The grid of `scm`: the cells of magnitudes, and the values that they decode to.

With entropy coding, cells of equal width are nearly best at every rate (Gish and Pierce, 1968), so that a grid is little more than
a step. It is found from a histogram by the upper 16 bits of float32 patterns, in integers or in operations that every machine
rounds alike, because the bytes of a file depend on it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from qformat.codecs.codebooks import Survey, running
from qformat.entropy.frequencies import COST_BITS, logarithms
from qformat.kernels import load
from qformat.kernels.arrays import F32, F64, I64

PHASES, PARTS, DEEPEST, CELLS, CLASSES = 2, 32, 8, 4, 3
DEPTHS = DEEPEST + 1  # with depth 0
POSITIONS = PHASES * PARTS * DEEPEST
_OFFSET_DEPTHS = 4
#: magnitudes of depth 0 are below this
LARGEST = 1 << 22
_NARROW, _WIDE = 15, 255
_FINEST, _COARSEST = -100, 126
_MANTISSA = 1 << 11  # steps have 12 significant bits; a file may have steps of 16
_GRID = struct.Struct("<2f32s")
_MIDDLE = 128

#: bytes of a chunk of a layer besides its streams: its length and its end
CHUNK = 6
_STREAM, _MARKS = (
    30,
    7,
)  # approximate bytes of a stream of magnitudes besides them, and of the marks of a chunk and its sections


@dataclass(frozen=True)
class Grid:
    """The steps of both phases, and for each phase, depth and cell the place of the decoded value in its cell, in 256ths."""

    SIZE: ClassVar[int] = _GRID.size

    steps: tuple[float, float]
    offsets: bytes

    @classmethod
    def parse(cls, data: bytes) -> Grid:
        """Return the grid stored in a segment; raise `ValueError` if it is not valid."""
        if len(data) != _GRID.size:
            raise ValueError(f"a grid has {len(data)} bytes instead of {_GRID.size}")
        first, second, offsets = _GRID.unpack(data)
        patterns = struct.unpack("<2I", data[:8])
        if any(pattern & 0xFF for pattern in patterns) or not all(
            2.0**_FINEST <= step <= 2.0**_COARSEST for step in (first, second)
        ):
            raise ValueError("a grid has an invalid step")
        return cls((first, second), offsets)

    def pack(self) -> bytes:
        """Return the segment."""
        return _GRID.pack(*self.steps, self.offsets)

    @cached_property
    def widths(self) -> F64:
        """Widths of cells, exact, of shape (2 phases, 9 depths), flat."""
        return np.array([math.ldexp(step, -depth) for step in self.steps for depth in range(DEPTHS)])

    @cached_property
    def single_widths(self) -> F32:
        """The same in float32; still exact."""
        return self.widths.astype(np.float32)

    @cached_property
    def places(self) -> F32:
        """Offsets in cells, of shape (2 phases, 9 depths, 4 cells), flat."""
        table = np.full((PHASES, DEPTHS, CELLS), _MIDDLE, np.float32)
        stored = np.frombuffer(self.offsets, np.uint8).reshape(PHASES, _OFFSET_DEPTHS, CELLS)
        table[:, :_OFFSET_DEPTHS] = stored
        return (table / np.float32(256)).reshape(-1)

    def deepest_widths(self, depth: int) -> F64:
        """Return the widths of both phases at a depth."""
        return self.widths.reshape(PHASES, DEPTHS)[:, depth].copy()


def step_of(index: int) -> float:
    """Return the step of an index: the numbers with 12 significant bits in ascending order, with 1 at index 0."""
    return math.ldexp(1 + index % _MANTISSA / _MANTISSA, index // _MANTISSA)


def _second(step: float) -> float:
    """Return the step of the other phase, finer by a factor of about the root of 2."""
    mantissa, exponent = math.frexp(step * math.sqrt(0.5))
    return math.ldexp(round(mantissa * 2 * _MANTISSA) / (2 * _MANTISSA), exponent)


@lru_cache(64)
def part_sizes(size: int) -> I64:
    """Return how many of `size` elements are in each phase and part, of shape (2, 32), read-only."""
    blocks = -(-size // 32)
    counts = np.full(blocks, 32, np.int64)
    if blocks:
        counts[-1] -= 32 * blocks - size
    number = np.arange(blocks)
    cell = number % PHASES * PARTS + number // PHASES % PARTS
    sizes = np.bincount(cell, weights=counts, minlength=PHASES * PARTS).astype(np.int64).reshape(PHASES, PARTS)
    sizes.flags.writeable = False
    return sizes


def planes(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (plane, first part, part after the last) of positions from `start` to before `end`; a plane is a depth and a phase."""
    for plane in range(start // PARTS, -(-end // PARTS)):
        yield plane, max(0, start - plane * PARTS), min(PARTS, end - plane * PARTS)


class Distribution:
    """The distribution of a tensor's magnitudes, from a histogram.

    Attributes
    ----------
    zeros, count
        The number of weights that are zero, and of the others.
    largest
        An upper bound of the magnitudes.
    """

    def __init__(self, survey: Survey) -> None:
        half = survey.counts.size // 2
        counts = survey.counts[:half] + survey.counts[half:]
        sums = survey.sums[:half] - survey.sums[half:]
        self.zeros, counts[0] = int(counts[0]), 0  # among them magnitudes below 2^-133
        self.count = int(counts.sum())
        used = np.flatnonzero(counts)
        low, high = ((used + step << 16).astype(np.uint32).view(np.float32).astype(np.float64) for step in (0, 1))
        self._low, self._high = low, np.minimum(high, float(np.finfo(np.float32).max))
        self._counts, self._before = counts[used], running(counts[used].astype(np.float64))
        self._sums_before = running(sums[used])
        self._means = sums[used] / np.maximum(self._counts, 1)
        self.largest = float(self._high[-1]) if used.size else 0.0

    def cells(self, width: float, most: int) -> tuple[F64, F64]:
        """Return the number of magnitudes in each cell, and their sum: at most `most` cells, the last with all beyond.

        Within a bin magnitudes are taken to be spread evenly.
        """
        if not self.count:
            return np.zeros(1), np.zeros(1)
        number = int(min(most, self.largest / width + 2))
        counts, sums = np.empty(number + 1), np.empty(number + 1)
        bins = self._low, self._high, self._counts, self._means, self._before, self._sums_before
        load("estimates").below(*bins, width, counts, sums)
        counts[-1], sums[-1] = self.count, self._sums_before[-1]
        return np.diff(counts), np.diff(sums)


def _bits(counts: F64) -> float:
    """Return the size of ideally coded symbols with these counts, in bits."""
    whole = np.maximum(counts, 0).astype(np.int64)
    return float(load("estimates").ideal(whole, logarithms())) / (1 << COST_BITS)


def base_bits(distribution: Distribution, step: float) -> float:
    """Estimate the bits of signs and magnitudes of depth 0 of all weights that are not zero."""
    bits = float(distribution.count)
    for width in (step, _second(step)):
        counts, _ = distribution.cells(width, _WIDE + 1)
        if counts.size <= _NARROW:
            bits += _bits(counts) / 2
            continue
        elsewhere = counts[_WIDE:].sum() if counts.size > _WIDE else 0.0
        narrow = np.append(counts[:_NARROW], counts[_NARROW:].sum())
        limited = [_bits(narrow) + 32 * narrow[-1], _bits(counts) + 32 * elsewhere]
        bits += min(limited) / 2
    return bits


def find_step(distribution: Distribution, bits: float) -> int:
    """Return the index of the finest step for which signs and magnitudes take no more than `bits`, by estimate."""
    lowest = finest(distribution)
    highest = max(lowest, coarsest(distribution))
    while lowest < highest:
        middle = (lowest + highest) // 2
        if base_bits(distribution, step_of(middle)) <= bits:
            highest = middle
        else:
            lowest = middle + 1
    return highest


def finest(distribution: Distribution) -> int:
    """Return the index of the finest step for which all magnitudes are below `LARGEST`."""
    return max((_FINEST + 1) * _MANTISSA, _index_above(2 * distribution.largest / LARGEST))


def coarsest(distribution: Distribution) -> int:
    """Return the index of a step for which all magnitudes are in the first cell."""
    return min(_COARSEST * _MANTISSA, _index_above(2 * distribution.largest))


def base_room(distribution: Distribution, nbytes: int, chunks: int) -> float:
    """Estimate the bits for signs and magnitudes of depth 0 if the whole first layer has `nbytes`."""
    elements = distribution.count + distribution.zeros
    symbols = elements // max(1, chunks) // (2 * PHASES)
    lanes = 4 if symbols < 1 << 12 else 16 if symbols < 1 << 16 else 64
    bits = 8.0 * (nbytes - Grid.SIZE - chunks * (CHUNK + _MARKS + PHASES * (_STREAM + 2 * lanes)))
    if distribution.zeros * 64 >= elements:
        bits -= _bits(np.array([float(distribution.zeros), float(distribution.count)]))
    return bits


def _index_above(value: float) -> int:
    """Return the index of a step not below a value, which may be 0."""
    return math.frexp(value)[1] * _MANTISSA if value else _FINEST * _MANTISSA


def make_grid(distribution: Distribution, index: int) -> Grid:
    """Return the grid for a step: offsets are the means in cells, of all parts of a cell of depth 0 together."""
    steps = step_of(index), _second(step_of(index))
    offsets = []
    for step in steps:
        for depth in range(_OFFSET_DEPTHS):
            parts = 1 << depth
            counts, sums = distribution.cells(step / parts, 64 * parts)
            if counts.size == 64 * parts:  # the last one has all beyond
                counts, sums = counts[:-1], sums[:-1]
            number = np.arange(counts.size)
            excess = sums / (step / parts) - number * counts
            kinds = np.minimum(number // parts, CELLS - 1)
            # bincount adds in order, one by one, on every machine
            whole, part = np.bincount(kinds, counts, CELLS), np.bincount(kinds, excess, CELLS)
            mean = np.where(whole > 0, part, 0.5) / np.where(whole > 0, whole, 1.0)
            offsets.append(np.clip(np.rint(mean * 256), 0, 255).astype(np.uint8))
    return Grid(steps, np.concatenate(offsets).tobytes())
