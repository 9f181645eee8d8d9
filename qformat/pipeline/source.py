"""Input of a conversion: tensors that are read chunk by chunk, and the files that belong to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qformat.codecs.base import Buffer, Chunk, Codec
from qformat.dtypes import DType, Elements
from qformat.records import TensorRecord


class SourceTensor(ABC):
    """A tensor of a checkpoint, read in ranges of elements. Threads may call its methods at the same time.

    Attributes
    ----------
    name
        Its name in the model.
    dtype
        The element type that `read` returns.
    shape
        Its shape.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, elements: slice) -> Elements:
        """Return elements ``start:stop`` in row-major order, one-dimensional.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


class QuantizedSource(SourceTensor):
    """A tensor that another tool has quantized. `read` returns the values of its codes.

    Attributes
    ----------
    codec
        The type that holds the same codes.
    """

    codec: Codec

    @abstractmethod
    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk, for each segment of the codec where `Codec.spans` says.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


class StoredSource(SourceTensor):
    """A tensor of a container file. `read` returns its decoded values.

    Attributes
    ----------
    codec
        Its type.
    record
        Its record in the file.
    """

    codec: Codec
    record: TensorRecord

    @abstractmethod
    def segments(self) -> Sequence[Buffer]:
        """Return the bytes of its segments.

        Raises
        ------
        SourceError
            If they cannot be read.
        """

    @abstractmethod
    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk as `QuantizedSource.encoded` does; of entropy-coded blocks, the plain ones.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


@dataclass(frozen=True)
class Checkpoint:
    """A model as a converter found it.

    Attributes
    ----------
    tensors
        Every tensor, in any order.
    assets
        For each file to take along its name and a function that reads it.
    warnings
        What the user should know of it, a line each.
    files
        The files that it consists of.
    metadata
        Strings that are stored along.
    variant
        What was asked for that decides what the tensors hold, beside the files.
    quantized
        Whether another tool has quantized some of its tensors, in a way that is known or not: then floats among them may be scales,
        and nothing is made smaller unless that is asked for.
    """

    tensors: Sequence[SourceTensor]
    assets: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    files: Sequence[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""
    quantized: bool = False
