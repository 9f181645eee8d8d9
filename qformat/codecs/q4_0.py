"""GGUF's Q4_0: blocks of 32 four-bit codes with one binary16 scale (spec/codecs.md, "q4_0")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Buffer, Codec, Encoded, ErrorSum, Matrix, Piece, encoder_option
from qformat.codecs.registry import register
from qformat.dtypes import BF16, F32, F64, DType, Elements
from qformat.kernels import load

BLOCK = 32
BLOCK_BYTES = 18
INFINITY_BITS = 0x7F800000


@register
@dataclass(frozen=True)
class Q4_0(Codec):  # noqa: N801  the format's name
    """Four bits and a sixteenth of a binary16 for each weight.

    Parameters
    ----------
    search
        How the scale is chosen: ``naive`` takes the largest weight over -8, as GGUF does.
    """

    id: ClassVar[str] = "q4_0"
    block: ClassVar[int] = BLOCK
    decoded: ClassVar[DType] = F32

    search: Literal["naive"] = encoder_option("naive")

    def accepts(self, dtype: DType) -> bool:
        """Return whether these are floats."""
        return dtype.floating

    def keeps(self, dtype: DType) -> bool:
        """Return False: codes are approximations."""
        del dtype
        return False

    def layout(self, matrix: Matrix) -> tuple[tuple[str, int], ...]:
        """Return the one segment; each row is filled up to whole blocks."""
        length = matrix.rows * _row_bytes(matrix.cols) if matrix.elements else 0
        return (("blocks", length),)

    def spans(self, matrix: Matrix, piece: Piece) -> tuple[slice, ...]:
        """Return the blocks of a piece."""
        start = piece.row * _row_bytes(matrix.cols) + piece.col // BLOCK * BLOCK_BYTES
        return (slice(start, start + piece.rows * _row_bytes(piece.cols)),)

    def encode(self, elements: Elements) -> Encoded:
        """Quantize the rows of a piece."""
        source = _padded(elements.data)
        values = source if elements.dtype is BF16 else Elements(elements.dtype, source).to_f32()
        rows, cols = elements.data.shape
        blocks = np.empty(rows * _row_bytes(cols), np.uint8)
        kernels = load("q4_0")
        lanes = np.zeros(kernels.LANES)
        peak, largest, overflowed, vanished = kernels.quantize(values.reshape(-1), blocks, lanes)
        error = ErrorSum(rows * cols, math.fsum(lanes.tolist()), float(np.uint32(largest).view(np.float32)))
        finite = peak < INFINITY_BITS
        if elements.dtype is F64:  # it may exceed float32 itself
            finite = elements.all_finite()
            overflowed += int(np.isinf(values).sum())
            if finite:
                lost = source.reshape(-1, BLOCK).any(axis=1) & ~values.reshape(-1, BLOCK).any(axis=1)
                vanished += int(lost.sum())
        return Encoded((blocks.data,), finite, error, overflowed, vanished)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the blocks of a piece."""
        blocks = np.frombuffer(parts[0], np.uint8)
        rows, cols = out.shape
        if blocks.size != rows * _row_bytes(cols):  # the kernel does not look
            raise ValueError(f"{blocks.size} bytes of blocks for {rows} x {cols} elements")
        if cols % BLOCK == 0:
            load("q4_0").dequantize(blocks, out.reshape(-1))
            return
        padded = np.empty((rows, -(-cols // BLOCK) * BLOCK), np.float32)
        load("q4_0").dequantize(blocks, padded.reshape(-1))
        out[:] = padded[:, :cols]

    def code_histogram(self, parts: Sequence[Buffer]) -> NDArray[np.int64]:
        """Return how often each of the 16 codes occurs, padding included."""
        counts = np.zeros(16, np.int64)
        load("q4_0").code_histogram(np.frombuffer(parts[0], np.uint8), counts)
        return counts


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    """Fill each row up to whole blocks with zeros."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK))) if values.shape[1] % BLOCK else values


def _row_bytes(cols: int) -> int:
    return -(-cols // BLOCK) * BLOCK_BYTES
