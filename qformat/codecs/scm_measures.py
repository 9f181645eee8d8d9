"""What `scm` measures before it decides: what sections would take, and the errors at each depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.scm_grid import CHUNK, CLASSES, DEPTHS, PARTS, PHASES, Grid, planes
from qformat.entropy.frequencies import COST_BITS, log2
from qformat.kernels import load

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Bytes of streams of bits beside these: length and way, and a table if they are coded
_EMPTY, _RAW, _CONSTANT, _CODED = 4, 5, 6, 12
_LOSS = 8  # coding takes more than is ideal by one part in 2^8


def count_bits(numbers: NDArray[np.uint32], size: int, deepest: int) -> I64:
    """Return how often bits are 0 and 1: by plane, part and class of the magnitude before."""
    shape = deepest * PHASES, PARTS, CLASSES, 2
    counts = np.zeros(math.prod(shape), np.int64)
    load("planes").count_bits(numbers, size, deepest, counts)
    return counts.reshape(shape)


class SectionCosts:
    """What layers take that hold some positions, to a few bytes.

    Parameters
    ----------
    sizes
        How many elements count in each chunk.
    bits
        What `count_bits` found in each chunk.
    """

    def __init__(self, sizes: Sequence[int], bits: Sequence[I64]) -> None:
        self._chunks = len(sizes)
        self._elements = sum(sizes)
        self._known: dict[tuple[int, int, int], int] = {}
        running_bits = np.cumsum(np.stack(bits), axis=2)
        self._bits = np.concatenate([np.zeros_like(running_bits[:, :, :1]), running_bits], axis=2)

    def of(self, start: int, end: int) -> int:
        """Return the bytes of a layer."""
        return CHUNK * self._chunks + sum(self._section(*section) for section in planes(start, end))

    def _section(self, plane: int, first: int, stop: int) -> int:
        key = plane, first, stop
        if key not in self._known:
            counts = self._bits[:, plane, stop] - self._bits[:, plane, first]
            both = counts.sum(axis=1, keepdims=True)  # of all classes, as a fourth one
            counts = np.concatenate([counts, both], axis=1)
            streams = bit_stream(counts.sum(axis=2), counts[..., 1])
            taken = 1 + np.minimum(streams[:, CLASSES], streams[:, :CLASSES].sum(axis=1))
            self._known[key] = int(taken[both.sum(axis=(1, 2)) > 0].sum())
        return self._known[key]

    def last_end(self, start: int, room: int, most: int) -> int:
        """Return the last end for which a layer that begins at `start` takes no more than some bytes; `start` if none does."""
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


def bit_stream(counts: I64, ones: I64) -> I64:
    """Return about how many bytes streams of bits take, of which so many are 1."""
    zeros = counts - ones
    every = np.stack([counts, ones, zeros])
    all_logarithms, one_logarithms, zero_logarithms = every * log2(every)
    ideal = all_logarithms - one_logarithms - zero_logarithms  # in units of 2^-16 bits
    lanes = np.where(counts < 8 << 12, 4, 16)
    coded = _CODED + 2 * lanes + ((ideal + (ideal >> _LOSS)) >> (COST_BITS + 3))
    coded = np.maximum(coded, _CODED + 4 * lanes)  # no less than the states
    raw = _RAW + (counts + 7) // 8
    taken = np.where((ones == 0) | (zeros == 0), _CONSTANT, np.minimum(raw, coded))
    return np.where(counts > 0, taken, _EMPTY)


@dataclass(frozen=True)
class Errors:
    """Errors of a tensor at each depth of each part.

    Attributes
    ----------
    count
        Number of weights.
    squares, sums, peaks
        Arrays of shape (2, 32, 9): sums of squares and of absolute errors, and the largest ones.
    """

    count: int
    squares: F64
    sums: F64
    peaks: F32

    @classmethod
    def of(cls, values: F32, numbers: NDArray[np.uint32], size: int, deepest: int, grid: Grid) -> Errors:
        """Measure elements, filled up to whole blocks, from their magnitudes at a depth."""
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
        """Return those of all pieces; sums are exact, so that their order does not matter."""
        shape = PHASES, PARTS, DEPTHS
        every = [(part.squares.ravel().tolist(), part.sums.ravel().tolist()) for part in parts]
        squares, sums = (
            np.array([math.fsum(column) for column in zip(*rows, strict=True)]).reshape(shape)
            for rows in zip(*every, strict=True)
        )
        peaks = np.max(np.stack([part.peaks for part in parts]), axis=0)
        return cls(sum(part.count for part in parts), squares, sums, peaks)

    def at(self, end: int) -> tuple[float, float, float]:
        """Return root mean square, largest and mean absolute error after some positions."""
        depth = np.full((PHASES, PARTS), end // (PHASES * PARTS))
        depth += np.arange(PHASES * PARTS).reshape(PHASES, PARTS) < end % (PHASES * PARTS)
        chosen = (
            np.take_along_axis(self.squares, depth[..., None], 2),
            np.take_along_axis(self.sums, depth[..., None], 2),
        )
        squares, sums = (math.fsum(values.ravel().tolist()) / max(1, self.count) for values in chosen)
        peak = float(np.take_along_axis(self.peaks, depth[..., None], 2).max())
        return math.sqrt(squares), peak, sums


def _folded(lanes: F64) -> F64:
    """Return the sum of the last dimension: the upper half is added to the lower one until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
