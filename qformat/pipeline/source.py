"""What a converter hands over: tensors that can be read chunk by chunk, and the files that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from qformat.codecs.base import Buffer, Chunk, Codec
from qformat.dtypes import DType, Elements
from qformat.records import TensorRecord


class SourceTensor(Protocol):
    """A tensor of a checkpoint. `read` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """Its name, as the model's code knows it."""

    @property
    def dtype(self) -> DType:
        """Its element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self, elements: slice) -> Elements:
        """Return elements ``start:stop`` in row-major order, one-dimensional.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


@runtime_checkable
class QuantizedTensor(SourceTensor, Protocol):
    """A tensor that is quantized already. What `read` returns is what its codes stand for, as float32."""

    @property
    def codec(self) -> Codec:
        """The type of the format that holds the same codes."""

    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk, for each segment of the codec where `Codec.spans` says.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


@runtime_checkable
class StoredTensor(SourceTensor, Protocol):
    """A tensor of a container file. What `read` returns is what it decodes to."""

    @property
    def codec(self) -> Codec:
        """Its type."""

    @property
    def record(self) -> TensorRecord:
        """What the file says of it."""

    def segments(self) -> Sequence[Buffer]:
        """Return the bytes of its segments.

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
