"""What the block formats share: rows cut into blocks of 32 with a scale each, as GGUF has them (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Buffer, Codec, Encoded, ErrorSum, Matrix, Piece
from qformat.dtypes import BF16, F32, F64, DType, Elements
from qformat.kernels import load

BLOCK = 32
INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class BlockCodec(Codec):
    """A codec of blocks of 32 weights; subclasses give the layout's numbers and have a kernel module named like their id.

    The kernel module has ``LANES``, ``quantize(x, blocks, lanes)``, ``dequantize(blocks, x)`` and, if there are codes worth
    counting, ``code_histogram(blocks, counts)``; see ``kernels/jit/q4_0.py``.
    """

    block: ClassVar[int] = BLOCK
    decoded: ClassVar[DType] = F32
    #: bytes of a block
    block_bytes: ClassVar[int]
    #: number of different codes, or 0 if they are not counted
    codes: ClassVar[int] = 0

    def accepts(self, dtype: DType) -> bool:
        """Return whether these are floats."""
        return dtype.floating

    def keeps(self, dtype: DType) -> bool:
        """Return False: codes are approximations."""
        del dtype
        return False

    def layout(self, matrix: Matrix) -> tuple[tuple[str, int], ...]:
        """Return the one segment; each row is filled up to whole blocks."""
        length = matrix.rows * self._row_bytes(matrix.cols) if matrix.elements else 0
        return (("blocks", length),)

    def spans(self, matrix: Matrix, piece: Piece) -> tuple[slice, ...]:
        """Return the blocks of a piece."""
        start = piece.row * self._row_bytes(matrix.cols) + piece.col // BLOCK * self.block_bytes
        return (slice(start, start + piece.rows * self._row_bytes(piece.cols)),)

    def encode(self, elements: Elements) -> Encoded:
        """Quantize the rows of a piece."""
        source = _padded(elements.data)
        values = source if elements.dtype is BF16 else Elements(elements.dtype, source).to_f32()
        rows, cols = elements.data.shape
        blocks = np.empty(rows * self._row_bytes(cols), np.uint8)
        kernels = load(self.id)
        lanes = np.zeros(kernels.LANES)
        peak, largest, overflowed, vanished = kernels.quantize(values.reshape(-1), blocks, lanes)
        error = ErrorSum.of(rows * cols, lanes, largest)
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
        if blocks.size != rows * self._row_bytes(cols):  # the kernel does not look
            raise ValueError(f"{blocks.size} bytes of blocks for {rows} x {cols} elements")
        if cols % BLOCK == 0:
            load(self.id).dequantize(blocks, out.reshape(-1))
            return
        padded = np.empty((rows, -(-cols // BLOCK) * BLOCK), np.float32)
        load(self.id).dequantize(blocks, padded.reshape(-1))
        out[:] = padded[:, :cols]

    def code_histogram(self, parts: Sequence[Buffer]) -> NDArray[np.int64] | None:
        """Return how often each code occurs, padding included."""
        if not self.codes:
            return None
        counts = np.zeros(self.codes, np.int64)
        load(self.id).code_histogram(np.frombuffer(parts[0], np.uint8), counts)
        return counts

    def _row_bytes(self, cols: int) -> int:
        return -(-cols // BLOCK) * self.block_bytes


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    """Fill each row up to whole blocks with zeros."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK))) if values.shape[1] % BLOCK else values
