"""Codes that index a codebook (spec/codecs.md, "lut")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Readable, Run, TensorEncoder, option
from qformat.codecs.codebooks import (
    Codebook,
    Survey,
    deviation,
    fit_gauss,
    fit_lloyd,
    fit_percentile,
    midpoints,
)
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.packed import PackedCodec, cuts
from qformat.codecs.quantized import Quantized, check_length
from qformat.codecs.registry import register
from qformat.dtypes import F16, F32, Elements
from qformat.kernels import load


@register
@dataclass(frozen=True)
class Lut(PackedCodec):
    """Codes of 2, 3 or 4 bits that index one codebook for the tensor, or one per block of a row.

    Parameters
    ----------
    scope
        Whether there is one codebook for the ``tensor``, or one for each ``block``.
    block
        Columns of a block; 128, and ignored, with scope ``tensor``.
    size
        Entries of a codebook.
    scale
        With ``row``, weights are first divided by the root mean square of their row.
    fit
        How the codebook is found: ``lloyd`` minimizes the squared error, ``percentile`` takes percentiles of the weights,
        ``gauss`` uses all codes equally often for Gaussian weights.
    """

    id: ClassVar[str] = "lut"

    scope: Literal["tensor", "block"] = "tensor"
    block: Literal[128, 256] = 128
    size: Literal[4, 8, 16] = 16
    scale: Literal["tensor", "row"] = "tensor"
    fit: Literal["lloyd", "percentile", "gauss"] = option("lloyd")

    def __post_init__(self) -> None:
        if self.scope == "tensor":
            if self.block != 128:
                raise ValueError(f"block={self.block} needs scope=block")
            return
        if self.scale != "tensor":
            raise ValueError(f"scale={self.scale} needs scope=tensor: the codebook of a block needs no scale")
        if self.fit != "lloyd":
            raise ValueError(f"fit={self.fit} needs scope=tensor: the codebook of a block is always the best one")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.size.bit_length() - 1

    @property
    def _columns(self) -> int:
        """Columns that share a codebook; 0 if all do."""
        return self.block if self.scope == "block" else 0

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of a block; whole rows if they are not longer, or have a scale."""
        if self.scale == "row":
            return self.padded(max(1, matrix.cols))
        return self.padded(min(self._columns, max(1, matrix.cols))) if self._columns else self.block_size

    def layout(self, matrix: Matrix) -> Layout:
        """Return codebooks, scales if there are any, and codes."""
        books = Array("codebooks", self.size * F16.size, self._columns or None)
        scales = (Array("scales", F16.size, max(1, matrix.cols)),) if self.scale == "row" else ()
        return (books, *scales, self._code_array)

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Fit the codebook, if there is one for the whole tensor."""
        if self.scope == "block":
            return self.encoder_of(tensor, None)
        chunks = tensor.matrix.chunks(self.chunk_alignment(tensor.matrix))
        return self.encoder_of(tensor, self._fit(run(lambda chunk: self._count(tensor.read_chunk(chunk)), chunks)))

    def _count(self, elements: Elements) -> Survey:
        """Return the histogram of a chunk, of weights divided by the scales of their rows if there are any."""
        values = elements.to_f32()
        if self.scale == "row":
            values = self._unscaled(values)
        found = Survey.empty()
        load("lut").survey(np.ascontiguousarray(values).reshape(-1), found.counts, found.sums)
        return found

    def _fit(self, surveys: Iterable[Survey]) -> Codebook:
        """Return the codebook for the whole tensor."""
        survey = Survey.total(surveys)
        if self.fit == "percentile":
            return fit_percentile(survey, self.size)
        if self.fit == "gauss":
            return fit_gauss(1.0 if self.scale == "row" else deviation(survey), self.size)
        return fit_lloyd(survey, self.size)[0]

    def _unscaled(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Divide rows by their scales; rows whose scale is 0 become infinite or NaN, which a histogram ignores."""
        scales = self._row_scales(self._pad(values), values.shape[1]).astype(np.float32)
        with np.errstate(all="ignore"):
            divided: NDArray[np.float32] = values / scales[:, None]
        return divided

    def _row_scales(self, values: NDArray[np.float32], cols: int) -> NDArray[np.float16]:
        """Return the root mean square of rows that are padded with zeros."""
        lanes = np.zeros((len(values), load("blocks").LANES))
        load("lut").row_squares(values.reshape(-1), values.shape[1], lanes.reshape(-1))
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        with np.errstate(over="ignore"):
            return np.sqrt(lanes[:, 0] / cols).astype(np.float16)

    def _quantize(self, values: NDArray[Any], cols: int, fitted: Any) -> Quantized:
        x = values.reshape(-1)
        scales = np.ones(len(values), np.float16)
        if self._columns:
            chosen = np.empty(len(values) * cuts(cols, self._columns) * self.size, np.float32)
            load("lut_search").codebooks(x, cols, self._columns, self.size, chosen)
            stored = Elements(F32, chosen).cast(F16)
            book = Codebook(stored, midpoints(stored.reshape(-1, self.size)).reshape(-1))
        else:
            book = fitted
            if self.scale == "row":
                scales = self._row_scales(values, cols)
        codes = np.empty(self._code_bytes(x.size), np.uint8)
        lanes = np.zeros(load("blocks").LANES)
        numbers = (_widened(scales), book.thresholds, _widened(book.entries))
        peak, largest = load("lut").encode(x, cols, self._columns, *numbers, codes, lanes, self.width)
        overflowed = sum(int((~np.isfinite(halves)).sum()) for halves in (book.entries, scales))
        zeroed = self._zeroed(book.entries, values[:, :cols])
        if self.scale == "row":
            zeroed += int((values[scales == 0] != 0).any(axis=1).sum())
        arrays: list[NDArray[Any]] = [book.entries, *([scales] if self.scale == "row" else []), codes]
        parts = tuple(array.data.cast("B") for array in arrays)
        return Quantized(parts, lanes, peak, largest, overflowed, zeroed)

    def _zeroed(self, entries: NDArray[np.float16], values: NDArray[np.float32]) -> int:
        """Return the number of codebooks of zeros for weights that are not all zero."""
        dead = ~entries.reshape(-1, self.size).any(axis=1)
        if not dead.any():
            return 0
        starts = np.arange(0, values.shape[1], self._columns or values.shape[1])
        alive = np.logical_or.reduceat(values != 0, starts, axis=1).reshape(-1)
        return int((alive & dead).sum()) if self._columns else int(alive.any())

    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        rows, padded = out.shape
        books = rows * cuts(padded, self._columns) if self._columns else 1
        check_length(parts[0], books * self.size * F16.size, "codebooks")
        check_length(parts[-1], self._code_bytes(out.size), "codes")
        scales = np.ones(rows, np.float16)
        if self.scale == "row":
            check_length(parts[1], rows * F16.size, "scales")
            scales = np.frombuffer(parts[1], np.float16)
        entries = _widened(np.frombuffer(parts[0], np.float16))
        codes = np.frombuffer(parts[-1], np.uint8)
        load("lut").dequantize(entries, _widened(scales), codes, out.reshape(-1), padded, self._columns, self.width)


def _widened(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    return Elements(F16, halves).to_f32()
