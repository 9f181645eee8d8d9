"""Container files as checkpoints: their tensors, at a quality, and their assets."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from qformat.codecs.layout import Buffer, Chunk
from qformat.codecs.raw import Raw
from qformat.container.layout import MAGIC
from qformat.container.reader import ContainerReader
from qformat.converters.llama_cpp import is_quantizable
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.statements import may_state
from qformat.converters.quantized.unknown import Unknown
from qformat.converters.sources.gguf import REST
from qformat.converters.wording import and_more
from qformat.dtypes import Elements
from qformat.errors import FormatError, QFormatError, SourceError
from qformat.files import on_this_machine, reading
from qformat.pipeline.source import Checkpoint, SourceTensor, StoredSource
from qformat.quality import Quality
from qformat.readers.decoder import Decoders, TensorDecoder


class ContainerTensor(StoredSource):
    """A tensor of a container, decoded chunk by chunk; its record ends at the last layer that is read."""

    def __init__(self, decoder: TensorDecoder, *, of_gguf: bool = False) -> None:
        self.name, self.shape = decoder.record.name, decoder.record.shape
        self.dtype = decoder.decoded
        self.codec, self.record = decoder.codec, decoder.record
        self.decoder = decoder
        self.kept = of_gguf and not is_quantizable(self.name, self.shape)

    def check(self) -> None:
        """Compare all bytes with their digests."""
        with _as_source_errors():
            _ = self.decoder.segments

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
        """Decode the chunks that hold some elements."""
        chunks, starts = self._chunks
        parts = [np.empty(0, self.dtype.storage)]
        for chunk in chunks[max(0, bisect_right(starts, elements.start) - 1) : bisect_left(starts, elements.stop)]:
            own = chunk.elements(self.matrix)
            start, stop = max(own.start, elements.start), min(own.stop, elements.stop)
            if start < stop:
                with _as_source_errors():
                    flat = self.decoder.decode(chunk).data.reshape(-1)
                parts.append(flat[start - own.start : stop - own.start])
        return Elements(self.dtype, parts[1] if len(parts) == 2 else np.concatenate(parts))


def is_container(start: bytes) -> bool:
    """Return whether a file that begins so is a container file."""
    return start.startswith(MAGIC)


def open_container(path: Path, quality: Quality, root: str | None = None) -> Checkpoint:
    """Return the checkpoint in a container file, which must have a certain root if one is given.

    Raises
    ------
    SourceError
        If it is damaged, or a tensor cannot be decoded.
    QualityError
        If a quality is given and there are no layered tensors, or their layers do not reach it.
    """
    with _as_source_errors(), reading(path), on_this_machine(path) as here:
        container = ContainerReader(here, root=root)
    try:
        with _as_source_errors():
            of_gguf = any(asset.name == REST for asset in container.index.assets)
            tensors = [ContainerTensor(decoder, of_gguf=of_gguf) for decoder in decoders_of(container, quality)]
        claims = Claims.of(_configs(container), metadata=container.index.metadata)
        unknown = Unknown([tensor for tensor in tensors if isinstance(tensor.codec, Raw)], claims)
    except QFormatError:
        container.close()
        raise
    return Checkpoint(
        unknown.kept(tensors),
        {asset.name: partial(_asset, container, asset.name) for asset in container.index.assets},
        unknown.warnings(),
        files=[path, *map(Path, (shard.path for shard in container.shards))],
        metadata=container.index.metadata,
        variant=str(quality),
        quantized=bool(unknown) or any(not isinstance(tensor.codec, Raw) for tensor in tensors),
    )


def _configs(container: ContainerReader) -> dict[str, dict[str, Any]]:
    """Return the JSON objects in assets that may say something about quantization, by name."""
    configs = {}
    for asset in container.index.assets:
        if may_state(asset.name):
            with suppress(ValueError, RecursionError):
                values = json.loads(_asset(container, asset.name))
                if isinstance(values, dict):
                    configs[asset.name] = values
    return configs


def lossy_warning(tensors: Iterable[SourceTensor]) -> list[str]:
    """Return a warning if tensors of a container that are encoded again are of a lossy type already."""
    stored = (tensor for tensor in tensors if isinstance(tensor, StoredSource))
    lossy = [tensor for tensor in stored if tensor.record.error and tensor.record.elements]
    if not lossy:
        return []
    name, type_ = lossy[0].name, lossy[0].codec.id
    return [f"tensor {name!r}{and_more(lossy)}: lossy already, of type {type_}; errors are against the decoded values"]


def files_of(container: ContainerReader) -> list[Path]:
    """Return the paths of a container and its shards."""
    return [Path(home.path) for home in (container, *container.shards)]


def decoders_of(container: ContainerReader, quality: Quality) -> Decoders:
    """Return the decoders of a container whose tensors are read chunk by chunk on several threads.

    Raises `QualityError` if a quality is given and no tensor is layered.
    """
    return Decoders(container, quality, keep=3)  # tasks of a tensor's last chunks and of the next ones run at a time


def _asset(container: ContainerReader, name: str) -> bytes:
    with _as_source_errors():
        return container.asset(name)


@contextmanager
def _as_source_errors() -> Iterator[None]:
    """Raise `SourceError` in place of `FormatError`, which names the file already."""
    try:
        yield
    except FormatError as error:
        raise SourceError(str(error)) from None
