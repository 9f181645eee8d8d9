"""Codecs that store codes: rows of floats in, padded; float32 out, cropped (spec/codecs.md, "Rows")."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import ChunkEncoder, Codec, EncodedChunk, ErrorSum
from qformat.codecs.layout import Buffer
from qformat.dtypes import BF16, F64, Elements
from qformat.kernels import load

INFINITY_BITS = 0x7F800000
_LEAST, _MOST = 2.0**-40, 2.0**60  # largest errors whose squares binary32 holds well


class Quantized(NamedTuple):
    """Rows quantized by a kernel: the bytes of each part, and the values that the kernel measured.

    ``lanes`` are partial sums of squared errors; ``peak`` and ``largest`` the float32 bits of the largest magnitude of the source
    and of the error; ``overflowed`` and ``zeroed`` are counts as in `EncodedChunk`.
    """

    parts: tuple[Buffer, ...]
    lanes: NDArray[np.float64]
    peak: int
    largest: int
    overflowed: int
    zeroed: int


@dataclass(frozen=True)
class RowCodec(Codec):
    """A codec that stores codes for rows of weights, which are padded to whole blocks."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Rows are padded to a multiple of this number of elements, itself a multiple of 32."""

    @abstractmethod
    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        """Decode to C-contiguous rows of whole blocks, after checking the lengths of the parts: kernels do not check them."""

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the rows of a chunk."""
        self._decode_rows(parts, out)

    def _decode_rows(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode parts that are not entropy-coded."""
        rows, cols = out.shape
        padded = self.padded(cols)
        if padded == cols:
            self._dequantize(parts, out)
            return
        whole = np.empty((rows, padded), np.float32)
        self._dequantize(parts, whole)
        out[:] = whole[:, :cols]

    def padded(self, cols: int) -> int:
        """Return the length of a padded row."""
        return -(-cols // self.block_size) * self.block_size


@dataclass(frozen=True)
class QuantizedCodec(RowCodec, ChunkEncoder):
    """A codec that approximates weights by codes."""

    #: whether rows are padded with zeros that add nothing to the error that `_quantize` returns; if not, they are padded with
    #: their last element, and the error is measured again without the padding
    pads_with_zeros: ClassVar[bool] = True

    @property
    def takes_bf16(self) -> bool:
        """Whether `_quantize` takes bfloat16 as uint16 patterns, too."""
        return False

    @abstractmethod
    def _quantize(self, values: NDArray[Any], cols: int, fitted: Any) -> Quantized:
        """Encode C-contiguous rows of float32: `cols` elements and the padding to whole blocks."""

    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Quantize the rows of a chunk."""
        source = self._pad(elements.data)
        narrow = elements.dtype is BF16 and self.takes_bf16
        values = source if narrow else Elements(elements.dtype, source).to_f32()
        cols = elements.data.shape[1]
        parts, lanes, peak, largest, overflowed, zeroed = self._quantize(values, cols, fitted)
        if source.shape[1] != cols and not self.pads_with_zeros:
            lanes, largest = self._measured(*self._again(elements, parts))
        finite = peak < INFINITY_BITS
        if elements.dtype is F64:  # it may exceed float32 itself
            finite = elements.all_finite()
            overflowed += int(np.isinf(values).sum())
            if finite:
                lost = source.reshape(-1, 32).any(axis=1) & ~values.reshape(-1, 32).any(axis=1)
                zeroed += int(lost.sum())
        error = ErrorSum.of(elements.data.size, lanes, largest)
        if finite and error.maximum and not _LEAST <= error.maximum <= _MOST:
            error = self._measured_wide(*self._again(elements, parts))
            overflowed += not math.isfinite(error.squares)  # weights that decode to infinity
        return EncodedChunk(parts, finite, error, overflowed, zeroed)

    def _again(self, elements: Elements, parts: Sequence[Buffer]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the rows of a chunk and what they decode to, without padding, to measure the error again."""
        decoded = np.empty(elements.data.shape, np.float32)
        self._decode_rows(parts, decoded)
        return elements.to_f32(), decoded

    def _measured(self, values: NDArray[np.float32], decoded: NDArray[np.float32]) -> tuple[NDArray[np.float64], int]:
        """Return the error as in `Quantized`."""
        missing = self.padded(values.shape[1]) - values.shape[1]
        rows = (np.pad(array, ((0, 0), (0, missing))).reshape(-1) for array in (values, decoded))
        lanes = np.zeros(load("blocks").LANES)
        return lanes, int(load("blocks").measure(*rows, lanes))

    def _measured_wide(self, values: NDArray[np.float32], decoded: NDArray[np.float32]) -> ErrorSum:
        """Return the error with squares in binary64."""
        floats = load("floats")
        lanes = np.zeros(floats.LANES)
        largest = floats.difference(np.ascontiguousarray(values).reshape(-1), decoded.reshape(-1), lanes)
        return ErrorSum.of(values.size, lanes, largest)

    def _pad(self, values: NDArray[Any]) -> NDArray[Any]:
        missing = self.padded(values.shape[1]) - values.shape[1]
        mode: Literal["constant", "edge"] = "constant" if self.pads_with_zeros else "edge"
        return np.pad(values, ((0, 0), (0, missing)), mode) if missing else values


def check_length(part: Buffer, expected: int, what: str) -> None:
    """Raise `ValueError` unless a part has the length that its chunk needs."""
    if len(part) != expected:
        raise ValueError(f"{len(part)} bytes of {what} where {expected} are needed")
