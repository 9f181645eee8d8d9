"""A container file as a source: its tensors at a quality, and its assets."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from qformat.codecs.layout import Buffer, Chunk
from qformat.codecs.raw import Raw
from qformat.container.reader import ContainerReader
from qformat.dtypes import Elements
from qformat.errors import FormatError, QFormatError, QualityError, SourceError, TargetError
from qformat.files import on_this_machine
from qformat.pipeline.source import Checkpoint, SourceTensor, StoredSource
from qformat.quality import Quality
from qformat.readers.decoder import Decoders, TensorDecoder


class ContainerTensor(StoredSource):
    """A tensor of a container, decoded chunk by chunk; its record ends at the last layer that is read."""

    def __init__(self, decoder: TensorDecoder) -> None:
        self.name, self.shape = decoder.record.name, decoder.record.shape
        self.dtype = decoder.decoded
        self.codec, self.record = decoder.codec, decoder.record
        self.decoder = decoder

    def stored(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk as the file holds them."""
        with _as_source_errors():
            return tuple(self.decoder.parts(chunk))

    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk, with plain blocks if the file has entropy-coded ones."""
        with _as_source_errors():
            return tuple(self.decoder.blocks(chunk))

    @cached_property
    def _chunks(self) -> tuple[list[Chunk], list[int]]:
        """The chunks, and the first element of each."""
        chunks = self.decoder.chunks()
        return chunks, [chunk.elements(self.matrix).start for chunk in chunks]

    def read(self, elements: slice) -> Elements:
        """Return some elements, decoding the chunks that hold them."""
        chunks, starts = self._chunks
        parts = []
        for chunk in chunks[max(0, bisect_right(starts, elements.start) - 1) : bisect_left(starts, elements.stop)]:
            there = chunk.elements(self.matrix)
            start, stop = max(there.start, elements.start), min(there.stop, elements.stop)
            if start < stop:
                with _as_source_errors():
                    flat = self.decoder.decode(chunk).data.reshape(-1)
                parts.append(flat[start - there.start : stop - there.start])
        empty = np.empty(0, self.dtype.storage)
        return Elements(self.dtype, parts[0] if len(parts) == 1 else np.concatenate(parts or [empty]))


def open_container(path: Path, quality: Quality) -> Checkpoint:
    """Return the checkpoint in a container file.

    Raises
    ------
    SourceError
        If it is damaged, or a tensor cannot be decoded.
    QualityError
        If a quality is asked for and there are no layered tensors, or their layers do not reach it.
    """
    try:
        with on_this_machine(path) as here, _as_source_errors():
            container = ContainerReader(here)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        with _as_source_errors():
            tensors = [ContainerTensor(decoder) for decoder in Decoders(container, quality)]
        check_layers(container, quality)
    except QFormatError:
        container.close()
        raise
    assets: dict[str, Callable[[], bytes]] = {
        asset.name: partial(_asset, container, asset.name) for asset in container.index.assets
    }
    quantized = any(not isinstance(tensor.codec, Raw) for tensor in tensors)
    files = [path, *(shard.path for shard in container.shards)]
    return Checkpoint(tensors, assets, (), files, container.index.metadata, str(quality), quantized)


def lossy_warning(tensors: Iterable[SourceTensor]) -> list[str]:
    """Return a warning if tensors of a container are no longer what they once were, and something else is made of them."""
    stored = (tensor for tensor in tensors if isinstance(tensor, StoredSource))
    lossy = [tensor for tensor in stored if tensor.record.error and tensor.record.elements]
    if not lossy:
        return []
    more = (
        f" and {len(lossy) - 1} more: no longer what they once were"
        if len(lossy) > 1
        else ": no longer what it once was"
    )
    return [f"tensor {lossy[0].name!r}{more}, but of type {lossy[0].codec.id}; errors are against what that decodes to"]


def check_not_source(container: ContainerReader, output: Path) -> None:
    """Raise `TargetError` if a file is the container, or one of its shards."""
    if output.exists() and any(output.samefile(home.path) for home in (container, *container.shards)):
        raise TargetError(f"{output}: is the file that is to be read, or a part of it; give another name")


def check_layers(container: ContainerReader, quality: Quality) -> None:
    """Raise `QualityError` if a quality is asked for and no tensor is layered."""
    if quality != Quality() and not any(record.layers for record in container.tensors):
        raise QualityError(f"{container.path}: holds no layered tensors (type scm), so there is no quality to choose")


def _asset(container: ContainerReader, name: str) -> bytes:
    with _as_source_errors():
        return container.asset(name)


@contextmanager
def _as_source_errors() -> Iterator[None]:
    """Turn errors of the format, which name the file, into errors of a source."""
    try:
        yield
    except FormatError as error:
        raise SourceError(str(error)) from None
