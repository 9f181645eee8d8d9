"""The interface of layouts: a layer of a checkpoint, and the tensors that a layout makes of its parts."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import CodedTensor
from qformat.converters.quantized.roles import WEIGHT, holds_codes, tells_of_codes
from qformat.dtypes import DType
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor


@dataclass(frozen=True)
class Layer:
    """The tensors that belong to one weight.

    Their names are a prefix, a dot and a role, such as ``weight_scale`` or ``weight.absmax``. If the weight is not called weight,
    as stacked experts are not, then their names begin with that of the weight, and the roles are what they would be otherwise:
    ``gate_up_proj`` and ``gate_up_proj_scale`` are the parts ``weight`` and ``weight_scale`` of the layer ``gate_up_proj``.

    Attributes
    ----------
    name
        The prefix; empty for names without a dot.
    parts
        The tensors by role.
    joined
        Whether names begin with that of the weight.
    """

    name: str
    parts: dict[str, SourceTensor] = field(default_factory=dict)
    joined: bool = False

    def has(self, *roles: str) -> bool:
        """Return whether the layer has all of some parts."""
        return all(role in self.parts for role in roles)

    def named(self, role: str) -> str:
        """Return the full name of a part."""
        if self.joined:
            return self.name + (role.removeprefix(WEIGHT) if role.startswith(WEIGHT) else f"_{role}")
        return f"{self.name}.{role}" if self.name else role

    def names(self, roles: Iterable[str]) -> set[str]:
        """Return the full names of those parts that there are."""
        return {self.parts[role].name for role in roles if role in self.parts}

    def part(self, role: str, of: str, dtypes: Sequence[DType], dims: int = 2) -> SourceTensor:
        """Return the part without which the part `of` is useless.

        Raises `SourceError` if it is missing, empty, or of none of some dtypes or another number of dimensions.
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
    every = {tensor.name: tensor for tensor in tensors}
    layers: dict[tuple[str, bool], Layer] = {}

    def add(name: str, role: str, tensor: SourceTensor, *, joined: bool) -> None:
        layers.setdefault((name, joined), Layer(name, joined=joined)).parts[role] = tensor

    siblings: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in every.items():
        owner = _owner(name, every)
        prefix, _, own = (owner or name).rpartition(".")
        if owner and own != WEIGHT:
            add(owner, WEIGHT + name[len(owner) :], tensor, joined=True)
        elif owner:
            add(prefix, WEIGHT + name[len(owner) :], tensor, joined=False)
        else:
            siblings.setdefault(prefix, {})[own] = tensor
    stems_of: dict[str, set[str]] = {}
    for name, joined in layers:
        if joined:
            prefix, _, stem = name.rpartition(".")
            stems_of.setdefault(prefix, set()).add(stem)
    for prefix, parts in siblings.items():
        stems = _stems(parts) | stems_of.get(prefix, set())
        for role, tensor in parts.items():
            stem = max((stem for stem in stems if f"{role}_".startswith(f"{stem}_")), key=len, default="")
            if not stem:
                add(prefix, role, tensor, joined=False)
                continue
            rest = role[len(stem) :]
            add(
                f"{prefix}.{stem}" if prefix else stem,
                rest[1:] if rest == "_bias" else WEIGHT + rest,
                tensor,
                joined=True,
            )
    return list(layers.values())


def _owner(name: str, names: Container[str]) -> str:
    """Return the weight, or another tensor, under whose name a tensor stands, as ``a.weight.absmax`` does; else an empty string."""
    dot = name.find(".")
    while dot >= 0:
        above = name[:dot]
        if above in names or above.endswith(f".{WEIGHT}") or above == WEIGHT:
            return above
        dot = name.find(".", dot + 1)
    return ""


def _stems(parts: Mapping[str, SourceTensor]) -> set[str]:
    """Return the roles of codes that are not called weight, and with which other roles begin."""
    stems = set()
    for role, tensor in parts.items():
        if role.startswith((WEIGHT, f"_{WEIGHT}")) or tells_of_codes(role) or not holds_codes(tensor):
            continue
        stem = role.removesuffix("_blocks") if role.removesuffix("_blocks") + "_scales" in parts else role
        if any(other.startswith(f"{stem}_") for other in parts if other != role):
            stems.add(stem)
    return stems


class Found(NamedTuple):
    """Quantized tensors, the names of the tensors that they replace, and warnings, a line each."""

    tensors: Sequence[CodedTensor]
    replaced: set[str]
    warnings: Sequence[str] = ()


class Layout(NamedTuple):
    """A layout in which other tools store quantized layers.

    Attributes
    ----------
    format
        Its name, for messages.
    matches
        Whether a layer has this layout, by roles, dtypes and shapes.
    read
        Makes the tensors of all layers that match; raises `SourceError` if one is damaged or contradicts the configuration.
    roles
        The parts of a layer that `read` understands, patterns of the shell among them. A layer with other parts is refused, beside
        those in `qformat.converters.quantized.roles` that all layers may have: they may change what its weights are.
    """

    format: str
    matches: Callable[[Layer], bool]
    read: Callable[[Sequence[Layer], Claims], Found]
    roles: Sequence[str]


def each(tensor_of: Callable[[Layer, Claims], CodedTensor], roles: Sequence[str]) -> Callable[..., Found]:
    """Return a `Layout.read` for layers that are independent, given how to read one, and the parts that it consists of.

    Each layer is read with the claims about it alone.
    """

    def read(layers: Sequence[Layer], claims: Claims) -> Found:
        tensors = [tensor_of(layer, claims.about(layer.name)) for layer in layers]
        return Found(tensors, {name for x in layers for name in x.names(roles)})

    return read
