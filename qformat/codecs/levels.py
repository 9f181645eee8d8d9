"""Few levels around zero, entropy-coded (spec/codecs.md, "`ternary` and `levels`")."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import ChunkEncoder, EncodedChunk, ErrorSum, Readable, Run, TensorEncoder, option
from qformat.codecs.codebooks import Survey
from qformat.codecs.layout import Array, Buffer, Chunk, Chunks, Layout, Matrix
from qformat.codecs.level_fit import Levels, fit
from qformat.codecs.packed import LONGEST, cuts
from qformat.codecs.quantized import check_length
from qformat.codecs.registry import register
from qformat.dtypes import DTYPES, F32, F64, Elements
from qformat.entropy.frequencies import digit_table, digits_per_symbol
from qformat.entropy.streams import StreamReader, StreamWriter, symbol_count
from qformat.kernels import load

U8 = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LevelCodec(ChunkEncoder):
    """Codes that number levels, of which the middle one is zero.

    Parameters
    ----------
    scale
        Scales are per ``row``, per ``group`` of columns of a row, or absent (``tensor``).
    group
        Columns of a group; 128, and ignored, with any other `scale`.
    dtype
        Dtype of the scales; f16, and ignored, without scales.
    sparsity
        Share of the weights, the smallest ones, to set to zero: in the tensor, as well as a histogram allows, if it has no scales;
        else in each row or group, ties included. With 0 the error decides.
    bpw
        Bits per weight that codes and scales may take, or ``any``: the fewer, the more weights become zero. (A tensor takes some
        100 bytes more in a file.)
    """

    scale: Literal["row", "tensor", "group"] = "row"
    group: int = 128
    dtype: Literal["f16", "bf16", "f32"] = "f16"
    sparsity: str = option("0")
    bpw: str = option("any")

    def __post_init__(self) -> None:
        if self.scale != "group" and self.group != 128:
            raise ValueError(f"group={self.group} needs scale=group")
        if self.group < 32 or self.group > LONGEST or self.group % 32:
            raise ValueError(f"group may be a multiple of 32 up to {LONGEST}, not {self.group}")
        if self.scale == "tensor" and self.dtype != "f16":
            raise ValueError(f"dtype={self.dtype} needs scale=row or scale=group")
        if not 0 <= _number(self.sparsity) < 1:
            raise ValueError(f"sparsity may be a number from 0 to below 1, not {self.sparsity!r}")
        if self.bpw != "any" and not 0 < _number(self.bpw) < math.inf:
            raise ValueError(f"bpw may be a number above 0 or any, not {self.bpw!r}")
        if self.bpw != "any" and self._sparsity:
            raise ValueError("sparsity and bpw exclude each other: both decide how many weights become zero")

    @property
    @abstractmethod
    def size(self) -> int:
        """How many levels there are."""

    @property
    def _sparsity(self) -> float:
        return float(self.sparsity)

    def _columns(self, cols: int) -> int:
        """Return how many columns share a scale."""
        return min(self.group, cols) if self.scale == "group" else cols

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns that share a scale; 1 without scales."""
        return max(1, self._columns(matrix.cols)) if self.scale != "tensor" else 1

    def layout(self, matrix: Matrix) -> Layout:
        """Return the chunks, the codebook and, if there are any, the scales."""
        book = Array("codebook", self.size * F32.size, None)
        scales = Array("scales", DTYPES[self.dtype].size, max(1, self._columns(matrix.cols)))
        return (Chunks(), book) if self.scale == "tensor" else (Chunks(), book, scales)

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Fit the levels to the whole tensor."""
        chunks = tensor.matrix.chunks(self.chunk_alignment(tensor.matrix))
        return self.encoder_of(
            tensor, self._fit(run(lambda chunk: self._chunk_stats(tensor.read_chunk(chunk)), chunks))
        )

    def _chunk_stats(self, elements: Elements) -> _ChunkStats:
        """Return the statistics of a chunk, of weights divided by their scales if there are any."""
        values = np.ascontiguousarray(elements.to_f32())
        found = Survey.empty()
        if self.scale == "tensor":
            load("lut").survey(values.reshape(-1), found.counts, found.sums)
            return _ChunkStats(found, 0, values.size, set())
        squares, magnitudes = self._measured(values)
        scales = self._scales(values.shape, squares, magnitudes)
        load("lut").survey(self._unscaled(values, scales).reshape(-1), found.counts, found.sums)
        several = set(np.unique(magnitudes[squares > 0])[:2].tolist())
        return _ChunkStats(found, scales.size, values.size, several)

    def _fit(self, chunk_stats: Iterable[_ChunkStats]) -> _Fitted:
        """Return the levels for the whole tensor; raise `ValueError` if the scales alone use up `bpw`."""
        survey, scales, weights, magnitudes = Survey.empty(), 0, 0, set[int]()
        for stats in chunk_stats:
            survey.add(stats.survey)
            scales, weights = scales + stats.scales, weights + stats.weights
            magnitudes |= stats.magnitudes
        if self.bpw == "any" and self._sparsity == 0 and len(magnitudes) == 1 and magnitudes != {0}:
            return _Fitted(_of_magnitude(magnitudes.pop(), self.size), scaled=False)
        if self.bpw == "any":
            # with scales, the smallest weights of each row or group are zero already
            return _Fitted(fit(survey, self.size, sparsity=self._sparsity if self.scale == "tensor" else 0.0))
        taken = 8 * DTYPES[self.dtype].size * scales / max(1, weights)
        if taken >= float(self.bpw):
            raise ValueError(
                f"its scales alone take {taken:.3g} bits per weight, so that none are left of bpw={self.bpw}"
            )
        return _Fitted(fit(survey, self.size, bits=float(self.bpw) - taken))

    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Choose codes and scales for the rows of a chunk."""
        values = np.ascontiguousarray(elements.to_f32())
        if not elements.all_finite():
            return EncodedChunk((), finite=False)
        kernels, cols = load("levels"), values.shape[1]
        levels: Levels = fitted.levels
        scaled = self.scale != "tensor" and fitted.scaled
        scales = np.ones(len(values) * cuts(cols, self._columns(cols)), np.float32)
        if scaled:
            scales = self._scales(values.shape, *self._measured(values))
        unscaled = self._unscaled(values, scales) if scaled else values
        symbols = np.empty(symbol_count(values.size, self.size), np.uint8)
        codes = np.full(symbols.size * digits_per_symbol(self.size), self.size // 2, np.uint8)
        kernels.classify(unscaled.reshape(-1), levels.thresholds, codes[: values.size])
        load("symbols").join(codes, self.size, digits_per_symbol(self.size), symbols)
        if scaled:
            scales = self._refined(values, codes[: values.size], levels.entries, scales)
        decoded = np.empty(values.size, np.float32)
        self._expand(symbols, levels.entries, scales, cols, decoded)
        writer = StreamWriter()
        writer.stream(symbols, self.size)
        parts: list[Buffer] = [writer.chunk(values.size), levels.entries.tobytes()]
        zeroed = int(bool(elements.data.any()) and not levels.entries.any())
        if self.scale != "tensor":
            zeroed += int(self._nonzero(values)[scales == 0].sum())
            parts.append(self._stored(scales).tobytes())
        if elements.dtype is F64:  # it may be too small for float32 itself
            zeroed += int((self._nonzero(elements.data) & ~self._nonzero(values)).sum())
        floats = load("floats")
        lanes = np.zeros(floats.LANES)
        error = ErrorSum.of(values.size, lanes, floats.difference(values.reshape(-1), decoded, lanes))
        return EncodedChunk(tuple(parts), True, error, int(not math.isfinite(error.squares)), zeroed, writer.entropy)

    def _measured(self, values: Floats) -> tuple[NDArray[np.float64], NDArray[np.uint32]]:
        """Return each group's sum of squares, and the bits of its magnitude if all weights but zeros have the same, else 0."""
        rows, cols = values.shape
        squares = np.empty(rows * cuts(cols, self._columns(cols)))
        magnitudes = np.empty(squares.size, np.uint32)
        load("levels").measure(values.reshape(-1), cols, self._columns(cols), squares, magnitudes)
        return squares, magnitudes

    def _scales(self, shape: tuple[int, ...], squares: NDArray[np.float64], magnitudes: NDArray[np.uint32]) -> Floats:
        """Return the scale of each group, rounded to its dtype: its common magnitude if it has one, else its root mean square."""
        rows, cols = shape
        columns = self._columns(cols)
        sizes = np.tile(np.diff(np.append(np.arange(0, cols, columns), cols)), rows)
        with np.errstate(all="ignore"):
            scales = np.where(magnitudes > 0, magnitudes.view(np.float32), np.sqrt(squares / sizes).astype(np.float32))
        return self._rounded(scales)

    def _stored(self, scales: Floats) -> NDArray[Any]:
        return Elements(F32, scales).cast(DTYPES[self.dtype])

    def _rounded(self, scales: Floats) -> Floats:
        return Elements(DTYPES[self.dtype], self._stored(scales)).to_f32()

    def _unscaled(self, values: Floats, scales: Floats) -> Floats:
        """Return the weights divided by their scales; those that `sparsity` removes are zero."""
        cols = values.shape[1]
        least = np.zeros(scales.size, np.float32)
        if self._sparsity:
            each = cuts(cols, self._columns(cols))
            for number, start in enumerate(range(0, cols, self._columns(cols))):
                least[number::each] = _least(values[:, start : start + self._columns(cols)], self._sparsity)
        unscaled = np.empty_like(values)
        divisors = np.where(scales == 0, np.float32(1), scales)
        flat = values.reshape(-1)
        load("levels").unscale(flat, cols, self._columns(cols), divisors, least, unscaled.reshape(-1))
        return unscaled

    def _refined(self, values: Floats, codes: U8, entries: Floats, scales: Floats) -> Floats:
        """Return the scales of least squared error for some codes, rounded to their dtype."""
        common, squares = np.empty(scales.size), np.empty(scales.size)
        cols = values.shape[1]
        load("levels").products(values.reshape(-1), codes, entries, cols, self._columns(cols), common, squares)
        with np.errstate(all="ignore"):
            best = np.where(squares > 0, common / np.where(squares > 0, squares, 1), scales).astype(np.float32)
        return self._rounded(best)

    def _nonzero(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which groups have weights that are not zero."""
        starts = np.arange(0, values.shape[1], self._columns(values.shape[1]))
        return np.logical_or.reduceat(values != 0, starts, axis=1).reshape(-1)

    def _expand(self, symbols: U8, entries: Floats, scales: Floats, cols: int, out: Floats) -> None:
        """Decode symbols into a flat array of rows."""
        table = entries[digit_table(self.size)].reshape(-1)
        load("symbols").values(symbols, table, digits_per_symbol(self.size), out)
        if self.scale != "tensor":
            load("levels").rescale(out, cols, self._columns(cols), scales)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the rows of a chunk."""
        rows, cols = out.shape
        entries, scales = self.numbers(parts[1:], Matrix(rows, cols))
        self._expand(self._symbols(parts[0], out.size), entries, scales.reshape(-1), cols, out.reshape(-1))

    def numbers(self, parts: Sequence[Buffer], matrix: Matrix) -> tuple[Floats, Floats]:
        """Return the levels, and the scales of the groups of each row: of shape (rows, groups), or (1, 1) and 1 without scales.

        Parameters
        ----------
        parts
            Bytes of the segments ``codebook`` and, if there are any, ``scales``.
        matrix
            The rows and columns that they are for.

        Raises
        ------
        ValueError
            If no encoder can have written the bytes.
        """
        if not matrix.elements:
            return np.zeros(self.size, np.float32), np.ones((1, 1), np.float32)
        check_length(parts[0], self.size * F32.size, "codebook")
        entries, scales = np.frombuffer(parts[0], np.float32), np.ones((1, 1), np.float32)
        if self.scale != "tensor":
            dtype, groups = DTYPES[self.dtype], cuts(matrix.cols, self._columns(matrix.cols))
            check_length(parts[1], matrix.rows * groups * dtype.size, "scales")
            stored = np.frombuffer(parts[1], dtype.storage).reshape(matrix.rows, groups)
            scales = Elements(dtype, stored).to_f32()
        if entries[self.size // 2] != 0 or not (np.isfinite(entries).all() and np.isfinite(scales).all()):
            raise ValueError("its codebook or scales are impossible")
        return entries, scales

    def decode_codes(self, parts: Sequence[Buffer], out: NDArray[np.int8]) -> None:
        """Decode the codes of a chunk, from -(n - 1) / 2 to (n - 1) / 2.

        Parameters
        ----------
        parts
            As for `decode`.
        out
            Array of int8 in the chunk's shape.

        Raises
        ------
        ValueError
            If no encoder can have written the bytes.
        """
        table = (digit_table(self.size) - np.uint8(self.size // 2)).reshape(-1)
        symbols = self._symbols(parts[0], out.size)
        load("symbols").split(symbols, table, digits_per_symbol(self.size), out.reshape(-1).view(np.uint8))

    def _symbols(self, chunk: Buffer, count: int) -> U8:
        reader = StreamReader(chunk)
        symbols = reader.stream(symbol_count(count, self.size), self.size)
        reader.end(count)
        return symbols

    def histograms(self, parts: Sequence[Buffer], chunk: Chunk) -> dict[str, NDArray[np.int64]]:
        """Return how often each code occurs, from the most negative one on."""
        codes = np.empty(chunk.size, np.int8)
        self.decode_codes(parts, codes)
        return {"histogram": np.bincount(codes + self.size // 2, minlength=self.size)}


class _ChunkStats(NamedTuple):
    """Statistics of a chunk: histogram, number of scales and of weights, and up to two magnitudes of groups (0: mixed)."""

    survey: Survey
    scales: int
    weights: int
    magnitudes: set[int]


class _Fitted(NamedTuple):
    """The levels, and whether they are for weights divided by their scales."""

    levels: Levels
    scaled: bool = True


def _of_magnitude(magnitude: int, size: int) -> Levels:
    """Return the levels of weights that have a single magnitude besides zero, which they represent exactly."""
    entries, thresholds = np.zeros(size, np.float32), np.full(size - 1, np.inf, np.float32)
    half = size // 2
    level = np.array([magnitude], np.uint32).view(np.float32)[0]
    entries[[half - 1, half + 1]] = -level, level
    thresholds[: half - 1] = -np.inf
    thresholds[[half - 1, half]] = -level, 0
    return Levels(entries, thresholds)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _least(values: Floats, share: float) -> Floats:
    """Return for each row the least magnitude that is kept when at least this share of its weights is set to zero."""
    count = math.ceil(share * values.shape[1] * (1 - 1e-12))
    smallest = np.partition(np.abs(values), count - 1, axis=1)[:, count - 1]
    with np.errstate(over="ignore"):
        above: Floats = np.nextafter(smallest, np.float32(np.inf))
    return above


@register
@dataclass(frozen=True)
class Ternary(LevelCodec):
    """Zero and two levels, entropy-coded: at most 1.6 bits for each weight, and few if most are zero."""

    id: ClassVar[str] = "ternary"

    @property
    def size(self) -> int:
        """How many levels there are."""
        return 3


@register
@dataclass(frozen=True)
class FewLevels(LevelCodec):
    """An odd number of levels around zero, entropy-coded.

    Parameters
    ----------
    n
        How many levels.
    """

    id: ClassVar[str] = "levels"

    n: Literal[3, 5, 7, 9, 11, 13, 15] = 5

    @property
    def size(self) -> int:
        """How many levels there are."""
        return self.n
