"""Codecs with packed codes: a segment of codes beside the numbers that give them a meaning (spec/codecs.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Array, Buffer, Chunk
from qformat.codecs.quantized import QuantizedCodec
from qformat.kernels import load

#: largest group size accepted
LONGEST = 1 << 20


@dataclass(frozen=True)
class PackedCodec(QuantizedCodec):
    """A codec whose last segment is ``codes``; rows are padded to whole runs of 32."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code."""

    @property
    def block_size(self) -> int:
        """Elements of a run."""
        return 32

    def _code_bytes(self, elements: int) -> int:
        """Return the bytes of the codes of elements in whole runs."""
        return elements // 8 * self.width

    @property
    def _code_array(self) -> Array:
        return Array("codes", 4 * self.width, self.block_size)

    def histograms(self, parts: Sequence[Buffer], chunk: Chunk) -> dict[str, NDArray[np.int64]]:
        """Return how often each code of at most four bits occurs, padding included."""
        if self.width > 4:
            return {}
        packed = np.frombuffer(parts[-1], np.uint8)
        codes = np.empty(packed.size * 8 // self.width, np.uint8)
        load("packing").unpack(packed, codes, self.width)
        return {"histogram": np.bincount(codes, minlength=1 << self.width)}


def cuts(cols: int, length: int) -> int:
    """Return how many groups of `length` columns a row has; the last may be shorter."""
    return -(-cols // length)
