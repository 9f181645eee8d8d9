"""Models in memory, trained and random, cut into chunks of whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from benchmarks.encoding import Chunk, chunk_slice, cut

_ALIGNMENT = 256  # a multiple of every block, so that chunks are the same for all types


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor: the number of the tensor, the chunk, the rows as float32."""

    tensor: int
    chunk: Chunk
    rows: np.ndarray


@dataclass(frozen=True)
class Score:
    """Result of quantizing a model: the squared errors of each part, and the counts of each choice.

    Attributes
    ----------
    squares
        Sum of squared errors of each part of the model; NaN for parts that were left out.
    bits
        Bits for each weight that was not left out.
    as_expected
        For each part, whether it equals the peer's result; empty if there is no peer.
    choices
        Counts by name, from `Codec.histograms`.
    """

    squares: np.ndarray
    bits: float
    as_expected: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    choices: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Named matrices, and statistics of their parts.

    Attributes
    ----------
    name
        For titles.
    tensors
        The matrices, float16 or float32.
    """

    name: str
    tensors: list[tuple[str, np.ndarray]]

    @cached_property
    def cuts(self) -> list[tuple[int, Chunk]]:
        """Every part: the tensor's number and the chunk."""
        arrays = enumerate(array for _, array in self.tensors)
        return [(number, chunk) for number, array in arrays for chunk in cut(array.shape, _ALIGNMENT)]

    def part(self, number: int) -> Part:
        """Return one part, its weights widened."""
        tensor, chunk = self.cuts[number]
        array = self.tensors[tensor][1]
        flat = array.reshape(-1)[chunk_slice(array.shape, chunk)]
        return Part(tensor, chunk, flat.reshape(chunk.rows, chunk.cols).astype(np.float32))

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(array.size for _, array in self.tensors)

    @cached_property
    def counts(self) -> np.ndarray:
        """Weights of each part."""
        return np.array([chunk.rows * chunk.cols for _, chunk in self.cuts])

    @cached_property
    def columns(self) -> np.ndarray:
        """Length of the rows of each part."""
        return np.array([chunk.cols for _, chunk in self.cuts])

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the weights and of their squares for each part."""
        sums = []
        for number in range(len(self.cuts)):
            wide = self.part(number).rows.astype(np.float64)
            sums.append((wide.sum(), np.square(wide).sum()))
        first, second = np.array(sums).T
        return first, second

    @cached_property
    def kurtosis(self) -> np.ndarray:
        """Kurtosis of each tensor; 3 for normally distributed weights."""
        found = []
        for _, array in self.tensors:
            centred = array.astype(np.float64) - array.mean(dtype=np.float64)
            variance = np.mean(centred**2)
            found.append(float(np.mean(centred**4) / variance**2) if variance else math.inf)
        return np.array(found)

    def parts_of(self, tensors: np.ndarray) -> np.ndarray:
        """Return a mask of the parts of those tensors that a mask selects."""
        return tensors[[tensor for tensor, _ in self.cuts]]

    def rel_rmse(self, score: Score, only: np.ndarray | None = None) -> float:
        """Return the root mean square error over the standard deviation of the weights, all tensors together.

        `only` is a mask of parts; what was left out of the score is left out anyway.
        """
        used = np.isfinite(score.squares) if only is None else np.isfinite(score.squares) & only
        count = self.counts[used].sum()
        first, second = (math.fsum(sums[used]) / count for sums in self._sums)
        deviation = math.sqrt(max(0.0, second - first * first))
        return math.sqrt(math.fsum(score.squares[used]) / count) / deviation

    def mean_rel_rmse(self, score: Score) -> float:
        """Return the average of the tensors' own figures."""
        owners = np.array([tensor for tensor, _ in self.cuts])
        known = np.unique(owners[np.isfinite(score.squares)])
        return math.fsum(self.rel_rmse(score, owners == tensor) for tensor in known) / len(known)


def thinned(model: Model, limit: int) -> Model:
    """Return a model of at most the first `limit` weights or so of each tensor: for quick runs."""
    return Model(model.name, [(name, _head(array, limit)) for name, array in model.tensors])


def _head(array: np.ndarray, limit: int) -> np.ndarray:
    return np.ascontiguousarray(array[: max(1, limit // math.prod(array.shape[1:]))])


def models(*, quick: bool) -> Iterator[Model]:
    """Yield the models."""
    from benchmarks.inputs import minilm_matrices, normal, whisper

    few = 1 << 15
    for name, tensors in (("all-MiniLM-L6-v2, float32", minilm_matrices), ("Whisper-base, float16", whisper)):
        model = Model(name, list(tensors().items()))
        yield thinned(model, few) if quick else model
    yield Model("N(0, 1), float32", [("normal", normal(1 << 20 if quick else 1 << 24, sd=1.0))])
