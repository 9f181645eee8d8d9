"""Choose an encoder for each tensor."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from qformat.codecs.base import ChunkEncoder, Codec, Encoder
from qformat.codecs.registry import encoders, parse_type
from qformat.errors import SourceError
from qformat.pipeline.patterns import check_patterns, last_match, split_items
from qformat.pipeline.source import SourceTensor


@dataclass(frozen=True)
class Recipe:
    """A default type and overrides by name.

    Parameters
    ----------
    default
        For floating tensors of two or more dimensions, unless the source says that they are kept; None leaves them as they are.
        All other tensors are stored as they are: raw, or with the codes that they have.
    overrides
        (pattern, codec): for floating tensors of any shape whose name matches the shell pattern; the last match wins.
    sparing
        Whether tensors stay as they are that the default would make larger, or whose numbers are not weights
        (`qformat.pipeline.numbers`).
    """

    default: Encoder | None = None
    overrides: Sequence[tuple[str, Encoder]] = ()
    sparing: bool = False

    @classmethod
    def parse(cls, default: str | None, overrides: Iterable[str] | Mapping[str, str] = ()) -> Recipe:
        """Make a recipe of type strings.

        Parameters
        ----------
        default
            A type string, or None.
        overrides
            ``PATTERN=TYPE`` strings, or a mapping from patterns to types.

        Raises
        ------
        TypeSpecError
            If one is malformed.
        """
        pairs = split_items(overrides, "PATTERN=TYPE", lambda text: text.partition(":")[0] in encoders())
        parsed = tuple((pattern, parse_type(text)) for pattern, text in pairs)
        return cls(None if default is None else parse_type(default), parsed)

    def encoder_for(self, tensor: SourceTensor) -> Encoder:
        """Return the encoder for a tensor.

        Raises
        ------
        SourceError
            If the type that is given cannot hold the tensor's dtype, or the tensor stays as it is whatever type is given.
        """
        copies = tensor.copies()
        keep = copies[0][1]
        if tensor.fixed_because:
            given = last_match(tensor.name, self.overrides, self.default)
            if given is not None:
                raise SourceError(
                    f"tensor {tensor.name!r} {tensor.fixed_because}: it can only stay as it is; leave out {given}, or give it to "
                    "other tensors by name"
                )
            return keep
        if not tensor.dtype.floating:
            return keep
        kept = tensor.kept or not tensor.dtype.mantissa  # powers of two are scales
        default = keep if self.default is None or len(tensor.shape) < 2 or kept else self.default
        encoder = last_match(tensor.name, self.overrides, default)
        for codec, copy in copies:
            if _is_fulfilled(encoder, codec):
                return copy
        if not encoder.accepts(tensor.dtype):
            raise SourceError(
                f"tensor {tensor.name!r}: type {encoder} cannot hold {tensor.dtype.name}; choose another type"
            )
        return encoder

    def spares(self, tensor: SourceTensor) -> bool:
        """Return whether a tensor gets the default type only if its numbers are weights, and it does not become larger."""
        changed = self.sparing and self.default is not None and not tensor.kept and not tensor.fixed_because
        return (
            changed
            and tensor.dtype.floating
            and len(tensor.shape) >= 2
            and last_match(tensor.name, self.overrides, None) is None
        )

    def check_patterns(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise `TypeSpecError` if a pattern matches no floating tensor: it would be ignored silently."""
        check_patterns(self.overrides, tensors, _may_be_encoded, _never_encoded)


def _may_be_encoded(tensor: SourceTensor) -> bool:
    return tensor.dtype.floating or bool(tensor.fixed_because)  # what is kept is refused with its reason


def _never_encoded(tensor: SourceTensor) -> str:
    return f"tensors that stay as they are, such as one of {tensor.dtype.name}"


def _is_fulfilled(encoder: Encoder, codec: Codec) -> bool:
    """Return whether the codes of a codec fulfil a request."""
    if not isinstance(encoder, ChunkEncoder) or not encoder.decodes_like(codec):
        return False
    # a search for better codes than those that are there is in vain; another option, a sparsity say, is not
    return all(
        f.default == getattr(encoder, f.name)
        for f in fields(encoder)
        if f.metadata.get("option") and f.name != "search"
    )


def override_for(name: str, type_: str) -> str:
    """Return the option that gives one tensor a type, ready for a shell."""
    return f"--tensor-type {shlex.quote(f'{glob.escape(name)}={type_}')}"
