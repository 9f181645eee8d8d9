"""Query and key matrices with their rows in GGUF's order for rotary embeddings.

Hugging Face's code rotates element i of a head with element i + (half of the head), llama.cpp's Llama element 2 i with 2 i + 1. So
row i + k (half of the head) of a head, k being 0 or 1, becomes row 2 i + k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import CHUNK_ELEMENTS, Buffer, Chunk
from qformat.converters.exports.outputs import Output
from qformat.converters.sources.container import ContainerTensor
from qformat.dtypes import Elements
from qformat.errors import SourceError


def check_heads(tensor: ContainerTensor, heads: int) -> None:
    """Raise `SourceError` unless the rows of a tensor are whole heads of an even number of rows."""
    if not tensor.shape or tensor.shape[0] % (2 * heads) or tensor.matrix.cols > CHUNK_ELEMENTS:
        raise SourceError(
            f"tensor {tensor.name!r} of shape {tensor.shape} does not have {heads} heads, as config.json says"
        )


@dataclass(frozen=True)
class RotatedOutput(Output):
    """A tensor whose rows are permuted within each head; its chunks are whole heads."""

    heads: int

    @property
    def _rows(self) -> int:
        """Rows of a head."""
        return self.shape[0] // self.heads

    @property
    def _cols(self) -> int:
        return self.source.matrix.elements // self.shape[0]

    def chunks(self) -> Iterator[Chunk]:
        """Yield chunks of whole heads."""
        step = max(1, CHUNK_ELEMENTS // (self._rows * self._cols)) * self._rows
        for row in range(0, self.shape[0], step):
            yield Chunk(row, min(step, self.shape[0] - row), 0, self._cols)

    def encoded(self, chunk: Chunk) -> Buffer:
        """Return the bytes of some heads."""
        if self.copied and len(self.shape) > 1:
            return self._permuted(self._stored_rows(chunk)).reshape(-1).data
        values = self.source.read(slice(chunk.row * self._cols, (chunk.row + chunk.rows) * self._cols))
        rows = self._permuted(values.data.reshape(chunk.rows, self._cols))
        return self.made(Elements(values.dtype, rows if len(self.shape) > 1 else rows.reshape(1, -1)))

    def _stored_rows(self, chunk: Chunk) -> NDArray[np.uint8]:
        """Return the stored bytes of some rows, two-dimensional."""
        source, parts = self._stored, []
        # entropy-coded blocks can only be decoded in chunks; of other codecs any rows have a place
        whole = [chunk] if source.codec.has_fixed_size else Output.chunks(self)
        for stored in whole:
            first, last = max(stored.row, chunk.row), min(stored.row + stored.rows, chunk.row + chunk.rows)
            if first < last:
                (data,) = source.encoded(stored)
                rows = np.frombuffer(data, np.uint8).reshape(stored.rows, -1)
                parts.append(rows[first - stored.row : last - stored.row])
        return np.concatenate(parts)

    def _permuted(self, rows: NDArray[Any]) -> NDArray[Any]:
        halves = rows.reshape(-1, 2, self._rows // 2, rows.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
