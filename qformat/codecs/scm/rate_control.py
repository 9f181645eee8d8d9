"""Rate control of `scm`: from a target and statistics of a tensor to its grid and the positions that each layer holds.

A tensor is quantized once, to the deepest bits. A layer is then a range of positions: a position is one part (of `PARTS`) of one
bit plane of one phase, half of the weights. So choosing layers is choosing where to cut a list of positions. What each cut costs in
bytes and leaves in error is summed over the chunks, without encoding any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.codebooks import Survey
from qformat.codecs.scm.grid import (
    CHUNK,
    DEEPEST,
    PARTS,
    PHASES,
    POSITIONS,
    Distribution,
    Grid,
    base_bits,
    base_room,
    coarsest,
    find_step,
    finest,
    make_grid,
    step_of,
)
from qformat.codecs.scm.measures import Errors, SectionCosts
from qformat.entropy.streams import StreamWriter
from qformat.quality import METRICS, Metric, room, within
from qformat.records import MeasuredError, decimal

#: bits per weight of the layers
LADDER = (*(number / 4 for number in range(8, 25)), 7.0, 8.0)
_INEFFICIENCY = 1.0015  # of the entropy coder
_STEPS_PER_BIT = 2048  # a step whose number is greater by about this many saves a bit
_TINY = 2.0**-92  # the finest step cannot distinguish smaller weights
_ROUGH = 13  # one part in 2^13 of the room of a layer is left, since its size is only estimated
_SMALL = 1 << 18  # elements
_FEW = 1 << 16  # with fewer weights other than zero, one more layer does not pay for its record
# The step is made finer while the first layer leaves more than this share of its room, by this fraction of what would fill it,
# for at most this many tries
_SPARE, _CAUTION, _TRIES = 0.004, 0.9, 3


@dataclass(frozen=True)
class RateTarget:
    """Target of a tensor: bits per weight, a bound for an error over the range of the tensor, or neither: lossless."""

    bits: float | None = None
    metric: Metric | None = None
    bound: float = 0.0

    def rooms(self, elements: int) -> list[int]:
        """Return the bytes that each layer and those before it may take, as far as bits limit them."""
        if self.bits is None:
            return [room(rate, elements) for rate in LADDER]
        # estimates of small tensors are too rough to say which layers fit, so one too many is encoded and left out at the end
        rates = [rate for rate in LADDER if rate < self.bits or (elements < _SMALL and rate > self.bits)]
        return [room(rate, elements) for rate in sorted([*rates, self.bits])]

    def fits(self, nbytes: int, elements: int) -> bool:
        """Return whether layers of this size are within the target."""
        return self.bits is None or within(nbytes, elements, self.bits)


class ChunkStats(NamedTuple):
    """Statistics of a chunk: histogram, smallest and largest weight, elements, bits of mantissas up to the lowest ever set."""

    survey: Survey
    low: float
    high: float
    elements: int
    precision: int


#: one layer of a chunk, and its entropy in bits
LayerChunk = tuple[bytes, float]


@dataclass
class TrialResult:
    """Result of trials of a finite chunk.

    Attributes
    ----------
    size
        Number of elements that are coded: all, or those other than zero.
    base
        Signs and magnitudes of depth 0.
    before, errors
        Bits before each position and errors at each position, once the step is settled.
    encoded
        The layers of the last encoding, by the number of the layer and the positions at which it begins and ends.
    """

    size: int
    base: StreamWriter
    before: NDArray[np.int64] | None = None
    errors: Errors | None = None
    encoded: dict[tuple[int, int, int], LayerChunk] = field(default_factory=dict)


class Layer(NamedTuple):
    """A layer: the position at which it ends, and the bytes that it and those before it may take, if there is a limit."""

    end: int
    room: int | None


@dataclass(frozen=True)
class RateState:
    """State of rate control: after each step more of it is settled.

    Attributes
    ----------
    distribution, range, elements
        Statistics of the tensor: its histogram, its largest weight less its smallest, its number of elements.
    index, grid
        Number of the grid's step, and the grid.
    deepest
        Depth to which chunks are quantized.
    full
        Position that the layers of a lossless tensor reach at least.
    tries, fitting, settled
        Number of other steps tried, the finest one with which the first layer fitted, and whether the step is final.
    errors
        Errors of the tensor at each position.
    layers, lossless
        The layers, and whether a residual follows them.
    """

    distribution: Distribution
    range: float
    elements: int
    index: int
    grid: Grid
    deepest: int
    full: int = 0
    tries: int = 0
    fitting: int | None = None
    settled: bool = False
    errors: Errors | None = None
    layers: tuple[Layer, ...] = ()
    lossless: bool = False

    def error_at(self, end: int) -> MeasuredError:
        """Return the error of the tensor read up to a position."""
        return MeasuredError(*self.errors.at(end)) if self.errors else MeasuredError(0.0, 0.0, 0.0)

    def with_step(self, index: int, fitting: int | None) -> RateState:
        """Return the state with another step, which has to be tried."""
        grid = make_grid(self.distribution, index)
        return replace(self, index=index, grid=grid, tries=self.tries + 1, fitting=fitting)

    def with_shorter(self, number: int, excess: int) -> RateState:
        """Return the state with a layer that ends earlier, by about as many positions as take `excess` bytes."""
        layers = list(self.layers)
        start = layers[number - 1].end if number else 0
        positions = max(1, 8 * excess * PARTS * PHASES // max(1, self.elements))
        layers[number] = layers[number]._replace(end=max(start, layers[number].end - positions))
        return replace(self, layers=tuple(layers))


def start(target: RateTarget, chunk_stats: Iterable[ChunkStats]) -> RateState:
    """Choose a grid for a tensor: about 2 bits per weight at depth 0, or less if the target is less.

    Raises
    ------
    ValueError
        If the weights are too small for any grid.
    """
    whole, low, high, elements, chunks, precision = Survey.empty(), math.inf, -math.inf, 0, 0, 0
    for stats in chunk_stats:
        whole.add(stats.survey)
        low, high, precision = min(low, stats.low), max(high, stats.high), max(precision, stats.precision)
        elements, chunks = elements + stats.elements, chunks + 1
    distribution = Distribution(whole)
    if elements and 0 < max(-low, high) < _TINY:
        raise ValueError("holds weights that are too small")
    rooms = target.rooms(elements)
    index = find_step(distribution, base_room(distribution, rooms[0], chunks) / _INEFFICIENCY)
    spread = high - low if elements and math.isfinite(high - low) else 0.0
    full, deepest = _full(target, distribution, precision), DEEPEST
    if target.metric is None and elements:
        more = (8 * rooms[-1] - base_bits(distribution, step_of(index))) / elements
        deepest = min(DEEPEST, max(0, math.ceil(more), full // (PARTS * PHASES) - 1) + 1)
    return RateState(distribution, spread, elements, index, make_grid(distribution, index), deepest, full)


def _full(target: RateTarget, distribution: Distribution, precision: int) -> int:
    """Return the position up to which the layers of a lossless tensor take fewer bytes than the residual would.

    The residual of a weight in a cell at zero takes many bits, as these cells reach over many exponents: so the fewer weights are
    left in them, the better. But a layer is wasted on cells that are no wider than the distance between two floats.
    """
    if target.bits is not None or distribution.count < _FEW:
        return 0
    return PARTS * PHASES * max(0, min(DEEPEST, precision - 1))


def rate_control_step(
    target: RateTarget, state: RateState, trials: Sequence[TrialResult | None]
) -> tuple[RateState, bool]:
    """Take one step from the results of trials: another grid to try, a deeper measurement, or the layers.

    The first layer holds the base (signs and magnitudes of depth 0), whose size depends only on the grid's step: the step is moved
    until that layer just fits. Then each further layer ends at the last position up to which the estimated cost fits its room.

    Returns
    -------
    (RateState, bool)
        The next state, and whether it is final; if not, all chunks are tried again with it.

    Raises
    ------
    ValueError
        If a weight decodes to infinity.
    """
    found = [trial for trial in trials if trial is not None]
    if len(found) < len(trials):
        return state, True  # a chunk is not finite, which the encoder reports
    if not found:
        return replace(state, layers=(Layer(0, None),), lossless=target == RateTarget(), deepest=0), True
    rooms = target.rooms(state.elements)
    used = Grid.SIZE + sum(trial.base.nbytes + CHUNK for trial in found)
    if not state.settled:
        return _better_step(state, rooms[0], used) or replace(state, settled=True), False
    errors = Errors.total([trial.errors for trial in found if trial.errors is not None])
    if not math.isfinite(errors.squares.max()):
        raise ValueError("holds weights that are too large")
    state = replace(state, errors=errors)
    stop = _stop(target, state)
    costs = SectionCosts([trial.size for trial in found], [trial.before for trial in found if trial.before is not None])
    layers: list[Layer] = []
    used -= CHUNK * len(found)  # the cost of each layer includes it
    for limit in rooms:
        begin = layers[-1].end if layers else 0
        end = costs.last_end(begin, limit - (limit >> _ROUGH) - used, PARTS * PHASES * state.deepest)
        if stop is not None and end >= stop:
            break
        if end > begin or not layers:
            used += costs.of(begin, end)
            layers.append(Layer(end, limit))
    if stop is not None and (not layers or stop > layers[-1].end):
        layers.append(Layer(stop, None))
    if state.deepest < DEEPEST and layers[-1].end >= PARTS * PHASES * state.deepest:
        # bits take less than was estimated: there is room for deeper ones, which were not measured
        return replace(state, deepest=DEEPEST), False
    lossless = target == RateTarget() or (target.metric is not None and stop is None)
    if lossless and state.full > layers[-1].end:
        layers.append(Layer(state.full, None))
    deepest = -(-layers[-1].end // (PARTS * PHASES))
    return replace(state, layers=tuple(layers), lossless=lossless, deepest=deepest), True


def _better_step(state: RateState, limit: int, used: int) -> RateState | None:
    """Return the state with a coarser step if the first layer is too large, a finer one if it leaves much room, or None."""
    count, index, last = max(1, state.distribution.count), state.index, coarsest(state.distribution)
    if used > limit and index < last:
        if state.fitting is None:
            # in ever longer strides: the size of weights of few values does not change smoothly with the step
            up = max(1, min(int(8 * (used - limit) / count * _STEPS_PER_BIT), _STEPS_PER_BIT)) << state.tries
            return state.with_step(min(last, index + up), None)
        between = (index + state.fitting) // 2 if state.tries < _TRIES else state.fitting
        return state.with_step(between if between > index else state.fitting, state.fitting)
    if used <= limit and state.tries < _TRIES and limit - used > limit * _SPARE:
        # the parts of a tensor differ, so each takes fewer bits than the common histogram predicts
        down = int(_CAUTION * 8 * (limit - used) / count * _STEPS_PER_BIT)
        finer = max(finest(state.distribution), index - down)
        return state.with_step(finer, index) if finer < index else None
    return None


def _stop(target: RateTarget, state: RateState) -> int | None:
    """Return the first position at which the error is within the bound, if there is one."""
    if target.metric is None:
        return None
    place = METRICS.index(target.metric)
    spread = float(decimal(state.range))
    for end in range(POSITIONS + 1):
        value = float(decimal(state.errors.at(end)[place])) if state.errors else 0.0
        if not value or (spread and value / spread <= target.bound):
            return end
    return None
