"""What a codec is whose tensors can be read with their first segments only (spec/codecs.md, "Layers")."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qformat.codecs.base import Buffer, Chunk, Codec, EncodedChunk, Matrix
from qformat.dtypes import Elements
from qformat.records import MeasuredError, Params


@dataclass(frozen=True)
class Content:
    """The bytes of one segment, and the error of the tensor up to it if it is a layer."""

    name: str
    data: bytes
    error: MeasuredError | None = None


@dataclass(frozen=True)
class Assembled:
    """A whole tensor as it will be stored.

    Attributes
    ----------
    params
        Of its record.
    segments
        In the order of the file.
    error
        Of its record; None if it is kept bit for bit.
    range
        The largest element of the source less the smallest one.
    entropy
        Bits that ideal coders need for all streams.
    """

    params: Params
    segments: tuple[Content, ...]
    error: MeasuredError | None
    range: float
    entropy: float

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(len(segment.data) for segment in self.segments)


@dataclass(frozen=True)
class LayeredCodec(Codec):
    """A codec that needs a whole tensor at once to decide what its segments hold.

    A tensor is surveyed chunk by chunk, then tried chunk by chunk until `decided` is content, then encoded chunk by chunk until
    `assembled` is.
    """

    @property
    def layered(self) -> bool:
        """Whether its tensors can be read with their first segments only: they can."""
        return True

    @property
    def fits(self) -> bool:
        """Whether the whole tensor has to be surveyed: it has."""
        return True

    @abstractmethod
    def trial(self, elements: Elements, fitted: Any, tried: Any) -> Any:
        """Return what `decided` needs to know of a chunk, given what it returned the last time, or None."""

    @abstractmethod
    def decided(self, fitted: Any, trials: Sequence[Any]) -> tuple[Any, bool]:
        """Return what is known now, and whether that is enough to encode; if not, all chunks are tried again."""

    @abstractmethod
    def encode(self, elements: Elements, fitted: Any = None, tried: Any = None) -> EncodedChunk:
        """Encode one chunk, given what the last trial returned, which may be changed so that encoding it again takes less time."""

    @abstractmethod
    def assembled(self, encoded: Sequence[EncodedChunk], fitted: Any) -> tuple[Assembled | None, Any]:
        """Return the tensor from what became of its chunks; or None, and what to encode them with again."""

    def layout(self, matrix: Matrix) -> tuple[tuple[str, int], ...]:
        """Return that the shape decides of no segment how long it is."""
        del matrix
        return ()

    def spans(self, matrix: Matrix, chunk: Chunk) -> tuple[slice, ...]:
        """Return that there are no other segments."""
        del matrix, chunk
        return ()


def with_lengths(chunks: Sequence[Buffer]) -> bytes:
    """Return a segment of chunks, which begins with their lengths."""
    return b"".join([struct.pack(f"<{len(chunks)}I", *map(len, chunks)), *chunks])


def split_chunks(segment: memoryview, count: int) -> list[memoryview]:
    """Return the chunks of a segment.

    Raises
    ------
    ValueError
        If their lengths do not add up to it.
    """
    if len(segment) < 4 * count:
        raise ValueError("the lengths of its chunks are missing")
    lengths = np.frombuffer(segment[: 4 * count], "<u4")
    stops = np.concatenate([[4 * count], 4 * count + np.cumsum(lengths, dtype=np.int64)]).tolist()
    if stops[-1] != len(segment):
        raise ValueError("the lengths of its chunks do not add up")
    return [segment[start:stop] for start, stop in pairwise(stops)]
