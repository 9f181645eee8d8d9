"""The tensors of an export: their types in the output, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qformat.codecs.base import ChunkEncoder, Codec
from qformat.codecs.blocks import plain
from qformat.codecs.layout import Buffer, Chunk
from qformat.codecs.raw import Raw, raw
from qformat.container.partial import PartialFile
from qformat.container.reader import ContainerReader
from qformat.converters.sources.container import ContainerTensor
from qformat.dtypes import DTYPES, F32, Elements
from qformat.errors import SourceError
from qformat.parallel import prefetch
from qformat.pipeline.encode import Progress
from qformat.pipeline.source import SourceTensor, StoredSource

DEFAULT_SHARD = 5_000_000_000


@dataclass(frozen=True)
class Output:
    """A tensor and its type in the output.

    Attributes
    ----------
    source
        A tensor of the container, or a constant that the format needs.
    codec
        The type: one whose only segment holds elements or blocks.
    """

    source: SourceTensor
    codec: Codec

    @property
    def name(self) -> str:
        """Its name."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes that it will have."""
        return self.codec.nbytes(self.shape)

    @property
    def element_size(self) -> int:
        """Bytes of an element, if they are stored as elements."""
        assert isinstance(self.codec, Raw)
        return self.codec.decoded.size

    @property
    def copied(self) -> bool:
        """Whether the bytes are those of the container."""
        return isinstance(self.source, StoredSource) and plain(self.source.codec).decodes_like(self.codec)

    @property
    def _stored(self) -> StoredSource:
        assert isinstance(self.source, StoredSource)
        return self.source

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks in order."""
        matrix = self.source.matrix
        return matrix.chunks((self._stored.codec if self.copied else self.codec).chunk_alignment(matrix))

    def encoded(self, chunk: Chunk) -> Buffer:
        """Return the bytes of a chunk."""
        if self.copied:
            (part,) = self._stored.encoded(chunk)
            return part
        return self.made(self.source.read_chunk(chunk))

    def made(self, elements: Elements) -> Buffer:
        """Return the bytes of a chunk of these elements, two-dimensional."""
        assert isinstance(self.codec, ChunkEncoder)  # others are only copied
        try:
            encoded = self.codec.encode(elements)
        except ValueError as error:
            raise SourceError(f"tensor {self.name!r}: {error}") from None
        if (not encoded.finite and not self.codec.is_lossless(elements.dtype)) or encoded.overflowed or encoded.zeroed:
            size = "small" if encoded.zeroed else "large"
            raise SourceError(f"tensor {self.name!r} holds values too {size} for {self.codec}; choose another --dtype")
        (part,) = encoded.parts
        return part


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Attributes
    ----------
    output
        The file or directory.
    files
        Bytes of each file, by name.
    tensors
        The tensors as they were written.
    warnings
        Warnings for the user, one line each.
    seconds
        Time that it took.
    """

    output: Path
    files: Mapping[str, int]
    tensors: Sequence[Output]
    warnings: Sequence[str] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the values for JSON output."""
        return {
            "output": str(self.output),
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "tensors": len(self.tensors),
            "copied": sum(tensor.copied for tensor in self.tensors),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Job:
    """A container that is being exported.

    Attributes
    ----------
    container
        The open file.
    tensors
        Its tensors, by name.
    folder
        Of the workspace: where to write the output under its name.
    dtype
        The type of tensors that are not copied, or None.
    jobs, progress, shard_size
        As in `qformat.converters.exports.export.export`.
    """

    container: ContainerReader
    tensors: Mapping[str, ContainerTensor]
    folder: Path
    dtype: Codec | None = None
    jobs: int = 1
    progress: Progress | None = None
    shard_size: int = DEFAULT_SHARD

    def write(self, file: PartialFile, placed: Sequence[tuple[Output, int]]) -> None:
        """Write tensors at offsets, encoding them on threads; no more than some chunks are in memory."""
        tasks = [(output, offset) for output, offset in placed if output.nbytes]
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="qformat-export") as pool:
            encoded = prefetch(pool, _tasks(tasks), 3 * self.jobs + 1)
            try:
                for output, start in tasks:
                    offset = start
                    for chunk in output.chunks():
                        part = next(encoded).result()
                        file.write(part, offset)
                        offset += len(part)
                        if self.progress:
                            self.progress(chunk.size)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _tasks(placed: Sequence[tuple[Output, int]]) -> Iterator[Callable[[], Buffer]]:
    for output, _ in placed:
        for chunk in output.chunks():
            yield partial(output.encoded, chunk)


def as_floats(tensor: ContainerTensor, dtype: Codec | None) -> Output:
    """Return a tensor as elements: those that are stored, or that come back bit for bit; else `dtype`, or the source's."""
    decoder = tensor.decoder
    if isinstance(decoder.codec, Raw) or decoder.record.error is None:
        return Output(tensor, raw(decoder.decoded))
    if dtype is not None:
        return Output(tensor, dtype)
    source = DTYPES[decoder.record.dtype]
    return Output(tensor, raw(source if source.size > 1 else F32))  # nothing rounds to float8
