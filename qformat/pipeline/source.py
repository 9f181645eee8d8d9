"""Input protocols: source tensors and checkpoints, and the encoders that copy tensors which are quantized already."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from qformat.codecs.base import Codec, EncodedChunk, Encoder, ErrorSum, Readable, Run, TensorEncoder, draft_record
from qformat.codecs.blocks import BlockCodec
from qformat.codecs.ggml import Ggml
from qformat.codecs.layout import Buffer, Chunk, Matrix
from qformat.codecs.raw import raw
from qformat.dtypes import DType, Elements
from qformat.errors import MissingDecoderError
from qformat.records import TensorRecord

#: a codec, and the encoder that makes it of a tensor by copying
Copy = tuple[Codec, Encoder]


class SourceTensor(ABC):
    """A tensor of a checkpoint, which may be read from several threads at once.

    Attributes
    ----------
    name
        Its name in the model's code.
    dtype
        Its element type.
    shape
        Its shape.
    kept
        Whether it stays as it is under a type that is given for all tensors, so that only one that names it applies.
    fixed_because
        Why it stays as it is whatever type is asked for, as a clause about the tensor; empty if it may be given any type.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    kept: bool = False
    fixed_because: str = ""

    @abstractmethod
    def read(self, elements: slice) -> Elements:
        """Return elements ``start:stop`` in row-major order, one-dimensional; raise `SourceError` if they cannot be read."""

    @property
    def matrix(self) -> Matrix:
        """The tensor seen as rows."""
        return Matrix.of(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the checkpoint."""
        return math.prod(self.shape) * self.dtype.size

    def renamed(self, name: str) -> Self:
        """Return the same tensor under another name."""
        other = copy(self)
        object.__setattr__(other, "name", name)  # some are frozen
        return other

    def read_chunk(self, chunk: Chunk) -> Elements:
        """Return the elements of a chunk, two-dimensional."""
        elements = self.read(chunk.elements(self.matrix))
        return replace(elements, data=elements.data.reshape(chunk.shape))

    def copies(self) -> tuple[Copy, ...]:
        """Return the encoders that keep the tensor as it is; the first one is used if no type is given."""
        plain = raw(self.dtype)
        return ((plain, plain),)


class FixedSource(SourceTensor):
    """A tensor that stays as it is: it is no weight by itself, but a part of something that is not understood.

    Parameters
    ----------
    source
        The tensor.
    because
        Why, as `SourceTensor.fixed_because`.
    """

    def __init__(self, source: SourceTensor, because: str) -> None:
        self.name, self.dtype, self.shape = source.name, source.dtype, source.shape
        self.source, self.fixed_because = source, because

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        return self.source.read(elements)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the checkpoint."""
        return self.source.nbytes

    def copies(self) -> tuple[Copy, ...]:
        """Return the encoders that keep the tensor as it is."""
        return self.source.copies()


class QuantizedSource(SourceTensor):
    """A tensor that another tool has quantized; `read` returns the values of its codes, as float32.

    Attributes
    ----------
    codec
        The codec that holds the same codes.
    """

    codec: Codec

    @abstractmethod
    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk for each part of the codec's layout, not entropy-coded.

        Raises
        ------
        SourceError
            If they cannot be read.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codec.nbytes(self.shape)

    def copies(self) -> tuple[Copy, ...]:
        """Return the encoders that copy the codes, as they are or entropy-coded."""
        return ((self.codec, CodeCopy(self, self.codec)), *self._entropy_coded())

    def _entropy_coded(self) -> tuple[Copy, ...]:
        if not isinstance(self.codec, BlockCodec) or self.codec.coded:
            return ()
        codec = replace(self.codec, coded=True)
        return ((codec, CodeCopy(self, codec)),)


class StoredSource(QuantizedSource):
    """A tensor of a container file, quantized or not; `read` returns the values that it decodes to.

    Attributes
    ----------
    record
        Its record, up to the layers that are read.
    """

    record: TensorRecord

    @abstractmethod
    def check(self) -> None:
        """Compare all bytes with their digests; raise `SourceError` if they differ."""

    @abstractmethod
    def stored(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk for each part of the codec's layout, as the file holds them.

        Raises
        ------
        SourceError
            If they cannot be read.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of its segments."""
        return self.record.nbytes

    def copies(self) -> tuple[Copy, ...]:
        """Return the encoder that copies all bytes, and the one that entropy-codes its blocks."""
        return ((self.codec, StoredCopy(self)), *self._entropy_coded())


@dataclass(frozen=True)
class CodeCopy(Encoder):
    """Copies the codes of a tensor, which decode to the values that the source has: the error is zero.

    Parameters
    ----------
    source
        The tensor.
    codec
        Its codec, or the same blocks entropy-coded.
    """

    source: QuantizedSource
    codec: Codec

    def accepts(self, dtype: DType) -> bool:
        """Return True: the codes are there."""
        return True

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether the codec is, for tensors of this dtype."""
        return self.codec.is_lossless(dtype)

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return whether the codes may decode to NaN and infinity: blocks as a GGUF file has them."""
        return isinstance(self.codec, BlockCodec | Ggml)

    def draft(self, tensor: Readable) -> TensorRecord | None:
        """Return the record of the tensor; None if values decide its size."""
        return draft_record(tensor, self.codec) if self.codec.has_fixed_size else None

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Return the encoder, which decodes each chunk to find NaN and infinity."""
        return TensorEncoder(self.codec, draft_record(tensor, self.codec), self._encode)

    def _encode(self, chunk: Chunk) -> EncodedChunk:
        parts = self.source.encoded(chunk)
        decoded = np.empty(chunk.shape, self.source.dtype.storage)
        try:
            self.source.codec.decode(parts, decoded)
            finite = Elements(self.source.dtype, decoded).all_finite()
        except MissingDecoderError:
            finite = True  # nothing here can find out
        encoded = EncodedChunk(parts, finite, ErrorSum(decoded.size, 0.0, 0.0))
        if isinstance(self.codec, BlockCodec) and self.codec.coded:
            return self.codec.entropy_coded(encoded, decoded.size)
        return encoded

    def __str__(self) -> str:
        return str(self.codec)


@dataclass(frozen=True)
class StoredCopy(Encoder):
    """Copies a tensor of a container file with its record.

    Parameters
    ----------
    source
        The tensor.
    """

    source: StoredSource

    def accepts(self, dtype: DType) -> bool:
        """Return True: the bytes are there."""
        return True

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether the file holds the tensor bit for bit."""
        return self.source.record.error is None

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return True: what the file holds is copied."""
        return True

    def draft(self, tensor: Readable) -> TensorRecord:
        """Return the record that the file has."""
        return self.source.record

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Return the encoder, after a check of all bytes."""
        self.source.check()
        record = self.source.record
        return TensorEncoder(self.source.codec, record, partial(_stored_chunk, self.source), record.error)

    def __str__(self) -> str:
        return str(self.source.codec)


def _stored_chunk(source: StoredSource, chunk: Chunk) -> EncodedChunk:
    return EncodedChunk(source.stored(chunk), finite=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a source of tensors and assets.

    Attributes
    ----------
    tensors
        Every tensor, in any order.
    assets
        For each file to take along its name and a function that reads it.
    warnings
        Warnings for the user, one line each.
    files
        The files that it consists of.
    metadata
        Strings to store along.
    variant
        The options of reading, beside the files, that decide what the tensors hold.
    quantized
        Whether another tool has quantized some of its tensors, in a known way or not: then floats among them may be scales, and
        nothing is made smaller unless a type is given.
    """

    tensors: Sequence[SourceTensor]
    assets: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    files: Sequence[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""
    quantized: bool = False
