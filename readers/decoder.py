"""Decode tensors of a container chunk by chunk: what all readers share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qformat.codecs.base import CHUNK_DENSITY, CHUNK_ELEMENTS, Buffer, Chunk, Matrix, chunk_count, chunk_number, chunks
from qformat.codecs.blocks import BlockCodec
from qformat.codecs.layered import split_chunks
from qformat.codecs.levels import LevelCodec
from qformat.codecs.registry import codec_of
from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.errors import FormatError, MissingDecoderError, PathLike
from qformat.quality import Quality
from qformat.records import Segment, TensorRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

EVERYTHING = Quality()


class TensorDecoder:
    """Decodes one tensor.

    Parameters
    ----------
    container
        The open file.
    record
        The tensor's record.
    quality
        How much of it to read, if it is layered.

    Raises
    ------
    FormatError
        If the tensor cannot be decoded by this version, or its record is impossible.
    QualityError
        If its layers do not reach the quality.
    """

    def __init__(self, container: ContainerReader, record: TensorRecord, quality: Quality = EVERYTHING) -> None:
        self.home = container.home(record.name)
        self._path = self.home.path
        try:
            self.codec = codec_of(record)
            self.record = quality.of(record)
            if self.record is not record:
                self.codec = codec_of(self.record)
        except FormatError as error:
            raise FormatError(error.cause, path=self._path) from None
        self.matrix = Matrix.of(record.shape)
        self.decoded = self.codec.decoded_from(DTYPES[record.dtype])
        self._alignment = self.codec.chunk_alignment(self.matrix)
        self._segments = self.home.segments(self.record.segments)

    @property
    def natural(self) -> DType:
        """What numpy gets if it asks for nothing else: the stored dtype, or float32 where numpy has none or codes were stored."""
        return self.decoded if self.decoded.native else F32

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the tensor."""
        return list(chunks(self.matrix, self._alignment))

    def view(self) -> NDArray[Any] | None:
        """Return the stored elements, flat and read-only, without a copy, if that is what the codec stores."""
        stored = self.decoded
        unchecked = stored.name == "bool"  # of which not all bytes are valid
        if self.record.codec != stored.name or not stored.native or unchecked:
            return None
        return np.frombuffer(self._segments[0], stored.storage)

    def decode(self, chunk: Chunk) -> Elements:
        """Return the values of one chunk, two-dimensional."""
        out = np.empty((chunk.rows, chunk.cols), self.decoded.storage)
        self._decode(chunk, out)
        return Elements(self.decoded, out)

    def decode_into(self, flat: NDArray[Any], dtype: DType, chunk: Chunk) -> None:
        """Put the values of one chunk where they belong in the whole tensor.

        Parameters
        ----------
        flat
            The tensor's elements in row-major order, in the storage of `dtype`.
        dtype
            What to give the values as.
        chunk
            Which ones.

        Raises
        ------
        TypeError
            If the tensor's values cannot be given as `dtype`.
        """
        target = flat[chunk.elements(self.matrix)].reshape(chunk.rows, chunk.cols)
        if dtype is self.decoded:
            self._decode(chunk, target)
        else:
            target[:] = self.decode(chunk).cast(dtype)

    def rows(self, indices: NDArray[np.intp], dtype: DType) -> NDArray[Any]:
        """Return the values of some rows, two-dimensional, decoding no more than the chunks that they need.

        Raises
        ------
        TypeError
            If the tensor's values cannot be given as `dtype`.
        """
        result = np.empty((len(indices), self.matrix.cols), dtype.storage)
        if not result.size:
            return result
        if self.codec.sized:
            for start, chunk in runs(indices, self.matrix.cols, self._alignment):
                result[start : start + chunk.rows] = self.decode(chunk).cast(dtype)
            return result
        for chunk in self.chunks():
            wanted = np.flatnonzero((indices >= chunk.row) & (indices < chunk.row + chunk.rows))
            if wanted.size:
                values = self.decode(chunk).cast(dtype)
                result[wanted, chunk.col : chunk.col + chunk.cols] = values[indices[wanted] - chunk.row]
        return result

    def decode_codes(self, codec: LevelCodec, flat: NDArray[np.int8], chunk: Chunk) -> None:
        """Put the codes of one chunk where they belong in the whole tensor; `codec` is the decoder's own."""
        target = flat[chunk.elements(self.matrix)].reshape(chunk.rows, chunk.cols)
        self._apply(codec.decode_codes, chunk, target)

    def levels(self, codec: LevelCodec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the levels and the scales as `LevelCodec.numbers` does; `codec` is the decoder's own."""
        with self._naming_damage():
            return codec.numbers(self._segments[2:], self.matrix)

    def _decode(self, chunk: Chunk, out: NDArray[Any]) -> None:
        self._apply(self.codec.decode, chunk, out)

    def _apply(self, decode: Callable[[Sequence[Any], NDArray[Any]], None], chunk: Chunk, out: NDArray[Any]) -> None:
        if self.codec.layered:
            with self._naming_damage():
                decode(self._layers(chunk), out)
            return
        with self._naming_damage():
            decode(self._parts(chunk), out)

    def blocks(self, chunk: Chunk) -> Sequence[Buffer]:
        """Return the bytes of a chunk of a tensor that is not layered; of coded blocks the plain ones."""
        with self._naming_damage():
            parts = self._parts(chunk)
            return self.codec.plain(parts, chunk.rows, chunk.cols) if isinstance(self.codec, BlockCodec) else parts

    def _parts(self, chunk: Chunk) -> list[memoryview]:
        own = self._segments[2:] if self.codec.chunked else self._segments
        spans = self.codec.spans(self.matrix, chunk)
        parts = [segment[span] for segment, span in zip(own, spans, strict=True)]
        if self.codec.chunked:
            parts.insert(0, self._chunk(chunk))
        return parts

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise FormatError(f"tensor {self.record.name!r} is damaged: {error}", path=self._path) from None
        except MissingDecoderError as error:
            raise MissingDecoderError(f"{self._path}: tensor {self.record.name!r}: {error}") from None

    def segments(self) -> Iterator[tuple[Segment, memoryview]]:
        """Yield the segments that are read, with their bytes."""
        return zip(self.record.segments, self._segments, strict=True)

    def _layers(self, chunk: Chunk) -> list[memoryview]:
        """Return the first segment, and the chunk of a chunk in each other one."""
        number = chunk_number(self.matrix, self._alignment, chunk)
        parts = [self._segments[0], *(chunks[number] for chunks in self._layer_chunks)]
        if len(parts[1]) * CHUNK_DENSITY < chunk.rows * chunk.cols:
            raise ValueError("a chunk is too short")
        return parts

    @cached_property
    def _layer_chunks(self) -> list[list[memoryview]]:
        """The chunks of each segment but the first."""
        count = chunk_count(self.matrix, self._alignment)
        return [split_chunks(segment, count) for segment in self._segments[1:]]

    @cached_property
    def _chunk_stops(self) -> NDArray[np.int64]:
        """Where each chunk ends in the segment ``chunks``."""
        stops = np.cumsum(np.frombuffer(self._segments[1], "<u4"), dtype=np.int64)
        if int(stops[-1]) != len(self._segments[0]):
            raise ValueError("the lengths of its chunks do not add up")
        return stops

    def _chunk(self, chunk: Chunk) -> memoryview:
        number = chunk_number(self.matrix, self._alignment, chunk)
        stop = int(self._chunk_stops[number])
        start = int(self._chunk_stops[number - 1]) if number else 0
        if (stop - start) * CHUNK_DENSITY < chunk.rows * chunk.cols:
            raise ValueError("a chunk is too short")
        return self._segments[0][start:stop]


class SegmentChecker:
    """Compares each segment with its digest once, when it is first used."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()  # what one thread checks, others wait for
        # by file, and by all of its fields: an empty one has the offset of the next
        self._checked: set[tuple[PathLike, Segment]] = set()

    def check(self, decoder: TensorDecoder) -> None:
        """Check the segments that are read of a tensor.

        Raises
        ------
        FormatError
            If one is damaged.
        """
        if not self._enabled:
            return
        with self._lock:
            for segment, data in decoder.segments():
                key = decoder.home.path, segment
                if key not in self._checked:
                    decoder.home.check(segment, data, decoder.record.label)
                    self._checked.add(key)


def runs(indices: NDArray[np.intp], cols: int, chunk_alignment: int) -> list[tuple[int, Chunk]]:
    """Group row numbers into chunks of consecutive rows, which are filled up to whole grains of the codec.

    Returns
    -------
    list of (int, Chunk)
        Position of the chunk's first row among `indices`, and the chunk; of about `PIECE` elements at most.
    """
    longest = max(1, CHUNK_ELEMENTS // max(1, -(-cols // chunk_alignment) * chunk_alignment))
    grouped: list[tuple[int, Chunk]] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1 or i - start == longest:
            grouped.append((start, Chunk(int(indices[start]), i - start, 0, cols)))
            start = i
    return grouped
