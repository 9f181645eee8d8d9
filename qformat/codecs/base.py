"""Codecs, which a file records, and encoders, which a user requests."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qformat.codecs.layout import Array, Buffer, Chunk, Layout, Matrix, segment_lengths
from qformat.dtypes import F32, DType, Elements
from qformat.records import MeasuredError, Params, Segment, TensorRecord, type_string

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class ErrorSum:
    """Error of some elements: how many, the sum of their squared errors, the largest absolute error."""

    count: int
    squares: float
    maximum: float

    @classmethod
    def of(cls, count: int, lanes: NDArray[np.float64], largest: int) -> ErrorSum:
        """Return the error that a kernel measured: partial sums of squares, and the bits of the largest float32 error."""
        return cls(count, math.fsum(lanes.tolist()), struct.unpack("<f", struct.pack("<I", largest))[0])

    @staticmethod
    def total(parts: Sequence[ErrorSum]) -> MeasuredError:
        """Return the error of all parts together; the sum is exact, so their order does not matter."""
        count = sum(part.count for part in parts)
        squares = math.fsum(part.squares for part in parts)
        rmse = math.sqrt(squares / count) if count else 0.0
        return MeasuredError(rmse, max((part.maximum for part in parts), default=0.0))


@dataclass(frozen=True)
class EncodedChunk:
    """Result of encoding one chunk.

    Attributes
    ----------
    parts
        Its bytes for each part of `Codec.layout`.
    finite
        Whether the source held neither NaN nor infinity; if not, the rest is meaningless.
    error
        None if the codec is lossless for the dtype.
    overflowed, zeroed
        Number of scales (or values, or squared errors) too large for their float format; number of blocks (or chunks) that were
        not zero and became zero.
    entropy
        Order-0 entropy of the chunk's entropy-coded streams, in bits.
    """

    parts: tuple[Buffer, ...]
    finite: bool
    error: ErrorSum | None = None
    overflowed: int = 0
    zeroed: int = 0
    entropy: float = 0.0


class Readable(Protocol):
    """A tensor that an encoder reads, any number of times and from several threads."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> DType:
        """Its element type."""

    @property
    def matrix(self) -> Matrix:
        """The tensor seen as rows."""

    def read_chunk(self, chunk: Chunk) -> Elements:
        """Return the elements of a chunk, two-dimensional."""


#: maps a function over items, such as the chunks of a tensor, in order: `map`, or on threads
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class TensorEncoder:
    """Encodes the chunks of one tensor, in any order and on any thread.

    Attributes
    ----------
    codec
        The codec that is recorded; its parameters may depend on values.
    record
        The tensor's record, without what writing finds: offsets, digests, lengths that values decide, and `error`.
    encode
        Encodes one chunk.
    error
        Error of the tensor, if it is not the sum of the errors of its chunks.
    """

    codec: Codec
    record: TensorRecord
    encode: Callable[[Chunk], EncodedChunk]
    error: MeasuredError | None = None


def option(default: Any) -> Any:
    """Declare an encoder option: a file records it, but no decoder needs it."""
    return field(default=default, metadata={"option": True})


def optional(default: Any, *, copied: bool = False) -> Any:
    """Declare a parameter that is recorded only if it is not the default; one that is `copied` cannot be set in a type string."""
    return field(default=default, metadata={"optional": True, "copied": copied})


