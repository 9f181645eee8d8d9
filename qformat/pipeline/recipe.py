"""Which codec for which tensor."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from qformat.codecs.base import Codec
from qformat.codecs.blocks import coded
from qformat.codecs.registry import codecs, parse_type
from qformat.errors import SourceError, TypeSpecError
from qformat.pipeline.source import QuantizedSource, SourceTensor, StoredSource


@dataclass(frozen=True)
class Recipe:
    """A default type and overrides by name.

    Parameters
    ----------
    default
        For floating tensors of two or more dimensions; None leaves them as they are. All other tensors are stored as they are:
        raw, or with the codes that they have.
    overrides
        (pattern, codec): for floating tensors of any shape whose name matches the shell pattern; the last match wins.
    """

    default: Codec | None = None
    overrides: Sequence[tuple[str, Codec]] = ()

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
        pairs = overrides.items() if isinstance(overrides, Mapping) else [_split(item) for item in overrides]
        parsed = tuple((pattern, parse_type(text)) for pattern, text in pairs)
        return cls(None if default is None else parse_type(default), parsed)

    def codec_for(self, tensor: SourceTensor) -> Codec:
        """Return the codec for a tensor.

        Raises
        ------
        SourceError
            If the codec that was asked for cannot hold the tensor's dtype.
        """
        same = tensor.codec if isinstance(tensor, (QuantizedSource, StoredSource)) else parse_type(tensor.dtype.name)
        if not tensor.dtype.floating:
            return same
        codec = same if self.default is None or len(tensor.shape) < 2 else self.default
        for pattern, override in self.overrides:
            if fnmatchcase(tensor.name, pattern):
                codec = override
        for kept in (same, coded(same)):  # another search would find nothing better than what is there
            if _same_bytes(codec, kept):
                return kept
        if not codec.accepts(tensor.dtype):
            raise SourceError(
                f"tensor {tensor.name!r}: type {codec} cannot hold {tensor.dtype.name}; choose another type"
            )
        return codec

    def check_patterns(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise `TypeSpecError` if a pattern matches no floating tensor: it would be ignored silently."""
        every = list(tensors)
        for pattern, codec in self.overrides:
            matches = [tensor for tensor in every if fnmatchcase(tensor.name, pattern)]
            if not matches:
                raise TypeSpecError(f"no tensor matches the pattern of {pattern}={codec}")
            if not any(tensor.dtype.floating for tensor in matches):
                kind = matches[0].dtype.name
                raise TypeSpecError(
                    f"{pattern}={codec} matches only tensors that stay as they are, such as one of {kind}"
                )


def _same_bytes(codec: Codec, other: Codec) -> bool:
    """Return whether a codec differs from another one in nothing that a decoder needs to know, and asks for nothing else."""
    # a search for better codes than those that are there is in vain; another choice, a sparsity say, is not
    requests = [f for f in fields(codec) if f.metadata.get("encoder") and f.name != "search"]
    wants = any(getattr(codec, f.name) != f.default for f in requests)
    return codec.decodes_like(other) and not wants


def _split(item: str) -> tuple[str, str]:
    """Cut ``PATTERN=TYPE``, of which both may hold more equals signs: before the last one that a codec's id follows."""
    cuts = [i for i, c in enumerate(item) if c == "="]
    known = [i for i in cuts if item[i + 1 :].partition(":")[0] in codecs()]
    if not cuts or item.startswith("=") or item.endswith("="):
        raise TypeSpecError(f"{item!r} is not of the form PATTERN=TYPE")
    cut = known[-1] if known else cuts[-1]
    return item[:cut], item[cut + 1 :]


def override_for(name: str, type_: str) -> str:
    """Return the option that gives one tensor a type, ready for a shell."""
    return f"--tensor-type {shlex.quote(f'{glob.escape(name)}={type_}')}"
