"""The interface of layouts: a layer of a checkpoint, and the tensors that a layout makes of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import CodedTensor
from qformat.dtypes import DType
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor


@dataclass(frozen=True)
class Layer:
    """The tensors whose names have the same prefix.

    Attributes
    ----------
    name
        The prefix; empty for names without a dot.
    parts
        The tensors by role, the last component of their names.
    """

    name: str
    parts: dict[str, SourceTensor] = field(default_factory=dict)

    def has(self, *roles: str) -> bool:
        """Return whether the layer has all of some parts."""
        return all(role in self.parts for role in roles)

    def named(self, role: str) -> str:
        """Return the full name of a part."""
        return f"{self.name}.{role}" if self.name else role

    def names(self, roles: Iterable[str]) -> set[str]:
        """Return the full names of those parts that there are."""
        return {self.parts[role].name for role in roles if role in self.parts}

    def part(self, role: str, of: str, dtypes: Sequence[DType], dims: int = 2) -> SourceTensor:
        """Return a required part.

        Parameters
        ----------
        role
            The part.
        of
            The part that is useless without it.
        dtypes, dims
            Its possible dtypes, and its number of dimensions.

        Raises
        ------
        SourceError
            If it is missing, empty, or of another dtype or number of dimensions.
        """
        name = self.named(role)
        if role not in self.parts:
            raise SourceError(f"tensor {name!r} is missing, without which {self.named(of)!r} cannot be decoded")
        tensor = self.parts[role]
        if tensor.dtype not in dtypes:
            expected = " or ".join(dtype.name for dtype in dtypes)
            raise SourceError(f"tensor {name!r} is of dtype {tensor.dtype.name}, where {expected} is needed")
        if len(tensor.shape) != dims or 0 in tensor.shape:
            raise SourceError(
                f"tensor {name!r} has shape {list(tensor.shape)}, where {dims} dimensions that are not 0 are needed"
            )
        return tensor


def layers_of(tensors: Iterable[SourceTensor]) -> list[Layer]:
    """Group the tensors of a checkpoint into layers."""
    layers: dict[str, Layer] = {}
    for tensor in tensors:
        name, _, role = tensor.name.rpartition(".")
        layers.setdefault(name, Layer(name)).parts[role] = tensor
    return list(layers.values())


class Found(NamedTuple):
    """Quantized tensors, the names of the tensors that they replace, and warnings, a line each."""

    tensors: Sequence[CodedTensor]
    replaced: set[str]
    warnings: Sequence[str] = ()


class Layout(NamedTuple):
    """A layout in which other tools store quantized layers.

    Attributes
    ----------
    matches
        Whether a layer may have this layout, by roles, dtypes and shapes.
    read
        Makes the tensors of all such layers; raises `SourceError` if one is damaged or contradicts the configuration.
    """

    matches: Callable[[Layer], bool]
    read: Callable[[Sequence[Layer], Claims], Found]


def each(tensor_of: Callable[[Layer, Claims], CodedTensor], roles: Sequence[str]) -> Callable[..., Found]:
    """Return a `Layout.read` for layers that are independent, given how to read one, and the parts that it consists of."""

    def read(layers: Sequence[Layer], claims: Claims) -> Found:
        return Found([tensor_of(layer, claims) for layer in layers], {name for x in layers for name in x.names(roles)})

    return read
