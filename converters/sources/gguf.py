"""GGUF files as checkpoints: tensors with their bytes as they are, and the rest of the file, so that it can be restored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from qformat.codecs.ggml import GGML_BLOCKS, Ggml
from qformat.codecs.layout import Buffer, Chunk, spans
from qformat.codecs.quantized import RowCodec
from qformat.codecs.registry import codecs
from qformat.container.index import MAX_ASSET_BYTES
from qformat.converters.llama_cpp import is_quantizable
from qformat.converters.sources.files import FileTensor, SharedFile
from qformat.converters.sources.gguf_file import MAGIC, Header, TensorInfo, TensorType, check_layout, parse
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.errors import MissingDecoderError, SourceError
from qformat.files import open_regular, reading
from qformat.pipeline.source import Checkpoint, QuantizedSource, SourceTensor

#: the asset with all bytes of the file that belong to no tensor, in order: the header, and the padding between tensors
REST = "model.gguf-header"


@dataclass(frozen=True)
class BlockTensor(QuantizedSource):
    """A tensor of blocks, which are copied."""

    name: str
    shape: tuple[int, ...]
    codec: RowCodec
    block_bytes: int
    file: SharedFile
    offset: int
    dtype: DType = F32
    kept: bool = False

    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the blocks of a chunk."""
        (span,) = spans(self.codec.layout(self.matrix), self.matrix, chunk)
        return (self.file.read(self.offset + span.start, span.stop - span.start),)

    def read(self, elements: slice) -> Elements:
        """Decode the blocks that hold some elements."""
        size = self.codec.block_size
        first, last = elements.start // size, -(-elements.stop // size)
        decoded = np.empty((1, (last - first) * size), np.float32)
        blocks = self.file.read(self.offset + first * self.block_bytes, (last - first) * self.block_bytes)
        try:
            self.codec.decode((blocks,), decoded)
        except MissingDecoderError as error:
            raise MissingDecoderError(f"{self.file.path}: tensor {self.name!r}: {error}") from None
        return Elements(self.dtype, decoded[0, elements.start - first * size : elements.stop - first * size])


def is_gguf(start: bytes) -> bool:
    """Return whether a file that begins so is a GGUF file."""
    return start.startswith(MAGIC)


def open_gguf(path: Path) -> Checkpoint:
    """Return the checkpoint in a GGUF file, version 2 or 3, little-endian.

    Its key-value pairs, the tokenizer among them, become an asset (`REST`) that only an export to GGUF can use.

    Raises `SourceError` if it cannot be read, is cut short or damaged, or holds tensors of an unknown type.
    """
    with reading(path), open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = parse(file, size, str(path))
    check_layout(header, size, str(path))
    spare = sum(stop - start for start, stop in header.gaps(size))
    if spare > MAX_ASSET_BYTES:
        raise SourceError(f"{path}: {spare} of its bytes belong to no tensor, more than the limit for an asset")
    shared = SharedFile(path)
    tensors = [_tensor(tensor, shared) for tensor in header.tensors]
    return Checkpoint(
        tensors,
        {REST: partial(_rest, shared, header, size)},
        _warnings(path, header),
        [path],
        quantized=any(isinstance(tensor, BlockTensor) for tensor in tensors),
    )


def _tensor(info: TensorInfo, file: SharedFile) -> SourceTensor:
    kept = not is_quantizable(info.name, info.shape)
    if info.type.name in DTYPES:
        return FileTensor(info.name, DTYPES[info.type.name], info.shape, file, info.offset, kept)
    return BlockTensor(info.name, info.shape, _codec(info.type), info.type.nbytes, file, info.offset, kept=kept)


@cache
def _codec(type_: TensorType) -> RowCodec:
    """Return the codec with the same blocks."""
    codec = Ggml(type_.name) if type_.name in GGML_BLOCKS else codecs()[type_.name]()
    assert isinstance(codec, RowCodec)
    return codec


def _rest(file: SharedFile, header: Header, size: int) -> bytes:
    return b"".join(file.read(start, stop - start) for start, stop in header.gaps(size))


def _warnings(path: Path, header: Header) -> list[str]:
    shards = header.number("split.count") or 1
    return [f"{path.name} is one part of {shards}: convert the others too for the whole model"] if shards > 1 else []