@dataclass(frozen=True)
class Codec(ABC):
    """A way of storing a tensor: a frozen dataclass whose fields are the parameters that a record holds.

    Subclasses check the parameters in ``__post_init__`` and raise ``ValueError``.
    """

    id: ClassVar[str]

    def decoded_from(self, dtype: DType) -> DType:
        """Return the dtype that `decode` gives for tensors whose source has this dtype: float32 unless a codec says otherwise."""
        return F32

    def accepts(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype can be stored: floats unless a codec says otherwise."""
        return dtype.floating

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype are stored bit for bit: none unless a codec says otherwise."""
        return False

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the multiple of columns on which chunks begin within a row."""
        return 1

    @abstractmethod
    def layout(self, matrix: Matrix) -> Layout:
        """Return the parts of a tensor in the order of the file, and what a chunk has in each."""

    @abstractmethod
    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode one chunk.

        Parameters
        ----------
        parts
            The chunk's bytes for each part of `layout`.
        out
            Result: two-dimensional C-contiguous array in the chunk's shape, of the storage of `decoded_from`.

        Raises
        ------
        ValueError
            If no encoder can have written the bytes.
        """

    def histograms(self, parts: Sequence[Buffer], chunk: Chunk) -> dict[str, NDArray[np.int64]]:
        """Return how often each code occurs in a chunk's bytes as ``histogram``, and other choices worth counting by name."""
        return {}

    def params(self) -> Params:
        """Return the parameters that a record holds."""
        values = {f.name: (getattr(self, f.name), f) for f in fields(self) if not f.metadata.get("option")}
        return {
            name: value for name, (value, f) in values.items() if not f.metadata.get("optional") or value != f.default
        }

    def decodes_like(self, other: Codec) -> bool:
        """Return whether another codec has the same layout and decoder."""
        return self.id == other.id and self.params() == other.params()

    @property
    def has_fixed_size(self) -> bool:
        """Whether the shape alone decides how many bytes a tensor takes, and where the bytes of each row are."""
        return all(isinstance(part, Array) for part in self.layout(Matrix(1, 1)))

    def segments(self, matrix: Matrix) -> tuple[tuple[str, int | None], ...]:
        """Return (name, length in bytes) of each segment in the order of the file; None if values decide the length."""
        return segment_lengths(self.layout(matrix), matrix, self.chunk_alignment(matrix))

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of all segments whose length the shape decides, without alignment."""
        return sum(length or 0 for _, length in self.segments(Matrix.of(shape)))

    def __str__(self) -> str:
        return type_of(self)


class Encoder(ABC):
    """A way of making an encoded tensor, given by a type string such as ``q4_0:search=exact``; or a copy of codes."""

    id: ClassVar[str]
    #: a tensor of at most this many chunks is encoded as one task; of a larger one each chunk is a task
    task_chunks: ClassVar[int] = 1

    @abstractmethod
    def accepts(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype can be encoded."""

    @abstractmethod
    def is_lossless(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype are stored bit for bit."""

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype may hold NaN and infinity."""
        return self.is_lossless(dtype)

    @abstractmethod
    def draft(self, tensor: Readable) -> TensorRecord | None:
        """Return the record of a tensor before anything is read, with the lengths of segments; None if they depend on values."""

    @abstractmethod
    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Make all passes over the tensor that the codec needs before its chunks can be encoded.

        Parameters
        ----------
        tensor
            The tensor.
        run
            Maps a function over chunks.

        Raises
        ------
        ValueError
            If the tensor cannot be stored as this type.
        """

    def __str__(self) -> str:
        return type_of(self)


@dataclass(frozen=True)
class ChunkEncoder(Codec, Encoder):
    """A codec that can be requested and that encodes each chunk by itself, possibly after passes over the tensor."""

    @abstractmethod
    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Encode one chunk.

        Parameters
        ----------
        elements
            A two-dimensional array.
        fitted
            What passes over the whole tensor found, for codecs that have some.

        Raises
        ------
        ValueError
            If its bytes are impossible for its dtype.
        """

    def options(self) -> Params:
        """Return the encoder options that a record holds."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("option")}

    def draft(self, tensor: Readable) -> TensorRecord | None:
        """Return the record of a tensor before anything is read; None if its size depends on values."""
        return draft_record(tensor, self, self.options()) if self.has_fixed_size else None

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Return the encoder of a tensor without any pass over it."""
        return self.encoder_of(tensor, None)

    def encoder_of(self, tensor: Readable, fitted: Any) -> TensorEncoder:
        """Return the encoder of a tensor, given what passes over it found."""
        record = draft_record(tensor, self, self.options())
        return TensorEncoder(self, record, lambda chunk: self.encode(tensor.read_chunk(chunk), fitted))


def type_of(parameters: Any) -> str:
    """Return the type string of a codec or encoder, a dataclass: its id and the parameters that are not the default."""
    changed = {f.name: getattr(parameters, f.name) for f in fields(parameters)}
    defaults = {f.name: f.default for f in fields(parameters)}
    return type_string(parameters.id, {name: value for name, value in changed.items() if value != defaults[name]})


def draft_record(
    tensor: Readable,
    codec: Codec,
    options: Params | None = None,
    layer_errors: Mapping[str, MeasuredError] | None = None,
    spread: float | None = None,
) -> TensorRecord:
    """Return the record of a tensor, without offsets, digests, lengths that values decide, and the measured error.

    Parameters
    ----------
    tensor
        The tensor.
    codec
        The codec that is recorded.
    options
        The encoder options that are recorded.
    layer_errors
        Error of the tensor up to each layer, by the layer's segment.
    spread
        The largest element less the smallest one, of a tensor with layers.
    """
    errors = layer_errors or {}
    return TensorRecord(
        name=tensor.name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype.name,
        codec=codec.id,
        params=codec.params(),
        encoder=options or {},
        segments=tuple(
            Segment(name, 0, length or 0, _NO_DIGEST, errors.get(name))
            for name, length in codec.segments(tensor.matrix)
        ),
        error=None if codec.is_lossless(tensor.dtype) else MeasuredError(0.0, 0.0),
        range=spread,
    )
