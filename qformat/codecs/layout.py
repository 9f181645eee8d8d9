"""How a tensor is cut into chunks, and which bytes of its segments belong to each (spec/codecs.md, "Chunks")."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Buffer = bytes | memoryview

# Elements of a chunk: enough work to outweigh a task's overhead, small enough to stay in cache between two kernels. The borders
# decide in which order errors are summed, so another number needs a new minor version.
CHUNK_ELEMENTS = 1 << 19

# A dense chunk has at least a byte for this many elements, so that a small file cannot ask for much memory.
CHUNK_DENSITY = 1024


@dataclass(frozen=True)
class Matrix:
    """A tensor seen as rows: the first dimension against the product of the others; a vector is one row."""

    rows: int
    cols: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrix:
        """Return the view of a shape."""
        if len(shape) < 2:
            return cls(1, math.prod(shape))
        return cls(shape[0], math.prod(shape[1:]))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    def chunks(self, alignment: int) -> Iterator[Chunk]:
        """Cut the matrix into chunks of about `CHUNK_ELEMENTS` elements, counting the padding of rows to whole blocks.

        Within a row, chunks begin on multiples of `alignment`; a block that is longer than `CHUNK_ELEMENTS` is not cut.
        """
        if not self.elements:
            return
        rows, cols = self._steps(alignment)
        for row in range(0, self.rows, rows):
            for col in range(0, self.cols, cols):
                yield Chunk(row, min(rows, self.rows - row), col, min(cols, self.cols - col))

    def chunk_count(self, alignment: int) -> int:
        """Return the number of chunks."""
        if not self.elements:
            return 0
        rows, cols = self._steps(alignment)
        return -(-self.rows // rows) * -(-self.cols // cols)

    def chunk_number(self, alignment: int, chunk: Chunk) -> int:
        """Return the position of a chunk among all chunks."""
        rows, cols = self._steps(alignment)
        return chunk.row // rows * -(-self.cols // cols) + chunk.col // cols

    def _steps(self, alignment: int) -> tuple[int, int]:
        """Return the rows and columns of a chunk: whole rows, or a part of one."""
        padded = -(-self.cols // alignment) * alignment
        if padded <= max(CHUNK_ELEMENTS, alignment):
            return max(1, CHUNK_ELEMENTS // padded), self.cols
        return 1, max(1, CHUNK_ELEMENTS // alignment) * alignment


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a matrix, or a part of one row: what is encoded and decoded at a time."""

    row: int
    rows: int
    col: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    def elements(self, matrix: Matrix) -> slice:
        """Return the range of its elements in row-major order; they are contiguous."""
        start = self.row * matrix.cols + self.col
        return slice(start, start + self.size)


