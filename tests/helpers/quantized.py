"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qformat.codecs.base import Codec
from qformat.codecs.layout import Chunk, Matrix, spans
from qformat.dtypes import F32, DType, Elements
from qformat.pipeline.source import QuantizedSource


@dataclass(frozen=True)
class Codes(QuantizedSource):
    """A tensor of some codec, in memory."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    segments: tuple[bytes, ...]
    dtype: DType = F32

    def encoded(self, chunk: Chunk) -> tuple[bytes, ...]:
        places = spans(self.codec.layout(Matrix.of(self.shape)), Matrix.of(self.shape), chunk)
        return tuple(segment[span] for segment, span in zip(self.segments, places, strict=True))

    def read(self, elements: slice) -> Elements:
        matrix, out = Matrix.of(self.shape), []
        for chunk in matrix.chunks(self.codec.chunk_alignment(matrix)):
            decoded = np.empty((chunk.rows, chunk.cols), np.float32)
            self.codec.decode(self.encoded(chunk), decoded)
            out.append(decoded.reshape(-1))
        return Elements(F32, np.concatenate(out)[elements])
