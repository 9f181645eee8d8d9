"""GGUF files as checkpoints: tensors with their bytes as they are, and the rest of the file, so that it can be restored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from qformat.codecs.ggml import GGML_BLOCKS, Ggml
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.codecs.quantized import RowCodec
from qformat.codecs.registry import codecs
from qformat.container.index import MAX_ASSET_BYTES, MAX_DIMENSIONS
from qformat.converters.llama_cpp import is_quantizable
from qformat.converters.sources.files import FileTensor, SharedFile
from qformat.converters.sources.gguf_file import MAGIC, Header, TensorInfo, TensorType, describe_type
from qformat.converters.sources.gguf_split import joined, other_parts, read_part
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.errors import MissingDecoderError, SourceError
from qformat.pipeline.source import Checkpoint, FixedSource, QuantizedSource, SourceTensor

# general.type or general.architecture of files of statistics, corrections and directions
_NO_MODELS = ("imatrix", "adapter", "controlvector")
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
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
    """Return the checkpoint in a GGUF file, version 2 or 3, little-endian; of one that is split, all parts beside it are read.

    Its key-value pairs, the tokenizer among them, become an asset (`REST`) that only an export to GGUF can use. Tensors of types
    that are not known are bytes, which stay as they are.

    Raises `SourceError` if it cannot be read, is cut short or damaged, or a part is missing.
    """
    first = read_part(path)
    parts = [first, *other_parts(first)]
    parts.sort(key=lambda part: part.number)
    if len(parts) > 1:
        header, size = joined(parts)
        rest = partial(_joined_rest, header, size)
    else:
        header, size = first.header, first.size
        rest = partial(_rest, SharedFile(path), header, size)
    spare = sum(stop - start for start, stop in header.gaps(size))
    if spare > MAX_ASSET_BYTES:
        raise SourceError(f"{path}: {spare} of its bytes belong to no tensor, more than the limit for an asset")
    kept = _only_numbers(header)
    tensors = [
        _tensor(info, shared, _shape(part.header, info), kept=kept)
        for part in parts
        for shared in [SharedFile(part.path)]
        for info in part.header.tensors
    ]
    return Checkpoint(
        tensors,
        {REST: rest},
        [*_warnings(path, header), *(warning for part in parts for warning in _shape_warnings(path, part.header))],
        [part.path for part in parts],
        quantized=bool(kept) or any(isinstance(tensor, BlockTensor | FixedSource) for tensor in tensors),
    )


def _only_numbers(header: Header) -> str:
    """Return what the file holds in place of a model's weights: numbers that no program reads as another type."""
    kind = header.text("general.type") or header.text("general.architecture")
    return kind if kind in _NO_MODELS else ""


def original_shape(header: Header, info: TensorInfo) -> tuple[int, ...]:
    """Return the shape of a tensor before it was reshaped to fit GGUF, as ComfyUI's files say it."""
    shape = header.integers(f"{_ORIGINAL_SHAPE}{info.name}")
    if not shape or min(shape) < 0 or len(shape) > MAX_DIMENSIONS or math.prod(shape) != info.elements:
        return info.shape
    return shape


def _shape(header: Header, info: TensorInfo) -> tuple[int, ...]:
    """Return the original shape, but that of the file if its rows cut blocks, which can only be copied whole."""
    shape = original_shape(header, info)
    return shape if Matrix.of(shape).cols % info.type.block == 0 else info.shape


def _shape_warnings(path: Path, header: Header) -> list[str]:
    cut = [
        info for info in header.tensors if not info.is_opaque and _shape(header, info) != original_shape(header, info)
    ]
    if not cut:
        return []
    shapes = ["x".join(map(str, shape)) for shape in (cut[0].shape, original_shape(header, cut[0]))]
    warning = (
        f"{path.name}: tensor {cut[0].name!r}{and_more(cut)} keeps the shape {shapes[0]} of its blocks in GGUF; its own, "
        f"{shapes[1]}, cuts them, and is that of exports to other formats"
    )
    return [warning]


def _warnings(path: Path, header: Header) -> list[str]:
    kind = _only_numbers(header)
    if kind:
        return [
            f"{path.name}: is no model, but of the kind {kind!r}: its numbers stay as they are unless --tensor-type names them"
        ]
    opaque = [info for info in header.tensors if info.is_opaque]
    if not opaque:
        return []
    warning = (
        f"{path.name}: tensor {opaque[0].name!r}{and_more(opaque)}: of type {describe_type(opaque[0].type)}; stored as bytes, "
        "which only export --to gguf can use"
    )
    return [warning]


def _tensor(info: TensorInfo, file: SharedFile, shape: tuple[int, ...], *, kept: str) -> SourceTensor:
    if info.is_opaque:
        data = FileTensor(info.name, DTYPES["u8"], (info.nbytes,), file, info.offset)
        return FixedSource(data, f"is of type {describe_type(info.type)}")
    stays = bool(kept) or not is_quantizable(info.name, info.shape)
    if info.type.name in DTYPES:
        return FileTensor(info.name, DTYPES[info.type.name], shape, file, info.offset, stays)
    return BlockTensor(info.name, shape, _codec(info.type), info.type.nbytes, file, info.offset, kept=stays)


@cache
def _codec(type_: TensorType) -> RowCodec:
    """Return the codec with the same blocks."""
    codec = Ggml(type_.name) if type_.name in GGML_BLOCKS else codecs()[type_.name]()
    assert isinstance(codec, RowCodec)
    return codec


def _rest(file: SharedFile, header: Header, size: int) -> bytes:
    return b"".join(file.read(start, stop - start) for start, stop in header.gaps(size))


def _joined_rest(header: Header, size: int) -> bytes:
    return header.data + bytes(sum(stop - start for start, stop in header.gaps(size)) - len(header.data))
