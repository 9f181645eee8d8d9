"""What a codec is: how it cuts a tensor, and what it promises for each chunk."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from qformat.dtypes import DType, Elements
from qformat.records import MeasuredError, Params, type_string

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | memoryview

# Elements of a chunk: enough work to outweigh a task's overhead, small enough to stay in cache between two kernels. The borders
# decide in which order errors are summed, so another number needs a new minor version.
CHUNK_ELEMENTS = 1 << 19

# A chunk has at least a byte for so many elements, so that a small file cannot ask for much memory (spec/codecs.md, "Chunks").
CHUNK_DENSITY = 1024


@dataclass(frozen=True)
class Matrix:
    """A tensor seen as rows: the first dimension against the product of the others."""

    rows: int
    cols: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrix:
        """Return the view of a shape; a vector is one row."""
        if len(shape) < 2:
            return cls(1, math.prod(shape))
        return cls(shape[0], math.prod(shape[1:]))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Chunk:
    """Some whole rows of a matrix, or a part of one row."""

    row: int
    rows: int
    col: int
    cols: int

    def elements(self, matrix: Matrix) -> slice:
        """Return where its elements stand in row-major order; they are contiguous."""
        start = self.row * matrix.cols + self.col
        return slice(start, start + self.rows * self.cols)


def chunks(matrix: Matrix, block: int) -> Iterator[Chunk]:
    """Cut a matrix into chunks of about `PIECE` elements, counting those that fill up a row to whole blocks.

    Within a row, chunks begin on multiples of `block`; one that is longer than `PIECE` is not cut.
    """
    if matrix.elements == 0:
        return
    rows, cols = _steps(matrix, block)
    for row in range(0, matrix.rows, rows):
        for col in range(0, matrix.cols, cols):
            yield Chunk(row, min(rows, matrix.rows - row), col, min(cols, matrix.cols - col))


def chunk_count(matrix: Matrix, block: int) -> int:
    """Return how many chunks there are, without going through them."""
    if matrix.elements == 0:
        return 0
    rows, cols = _steps(matrix, block)
    return -(-matrix.rows // rows) * -(-matrix.cols // cols)


def chunk_number(matrix: Matrix, block: int, chunk: Chunk) -> int:
    """Return how many chunks come before one of them."""
    rows, cols = _steps(matrix, block)
    return chunk.row // rows * -(-matrix.cols // cols) + chunk.col // cols


def _steps(matrix: Matrix, block: int) -> tuple[int, int]:
    """Return the rows and columns of a chunk: whole rows, or a part of one."""
    filled = -(-matrix.cols // block) * block
    if filled <= max(CHUNK_ELEMENTS, block):
        return max(1, CHUNK_ELEMENTS // filled), matrix.cols
    return 1, max(1, CHUNK_ELEMENTS // block) * block


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
    """What became of a chunk.

    Attributes
    ----------
    parts
        For each segment of `Codec.layout` the bytes of this chunk, as `Codec.spans` says where they stand; the chunk comes first if
        the codec is chunked.
    finite
        Whether the source held neither NaN nor infinity; if not, the rest is meaningless.
    error
        None if the codec keeps the dtype bit for bit.
    overflowed, zeroed
        How many scales (or values, or squared errors) were too large for their float format; how many blocks (or chunks) that were
        not zero became zero.
    entropy
        If the codec is chunked, the bits that ideal coders need for the chunk's streams, knowing how often each letter occurs.
    entropies
        If it is layered, the same for each part.
    """

    parts: tuple[Buffer, ...]
    finite: bool
    error: ErrorSum | None = None
    overflowed: int = 0
    zeroed: int = 0
    entropy: float = 0.0
    entropies: tuple[float, ...] = ()


def encoder_option(default: Any) -> Any:
    """Declare a parameter that steers the encoder and is of no use to the decoder."""
    return field(default=default, metadata={"encoder": True})


def request(default: Any) -> Any:
    """Declare a parameter that steers the encoder and that a file does not tell, as what it does to the tensor can be seen."""
    return field(default=default, metadata={"encoder": True, "recorded": False})


def found(default: Any) -> Any:
    """Declare a parameter that the encoder finds and that cannot be asked for."""
    return field(default=default, metadata={"found": True})


def copied(default: Any) -> Any:
    """Declare a parameter of tensors that other tools have quantized, which a record holds only if it is not the default."""
    return field(default=default, metadata={"found": True, "optional": True})


def optional(default: Any) -> Any:
    """Declare a parameter that a record holds only if it is not the default."""
    return field(default=default, metadata={"optional": True})


@dataclass(frozen=True)
class Codec(ABC):
    """One way of storing a tensor, with its parameters: a frozen dataclass whose fields are them.

    Subclasses check the parameters in ``__post_init__`` and raise ``ValueError``.
    """

    id: ClassVar[str]
    #: what `decode` gives
    decoded: ClassVar[DType]
    #: whether it only holds tensors whose codes are copied, so that it cannot be asked for and `encode` is never called
    copied_only: ClassVar[bool] = False

    @property
    def fits(self) -> bool:
        """Whether `encode` needs what `fitted_to` makes of the whole tensor."""
        return False

    @property
    def chunked(self) -> bool:
        """Whether the encoder decides what a chunk takes: segments ``chunks`` and ``lengths`` come before those of `layout`."""
        return False

    @property
    def layered(self) -> bool:
        """Whether tensors can be read with their first segments only; see `qformat.codecs.layered`."""
        return False

    @property
    def sized(self) -> bool:
        """Whether the shape decides how many bytes a tensor takes."""
        return not (self.chunked or self.layered)

    def decodes_like(self, other: Codec) -> bool:
        """Return whether another codec differs in nothing that a decoder needs to know."""
        return self.id == other.id and self.params() == other.params()

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype may hold NaN and infinity."""
        return self.is_lossless(dtype)

    def decoded_from(self, dtype: DType) -> DType:
        """Return what `decode` gives for tensors whose source has this dtype."""
        del dtype
        return self.decoded

    @abstractmethod
    def accepts(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype can be stored."""

    @abstractmethod
    def is_lossless(self, dtype: DType) -> bool:
        """Return whether tensors of this dtype are kept bit for bit."""

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return how many elements of a row stay together: within a row, chunks begin on multiples of this."""
        del matrix
        return 1

    @abstractmethod
    def layout(self, matrix: Matrix) -> tuple[tuple[str, int], ...]:
        """Return (name, length in bytes) of each segment whose length the shape decides."""

    @abstractmethod
    def spans(self, matrix: Matrix, chunk: Chunk) -> tuple[slice, ...]:
        """Return where in each segment of `layout` the bytes of a chunk stand.

        Each begins where that of the chunk before ends, or is the same for all chunks.
        """

    def survey(self, elements: Elements) -> Any:
        """Return what `fitted_to` needs to know of a chunk, which may hold NaN or infinity."""
        raise NotImplementedError

    def fitted_to(self, surveys: Iterable[Any]) -> Any:
        """Return what `encode` needs to know of the tensor, from the surveys of its chunks in order."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Encode one chunk.

        Parameters
        ----------
        elements
            A two-dimensional array.
        fitted
            What `fitted_to` returned, if the codec `fits`.

        Raises
        ------
        ValueError
            If its bytes are none that its dtype may have.
        """

    @abstractmethod
    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode one chunk.

        Parameters
        ----------
        parts
            The chunk if there is one, and the bytes at `spans`.
        out
            Two-dimensional C-contiguous array in the chunk's shape, of the storage of `decoded_from`: the result.

        Raises
        ------
        ValueError
            If the bytes are none that an encoder can have written.
        """

    def histograms(self, parts: Sequence[Buffer], chunk: Chunk) -> dict[str, NDArray[np.int64]]:
        """Return how often each code occurs in a chunk's bytes as ``histogram``, and other choices worth counting by name."""
        del parts, chunk
        return {}

    def params(self) -> Params:
        """Return the parameters that the decoder needs."""
        kept = [f for f in fields(self) if not f.metadata.get("encoder")]
        values = {f.name: getattr(self, f.name) for f in kept}
        return {
            f.name: values[f.name] for f in kept if not (f.metadata.get("optional") and values[f.name] == f.default)
        }

    def encoder(self) -> Params:
        """Return the parameters that only the encoder needed and that a file tells of."""
        recorded = [f for f in fields(self) if f.metadata.get("encoder") and f.metadata.get("recorded", True)]
        return {f.name: getattr(self, f.name) for f in recorded}

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return type_string(self.id, changed)

    def segments(self, matrix: Matrix) -> tuple[tuple[str, int | None], ...]:
        """Return (name, length in bytes) of each segment in the order of the file; None if the encoder decides it."""
        if not self.chunked:
            return self.layout(matrix)
        count = chunk_count(matrix, self.chunk_alignment(matrix))
        return (("chunks", None), ("lengths", 4 * count), *self.layout(matrix))

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of all segments of a tensor whose length the shape decides, without padding."""
        return sum(length or 0 for _, length in self.segments(Matrix.of(shape)))
