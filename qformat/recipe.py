"""Which codec for which tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qformat.codecs.base import Codec
from qformat.codecs.registry import parse_type
from qformat.errors import SourceError, TypeSpecError
from qformat.source import SourceTensor


@dataclass(frozen=True)
class Recipe:
    """A default type and overrides by name.

    Parameters
    ----------
    default
        For floating tensors of two or more dimensions; None leaves them as they are. All other tensors are stored raw.
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
        raw = parse_type(tensor.dtype.name)
        if not tensor.dtype.floating:
            return raw
        codec = raw if self.default is None or len(tensor.shape) < 2 else self.default
        for pattern, override in self.overrides:
            if fnmatchcase(tensor.name, pattern):
                codec = override
        if not codec.accepts(tensor.dtype):
            raise SourceError(
                f"tensor {tensor.name!r}: type {codec} cannot hold {tensor.dtype.name}; choose another type"
            )
        return codec

    def check_patterns(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise `TypeSpecError` if a pattern matches no floating tensor: it would be ignored silently."""
        names = [tensor.name for tensor in tensors if tensor.dtype.floating]
        for pattern, codec in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise TypeSpecError(f"no floating tensor matches the pattern of {pattern}={codec}")


def _split(item: str) -> tuple[str, str]:
    pattern, equals, text = item.partition("=")
    if not pattern or not equals or not text:
        raise TypeSpecError(f"{item!r} is not of the form PATTERN=TYPE")
    return pattern, text
