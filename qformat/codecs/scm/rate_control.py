"""How `scm` decides: from what is wanted and from what is seen of a tensor to its grid and to what each layer holds."""

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

#: bits for each weight of the layers that a file has
LADDER = (*(number / 4 for number in range(8, 25)), 7.0, 8.0)
_INEFFICIENCY = 1.0015  # of the entropy coder
_STEPS_PER_BIT = 2048  # by so many numbers a step has to rise, about, to save a bit
_TINY = 2.0**-92  # the finest steps do not tell weights below apart
_ROUGH = 13  # of the room of a layer one part in 2^13 is left, as what it takes is not known exactly
_SMALL = 1 << 18  # elements
_FEW = 1 << 16  # weights other than zero, for which one more layer does not pay for its record
# If the first layer leaves a larger share of its room, steps are made finer, by so much of what would fill it; after so many tries
# what fits is taken
_SPARE, _CAUTION, _TRIES = 0.004, 0.9, 3


@dataclass(frozen=True)
class Wanted:
    """What is asked for: bits for each weight, a bound for an error over the range of the tensor, or (nothing) everything."""

    bits: float | None = None
    metric: Metric | None = None
    bound: float = 0.0

    def rooms(self, elements: int) -> list[int]:
        """Return the bytes that each layer and those before may take, as far as bits decide that."""
        if self.bits is None:
            return [room(rate, elements) for rate in LADDER]
        # of small tensors estimates are too rough to tell which layers will fit: what does not is left out in the end
        rates = [rate for rate in LADDER if rate < self.bits or (elements < _SMALL and rate > self.bits)]
        return [room(rate, elements) for rate in sorted([*rates, self.bits])]

    def fits(self, nbytes: int, elements: int) -> bool:
        """Return whether layers may take so many bytes."""
        return self.bits is None or within(nbytes, elements, self.bits)


class Seen(NamedTuple):
    """What a survey of a chunk finds; ``precision`` are the bits of mantissas up to the lowest that is ever set."""

    survey: Survey
    low: float
    high: float
    elements: int
    precision: int


#: a chunk, and the bits that ideal coders need for it
LayerChunk = tuple[bytes, float]


@dataclass
class Tried:
    """What trials of a finite chunk find.

    Attributes
    ----------
    size
        How many elements count.
    base
        Signs and magnitudes of depth 0.
    before, errors
        What `bits_before` and `Errors` find, once the step is settled.
    chunks
        What became of it the last time that it was encoded: chunks by the number of the layer and by the positions in it.
    """

    size: int
    base: StreamWriter
    before: NDArray[np.int64] | None = None
    errors: Errors | None = None
    chunks: dict[tuple[int, int, int], LayerChunk] = field(default_factory=dict)


class Layer(NamedTuple):
    """A layer of a tensor: where it ends, and the bytes that it and those before may take, if there is a limit."""

    end: int
    room: int | None


