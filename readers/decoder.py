"""Decode the tensors of a container chunk by chunk: the base of all readers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qformat.codecs.blocks import BlockCodec
from qformat.codecs.layout import CHUNK_ELEMENTS, Buffer, Chunk, Matrix, PartReader, part_readers
from qformat.codecs.levels import LevelCodec
from qformat.codecs.registry import codec_of
from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.errors import FormatError, MissingDecoderError, PathLike
from qformat.quality import Quality
from qformat.records import Segment, TensorRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Decoders:
    """The decoders of a container's tensors, which compare each segment with its digest once, when it is first read.

    Parameters
    ----------
    container
        The open file.
    quality
        How much to read of tensors with layers; None is everything.
    verify
        Whether to compare digests.
    """

    def __init__(self, container: ContainerReader, quality: Quality | None = None, *, verify: bool = True) -> None:
        self.container = container
        self._quality = quality or Quality()
        self._verify = verify
        self._lock = threading.Lock()  # while one thread checks, the others wait for the result
        # by file and by all fields of the segment: an empty one has the offset of the next
        self._checked: set[tuple[PathLike, Segment]] = set()

    def __iter__(self) -> Iterator[TensorDecoder]:
        return (self.of(record) for record in self.container.tensors)

    def of(self, record: TensorRecord) -> TensorDecoder:
        """Return the decoder of a tensor.

        Raises
        ------
        FormatError
            If this version cannot decode the tensor, or its record is impossible.
        QualityError
            If its layers do not reach the quality.
        """
        return TensorDecoder(self, record, self._quality)

    def segments(self, home: ContainerReader, record: TensorRecord) -> list[memoryview]:
        """Return the bytes of a tensor's segments; raise `FormatError` if one is damaged."""
        segments = home.segments(record.segments)
        if self._verify:
            with self._lock:
                for segment, data in zip(record.segments, segments, strict=True):
                    if (home.path, segment) not in self._checked:
                        home.check(segment, data, record.label)
                        self._checked.add((home.path, segment))
        return segments


class TensorDecoder:
    """Decodes one tensor; made by `Decoders.of`.

    Attributes
    ----------
    record
        Its record, up to the layers that are read.
    codec
        Its codec.
    decoded
        The dtype that it decodes to.
    matrix
        The tensor seen as rows.
    """

    def __init__(self, decoders: Decoders, record: TensorRecord, quality: Quality) -> None:
        self._decoders = decoders
        self._home = decoders.container.home(record.name)
        try:
            self.codec = codec_of(record)
            self.record = quality.of(record)
            if self.record is not record:
                self.codec = codec_of(self.record)
        except FormatError as error:
            raise FormatError(error.cause, path=self._home.path) from None
        self.matrix = Matrix.of(record.shape)
        self.decoded = self.codec.decoded_from(DTYPES[record.dtype])
        self._alignment = self.codec.chunk_alignment(self.matrix)
        self._loading = threading.Lock()
        self._segments: list[memoryview] | None = None

    @property
    def segments(self) -> list[memoryview]:
        """The bytes of the segments that are read, compared with their digests; raises `FormatError` if one is damaged."""
        with self._loading:  # one thread reads them, the others wait: a cached_property has no lock from Python 3.12 on
            if self._segments is None:
                self._segments = self._decoders.segments(self._home, self.record)
            return self._segments

    @property
    def natural(self) -> DType:
        """The default dtype for numpy: the stored one, or float32 where numpy has none or codes are stored."""
        return self.decoded if self.decoded.native else F32

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the tensor."""
        return list(self.matrix.chunks(self._alignment))

    def view(self) -> NDArray[Any] | None:
        """Return a flat, read-only view of the stored elements, or None if the codec does not store elements."""
        stored = self.decoded
        unchecked = stored.name == "bool"  # of which not all bytes are valid
        if self.record.codec != stored.name or not stored.native or unchecked:
            return None
        return np.frombuffer(self.segments[0], stored.storage)

    def decode(self, chunk: Chunk) -> Elements:
        """Return the values of one chunk, two-dimensional."""
        out = np.empty(chunk.shape, self.decoded.storage)
        self._decode(chunk, out)
        return Elements(self.decoded, out)

    def decode_into(self, flat: NDArray[Any], dtype: DType, chunk: Chunk) -> None:
        """Put the values of one chunk where they belong in the whole tensor.

        Parameters
        ----------
        flat
            The tensor's elements in row-major order, in the storage of `dtype`.
        dtype
            Dtype of the result.
        chunk
            The chunk.

        Raises
        ------
        TypeError
            If the tensor's values cannot be given as `dtype`.
        """
        target = flat[chunk.elements(self.matrix)].reshape(chunk.shape)
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
        if self.codec.has_fixed_size:
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
        target = flat[chunk.elements(self.matrix)].reshape(chunk.shape)
        self._apply(codec.decode_codes, chunk, target)

    def levels(self, codec: LevelCodec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the levels and the scales as `LevelCodec.numbers` does; `codec` is the decoder's own."""
        segments = self.segments[2:]
        with self._naming_damage():
            return codec.numbers(segments, self.matrix)

    def _decode(self, chunk: Chunk, out: NDArray[Any]) -> None:
        self._apply(self.codec.decode, chunk, out)

    def _apply(self, decode: Callable[[Sequence[Any], NDArray[Any]], None], chunk: Chunk, out: NDArray[Any]) -> None:
        parts = self.parts(chunk)
        with self._naming_damage():
            decode(parts, out)

    def parts(self, chunk: Chunk) -> list[memoryview]:
        """Return the bytes of a chunk for each part of the codec's layout; raise `FormatError` if they are damaged."""
        readers = self._readers
        with self._naming_damage():
            return [read(chunk) for read in readers]

    @cached_property
    def _readers(self) -> list[PartReader]:  # two threads may both make them, which does no harm
        return part_readers(self.codec.layout(self.matrix), self.matrix, self._alignment, self.segments)

    def blocks(self, chunk: Chunk) -> Sequence[Buffer]:
        """Return the parts of a chunk with plain blocks if they are entropy-coded."""
        parts = self.parts(chunk)
        if not isinstance(self.codec, BlockCodec):
            return parts
        with self._naming_damage():
            return self.codec.plain(parts, *chunk.shape)

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise FormatError(f"tensor {self.record.name!r} is damaged: {error}", path=self._home.path) from None
        except MissingDecoderError as error:
            raise MissingDecoderError(f"{self._home.path}: tensor {self.record.name!r}: {error}") from None


def runs(indices: NDArray[np.intp], cols: int, alignment: int) -> list[tuple[int, Chunk]]:
    """Group row numbers into chunks of consecutive rows.

    Returns
    -------
    list of (int, Chunk)
        Position of the chunk's first row among `indices`, and the chunk; of about `CHUNK_ELEMENTS` elements at most.
    """
    longest = max(1, CHUNK_ELEMENTS // max(1, -(-cols // alignment) * alignment))
    grouped: list[tuple[int, Chunk]] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1 or i - start == longest:
            grouped.append((start, Chunk(int(indices[start]), i - start, 0, cols)))
            start = i
    return grouped