@dataclass(frozen=True)
class Array:
    """A segment of fixed length: `itemsize` bytes for every `columns` columns of a row, of which the last may be fewer.

    With `columns` None there is a single item, which every chunk needs, such as a codebook.
    """

    name: str
    itemsize: int
    columns: int | None = 1

    def span(self, matrix: Matrix, chunk: Chunk) -> slice:
        """Return the range of the bytes of a chunk."""
        if self.columns is None:
            return slice(0, self.itemsize)
        start = chunk.row * self._row_bytes(matrix.cols) + chunk.col // self.columns * self.itemsize
        return slice(start, start + chunk.rows * self._row_bytes(chunk.cols))

    def length(self, matrix: Matrix) -> int:
        """Return the length of the segment in bytes."""
        return matrix.rows * self._row_bytes(matrix.cols) if self.columns else self.itemsize * (matrix.elements > 0)

    def _row_bytes(self, cols: int) -> int:
        assert self.columns is not None
        return -(-cols // self.columns) * self.itemsize


@dataclass(frozen=True)
class Chunks:
    """A segment of variable length: the encoded chunks one after the other.

    Attributes
    ----------
    name
        Name of the segment.
    table
        The segment after it that holds the length of each chunk (u32); None if the lengths begin the segment itself.
    dense
        Whether each chunk has at least a byte for `CHUNK_DENSITY` elements.
    layer
        Whether the tensor can be read without this segment and those after it; its record has an error then.
    """

    name: str = "chunks"
    table: str | None = "lengths"
    dense: bool = True
    layer: bool = False


Layout = tuple[Array | Chunks, ...]

#: returns the bytes of a chunk in one part of a layout
PartReader = Callable[[Chunk], memoryview]


def spans(layout: Layout, matrix: Matrix, chunk: Chunk) -> tuple[slice, ...]:
    """Return the range of the bytes of a chunk in each segment of a layout of arrays."""
    return tuple(part.span(matrix, chunk) for part in layout if isinstance(part, Array))


def segment_lengths(layout: Layout, matrix: Matrix, alignment: int) -> tuple[tuple[str, int | None], ...]:
    """Return (name, length in bytes) of each segment in the order of the file; None if values decide the length."""
    found: list[tuple[str, int | None]] = []
    for part in layout:
        found.append((part.name, part.length(matrix) if isinstance(part, Array) else None))
        if isinstance(part, Chunks) and part.table:
            found.append((part.table, 4 * matrix.chunk_count(alignment)))
    return tuple(found)


def part_readers(layout: Layout, matrix: Matrix, alignment: int, segments: Iterable[memoryview]) -> list[PartReader]:
    """Return, for each part of a layout, a function that reads a chunk's bytes from the segments of a tensor.

    The readers raise ``ValueError`` if a table of lengths is wrong.
    """
    given = iter(segments)
    return [_reader(part, matrix, alignment, given) for part in layout]


def _reader(part: Array | Chunks, matrix: Matrix, alignment: int, segments: Iterator[memoryview]) -> PartReader:
    data = next(segments)
    if isinstance(part, Array):
        return lambda chunk: data[part.span(matrix, chunk)]
    size = 4 * matrix.chunk_count(alignment)
    table, start = (next(segments), 0) if part.table else (data[:size], size)
    stops: list[int] = []  # found by the first read; two threads that both find them find the same

    def read(chunk: Chunk) -> memoryview:
        if not stops:
            stops[:] = _chunk_stops(table, size, start, len(data))
        number = matrix.chunk_number(alignment, chunk)
        begin, end = stops[number], stops[number + 1]
        if part.dense and (end - begin) * CHUNK_DENSITY < chunk.size:
            raise ValueError("a chunk is too short")
        return data[begin:end]

    return read


def _chunk_stops(table: memoryview, size: int, start: int, stop: int) -> list[int]:
    """Return the start of the first chunk and the end of each, after checking that they end with the segment."""
    import numpy as np

    if len(table) != size:
        raise ValueError("the lengths of its chunks are missing")
    ends: list[int] = (start + np.cumsum(np.frombuffer(table, "<u4"), dtype=np.int64)).tolist()
    stops = [start, *ends]
    if stops[-1] != stop:
        raise ValueError("the lengths of its chunks do not add up")
    return stops


def join_chunks(layout: Layout, chunks: Sequence[Sequence[Buffer]], *, first: bool = True) -> list[list[Buffer]]:
    """Return the buffers that consecutive chunks append to each segment.

    Parameters
    ----------
    layout
        The layout of the tensor.
    chunks
        For each chunk its bytes for each part of the layout.
    first
        Whether they begin the tensor: an item that all chunks share is written with the first.
    """
    found: list[list[Buffer]] = []
    for number, part in enumerate(layout):
        parts = [chunk[number] for chunk in chunks]
        if isinstance(part, Chunks):
            table: Buffer = struct.pack(f"<{len(parts)}I", *map(len, parts))
            found += [parts, [table]] if part.table else [[table, *parts]]
        else:
            found.append(parts if part.columns else parts[:1] if first else [])
    return found
