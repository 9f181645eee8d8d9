"""Tensors that are quantized already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qformat.codecs.base import Chunk, Codec
from qformat.dtypes import F32, DType, Elements
from tests.helpers.codecs import chunks_of, decode, part_of


@dataclass(frozen=True)
class Codes:
    """A quantized tensor in memory: its codec and the segments of a file."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    segments: tuple[bytes, ...]
    dtype: DType = F32

    def encoded(self, chunk: Chunk) -> tuple[bytes, ...]:
        return part_of(self.codec, self.shape, chunk, self.segments)

    def read(self, elements: slice) -> Elements:
        values = [
            decode(self.codec, self.encoded(chunk), (chunk.rows, chunk.cols)).reshape(-1)
            for chunk in chunks_of(self.codec, self.shape)
        ]
        return Elements(F32, np.concatenate(values)[elements])
