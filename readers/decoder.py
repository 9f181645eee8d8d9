"""Decode the tensors of a container chunk by chunk: the base of all readers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qformat.codecs.blocks import BlockCodec
from qformat.codecs.layout import CHUNK_ELEMENTS, Buffer, Chunk, Matrix, PartReader, part_readers
from qformat.codecs.levels import LevelCodec
from qformat.codecs.registry import codec_of
from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.errors import FormatError, MissingDecoderError, QualityError, SourceError
from qformat.locks import ForkLock
from qformat.parallel import for_each
from qformat.quality import Quality
from qformat.records import TensorRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray


_AT_ONCE = 1 << 20  # bytes to read, and to hash
# A tensor may decode to this many times its bytes in the file: an eighth of a bit for a float32. Some codecs can go far below
_MOST_TIMES = 256
_ALWAYS_DECODED = 256 << 20


@dataclass(frozen=True)
class Loaded:
    """The bytes of a tensor in memory, compared with their digests, and the readers of their parts."""

    segments: list[memoryview]
    readers: list[PartReader]
    nbytes: int


class Decoders:
    """The decoders of a container's tensors, which compare the bytes with their digests whenever they are read from the file.

    Parameters
    ----------
    container
        The open file.
    quality
        How much to read of tensors with layers; None is everything.
    verify
        Whether to compare digests. If not, `IntegrityError` is raised only if the file's time of modification changes.
    max_bytes
        The most bytes of memory for one tensor. None is 256 MiB, or 256 times the bytes that a tensor has in the file if that
        is more.
    keep
        The bytes of this many tensors stay in memory, those that were used last: several threads may decode the chunks of as many
        tensors at a time.
    keep_bytes
        As many more tensors stay in memory as have so many bytes together.

    Raises
    ------
    QualityError
        If a quality is given and no tensor is layered.
    """

    def __init__(
        self,
        container: ContainerReader,
        quality: Quality | None = None,
        *,
        verify: bool = True,
        keep: int = 1,
        keep_bytes: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        self.container = container
        self._quality = quality or Quality()
        if self._quality != Quality() and not any(record.layers for record in container.tensors):
            raise QualityError(
                f"{container.path}: holds no layered tensors (type scm), so there is no quality to choose"
            )
        self.verify = verify
        self._keep, self._keep_bytes = keep, keep_bytes
        self._max_bytes = max_bytes
        self._lock = ForkLock()  # while one thread reads and checks, the others wait for the result
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the last used one last
        self._kept = 0  # bytes of these

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

    def copy(self, *, keep: int) -> Decoders:
        """Return other decoders of the same tensors, which keep more or fewer of them."""
        return Decoders(
            self.container,
            self._quality,
            verify=self.verify,
            keep=keep,
            keep_bytes=self._keep_bytes,
            max_bytes=self._max_bytes,
        )

    def check_amount(self, what: str, nbytes: int, stored: int) -> None:
        """Raise `FormatError` if `nbytes` of memory are more than may be allocated for what has `stored` bytes in the file."""
        most = max(_ALWAYS_DECODED, _MOST_TIMES * stored) if self._max_bytes is None else self._max_bytes
        if nbytes > most:
            raise FormatError(
                f"{what} would take {nbytes} bytes of memory, more than {most}, and has {stored} in the file; "
                f"give max_bytes={nbytes} to allow that",
                path=self.container.path,
            )

    def load(self, decoder: TensorDecoder) -> Loaded:
        """Return the bytes of a tensor; raise `FormatError` if they are damaged."""
        with self._lock:
            found = self._loaded.get(decoder.record.name)
            if found:
                self._loaded.move_to_end(decoder.record.name)
                return found
            while len(self._loaded) >= self._keep and self._kept + decoder.record.nbytes > self._keep_bytes:
                _, forgotten = self._loaded.popitem(last=False)
                self._kept -= forgotten.nbytes
            segments = decoder.read_segments()
            found = Loaded(segments, decoder.part_readers(segments), decoder.record.nbytes)
            self._loaded[decoder.record.name] = found
            self._kept += found.nbytes
            return found


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

    @property
    def segments(self) -> list[memoryview]:
        """The bytes of the segments that are read, compared with their digests; raises `FormatError` if one is damaged."""
        return self._decoders.load(self).segments

    def read_segments(self) -> list[memoryview]:
        """Read the segments from the file, and compare them with their digests."""
        segments = self._home.segments(self.record.segments)
        if self._decoders.verify:
            for segment, data in zip(self.record.segments, segments, strict=True):
                self._home.check(segment, data, self.record.label)
        else:
            self._home.check_unchanged()
        return segments

    def part_readers(self, segments: Sequence[memoryview]) -> list[PartReader]:
        """Return the functions that read the parts of chunks from the bytes of the segments."""
        return part_readers(self.codec.layout(self.matrix), self.matrix, self._alignment, segments)

    @property
    def natural(self) -> DType:
        """The default dtype for numpy: the stored one, or float32 where numpy has none or codes are stored."""
        return self.decoded if self.decoded.native else F32

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the tensor."""
        return list(self.matrix.chunks(self._alignment))

    def view(self) -> NDArray[Any] | None:
        """Return a flat, read-only view of the stored elements, or None if the codec does not store elements."""
        if not self._is_plain() or not self.decoded.native:
            return None
        return np.frombuffer(self.segments[0], self.decoded.storage)

    def decode(self, chunk: Chunk) -> Elements:
        """Return the values of one chunk, two-dimensional."""
        out = np.empty(chunk.shape, self.decoded.storage)
        self._decode(chunk, out)
        return Elements(self.decoded, out)

    def _cast(self, chunk: Chunk, dtype: DType) -> NDArray[Any]:
        """Return the values of one chunk in another dtype; raise `SourceError` if one becomes infinite."""
        values = self.decode(chunk)
        cast = values.cast(dtype)
        narrower = (dtype.exponent, dtype.mantissa) < (self.decoded.exponent, self.decoded.mantissa)
        if narrower and not Elements(dtype, cast).all_finite() and self._overflows(values, cast, dtype):
            raise self.too_large(dtype)
        return cast

    def _overflows(self, values: Elements, cast: NDArray[Any], dtype: DType) -> bool:
        """Return whether a finite value was cast to infinity."""
        infinite = np.isinf(Elements(dtype, cast).to_f64())
        return bool((infinite & np.isfinite(values.to_f64())).any())

    def too_large(self, dtype: DType) -> SourceError:
        """Return the error to raise for a value that a dtype cannot hold."""
        wider = "bf16, f32 or f64" if dtype.exponent < F32.exponent else "f64"
        return SourceError(
            f"{self._home.path}: {self.record.label} has a value that is too large for {dtype.name}; read it as {wider}"
        )

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
            target[:] = self._cast(chunk, dtype)

    def decode_all(self, flat: NDArray[Any], dtype: DType, jobs: int) -> None:
        """Put the values of the whole tensor into `flat`, as `decode_into` does, on several threads."""
        if dtype is self.decoded and self._is_plain():
            self._fill(flat.view(np.uint8).data)
            return
        _ = self.segments  # also of a tensor without chunks
        for_each(lambda chunk: self.decode_into(flat, dtype, chunk), self.chunks(), jobs)

    def _is_plain(self) -> bool:
        """Return whether the only segment is the elements, all of whose bytes are valid."""
        return self.record.codec == self.decoded.name != "bool"

    def _fill(self, data: memoryview) -> None:
        """Read the only segment, compare it with its digest, and leave its bytes where they are."""
        (segment,) = self.record.segments
        digest = hashlib.sha256()
        for start in range(0, len(data), _AT_ONCE):
            part = data[start : start + _AT_ONCE]
            self._home.fill(part, segment.offset + start)
            if self._decoders.verify:  # while it is in the processor's cache
                digest.update(part)
        if self._decoders.verify:
            self._home.check_digest(segment, digest.hexdigest(), self.record.label)
        else:
            self._home.check_unchanged()

    def check_amount(self, dtype: DType, elements: int | None = None) -> None:
        """Raise `FormatError` if the tensor, or some elements of it, would take too much memory as `dtype`."""
        count = self.matrix.elements if elements is None else elements
        self._decoders.check_amount(self.record.label, count * dtype.size, self.record.nbytes)

    def rows(self, indices: NDArray[np.intp], dtype: DType) -> NDArray[Any]:
        """Return the values of some rows, two-dimensional, decoding no more than the chunks that they need.

        Raises
        ------
        TypeError
            If the tensor's values cannot be given as `dtype`.
        """
        self.check_amount(
            dtype, min(len(indices), self.matrix.rows) * self.matrix.cols
        )  # repeated ones are the caller's wish
        result = np.empty((len(indices), self.matrix.cols), dtype.storage)
        if not result.size:
            return result
        if self.codec.has_fixed_size:
            for start, chunk in runs(indices, self.matrix.cols, self._alignment):
                result[start : start + chunk.rows] = self._cast(chunk, dtype)
            return result
        for chunk in self.chunks():
            wanted = np.flatnonzero((indices >= chunk.row) & (indices < chunk.row + chunk.rows))
            if wanted.size:
                values = self._cast(chunk, dtype)
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
        readers = self._decoders.load(self).readers
        with self._naming_damage():
            return [read(chunk) for read in readers]

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