@dataclass(frozen=True)
class Fitted:
    """What is known of a tensor: more after each step.

    Attributes
    ----------
    distribution, range, elements
        What surveys found.
    index, grid
        The number of the step, and what follows from it.
    deepest
        The depth to which chunks are quantized.
    full
        The position up to which layers are written at least if the tensor is kept bit for bit.
    tries, fitting, settled
        How many other steps were tried, the last one with which the first layer was not too large, and whether no more are.
    errors
        What trials found.
    layers, lossless
        What to write.
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
        """Return the error after some positions."""
        return MeasuredError(*self.errors.at(end)) if self.errors else MeasuredError(0.0, 0.0, 0.0)

    def with_step(self, index: int, fitting: int | None) -> Fitted:
        """Return the same with another step."""
        grid = make_grid(self.distribution, index)
        return replace(self, index=index, grid=grid, tries=self.tries + 1, fitting=fitting)

    def with_shorter(self, number: int, excess: int) -> Fitted:
        """Return the same with a layer that ends earlier, by as many positions as have so many bytes more or less."""
        layers = list(self.layers)
        start = layers[number - 1].end if number else 0
        positions = max(1, 8 * excess * PARTS * PHASES // max(1, self.elements))
        layers[number] = layers[number]._replace(end=max(start, layers[number].end - positions))
        return replace(self, layers=tuple(layers))


def fit(wanted: Wanted, surveys: Iterable[Seen]) -> Fitted:
    """Choose a grid for a whole tensor: about 2 bits for each weight at depth 0, or less if less is wanted.

    Raises
    ------
    ValueError
        If there is none for so small weights.
    """
    whole, low, high, elements, chunks, precision = Survey.empty(), math.inf, -math.inf, 0, 0, 0
    for seen in surveys:
        whole.add(seen.survey)
        low, high, precision = min(low, seen.low), max(high, seen.high), max(precision, seen.precision)
        elements, chunks = elements + seen.elements, chunks + 1
    distribution = Distribution(whole)
    if elements and 0 < max(-low, high) < _TINY:
        raise ValueError("holds weights that are too small")
    rooms = wanted.rooms(elements)
    index = find_step(distribution, base_room(distribution, rooms[0], chunks) / _INEFFICIENCY)
    spread = high - low if elements and math.isfinite(high - low) else 0.0
    full, deepest = _full(wanted, distribution, precision), DEEPEST
    if wanted.metric is None and elements:
        more = (8 * rooms[-1] - base_bits(distribution, step_of(index))) / elements
        deepest = min(DEEPEST, max(0, math.ceil(more), full // (PARTS * PHASES) - 1) + 1)
    return Fitted(distribution, spread, elements, index, make_grid(distribution, index), deepest, full)


def _full(wanted: Wanted, distribution: Distribution, precision: int) -> int:
    """Return the position up to which layers of a tensor take less than `rest` would, if it is kept bit for bit.

    In the cells at zero `rest` takes many bits, as these reach over many exponents: so the fewer weights are left in them, the
    better. But a bit is wasted on cells that are no wider than what is between two floats.
    """
    if wanted.bits is not None or distribution.count < _FEW:
        return 0
    return PARTS * PHASES * max(0, min(DEEPEST, precision - 1))


def decide(wanted: Wanted, fitted: Fitted, trials: Sequence[Tried | None]) -> tuple[Fitted, bool]:
    """Choose which positions go into which layer; or another grid, which has to be tried then, or what else has to be measured.

    Returns
    -------
    (Fitted, bool)
        And whether it is final.

    Raises
    ------
    ValueError
        If something decodes to infinity.
    """
    found = [tried for tried in trials if tried is not None]
    if len(found) < len(trials):
        return fitted, True  # a chunk is not finite: encoding will tell
    if not found:
        return replace(fitted, layers=(Layer(0, None),), lossless=wanted == Wanted(), deepest=0), True
    rooms = wanted.rooms(fitted.elements)
    used = Grid.SIZE + sum(tried.base.nbytes + CHUNK for tried in found)
    if not fitted.settled:
        return _better_step(fitted, rooms[0], used) or replace(fitted, settled=True), False
    errors = Errors.total([tried.errors for tried in found if tried.errors is not None])
    if not math.isfinite(errors.squares.max()):
        raise ValueError("holds weights that are too large")
    fitted = replace(fitted, errors=errors)
    stop = _stop(wanted, fitted)
    costs = SectionCosts([tried.size for tried in found], [tried.before for tried in found if tried.before is not None])
    layers: list[Layer] = []
    used -= CHUNK * len(found)  # which costs of layers hold
    for limit in rooms:
        start = layers[-1].end if layers else 0
        end = costs.last_end(start, limit - (limit >> _ROUGH) - used, PARTS * PHASES * fitted.deepest)
        if stop is not None and end >= stop:
            break
        if end > start or not layers:
            used += costs.of(start, end)
            layers.append(Layer(end, limit))
    if stop is not None and (not layers or stop > layers[-1].end):
        layers.append(Layer(stop, None))
    if fitted.deepest < DEEPEST and layers[-1].end >= PARTS * PHASES * fitted.deepest:
        return replace(
            fitted, deepest=DEEPEST
        ), False  # bits take less than was thought, so that there is room for more of them
    lossless = wanted == Wanted() or (wanted.metric is not None and stop is None)
    if lossless and fitted.full > layers[-1].end:
        layers.append(Layer(fitted.full, None))
    deepest = -(-layers[-1].end // (PARTS * PHASES))
    return replace(fitted, layers=tuple(layers), lossless=lossless, deepest=deepest), True


def _better_step(fitted: Fitted, limit: int, used: int) -> Fitted | None:
    """Return a coarser step if the first layer takes too much, a finer one if it leaves much, or None if it is well filled."""
    count, index, last = max(1, fitted.distribution.count), fitted.index, coarsest(fitted.distribution)
    if used > limit and index < last:
        if (
            fitted.fitting is None
        ):  # the further the longer it takes: what weights of few values take does not change smoothly
            up = max(1, min(int(8 * (used - limit) / count * _STEPS_PER_BIT), _STEPS_PER_BIT)) << fitted.tries
            return fitted.with_step(min(last, index + up), None)
        between = (index + fitted.fitting) // 2 if fitted.tries < _TRIES else fitted.fitting
        return fitted.with_step(between if between > index else fitted.fitting, fitted.fitting)
    if used <= limit and fitted.tries < _TRIES and limit - used > limit * _SPARE:
        # parts of the tensor differ, so that each takes less than all together
        down = int(_CAUTION * 8 * (limit - used) / count * _STEPS_PER_BIT)
        finer = max(finest(fitted.distribution), index - down)
        return fitted.with_step(finer, index) if finer < index else None
    return None


def _stop(wanted: Wanted, fitted: Fitted) -> int | None:
    """Return the first position after which the bound that is wanted is met, if there is one."""
    if wanted.metric is None:
        return None
    place = METRICS.index(wanted.metric)
    spread = float(decimal(fitted.range))
    for end in range(POSITIONS + 1):
        value = float(decimal(fitted.errors.at(end)[place])) if fitted.errors else 0.0
        if not value or (spread and value / spread <= wanted.bound):
            return end
    return None
