"""Values for tensors by name: ``PATTERN=VALUE`` options with shell patterns, of which the last match wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from qformat.errors import TypeSpecError
from qformat.pipeline.source import SourceTensor

T = TypeVar("T")


def split_items(
    items: Iterable[str] | Mapping[str, T], form: str, is_value: Callable[[str], bool] = lambda _: False
) -> list[tuple[str, str | T]]:
    """Return the (pattern, value) pairs of ``PATTERN=VALUE`` strings, or of a mapping.

    Parameters
    ----------
    items
        The strings; pattern and value may contain equals signs.
    form
        The form of an item, for the error message.
    is_value
        Whether a text begins like a value: an item is cut before the last such text, else at its last equals sign.

    Raises
    ------
    TypeSpecError
        If an item has no equals sign, pattern or value.
    """
    return list(items.items()) if isinstance(items, Mapping) else [_split(item, form, is_value) for item in items]


def _split(item: str, form: str, is_value: Callable[[str], bool]) -> tuple[str, str]:
    cuts = [i for i, c in enumerate(item) if c == "="]
    cut = ([i for i in cuts if is_value(item[i + 1 :])] or cuts or [0])[-1]
    pattern, value = item[:cut], item[cut + 1 :]
    if not pattern or not value:
        raise TypeSpecError(f"{item!r} is not of the form {form}")
    return pattern, value


def last_match(name: str, pairs: Sequence[tuple[str, T]], default: T) -> T:
    """Return the value of the last pattern that matches a name, or the default."""
    return next((value for pattern, value in reversed(pairs) if fnmatchcase(name, pattern)), default)


def check_patterns(
    pairs: Iterable[tuple[str, object]],
    tensors: Iterable[SourceTensor],
    applies: Callable[[SourceTensor], bool],
    excluded: Callable[[SourceTensor], str],
) -> None:
    """Raise `TypeSpecError` if a pattern matches no tensor that its value applies to: it would be ignored silently.

    Parameters
    ----------
    pairs
        (pattern, value).
    tensors
        All tensors of the checkpoint.
    applies
        Whether a value may apply to a tensor.
    excluded
        Describes the tensors that a pattern matches in vain, given the first of them, for the error message.
    """
    every = list(tensors)
    for pattern, value in pairs:
        matches = [tensor for tensor in every if fnmatchcase(tensor.name, pattern)]
        if not matches:
            raise TypeSpecError(
                f"no tensor matches the pattern of {pattern}={value}; convert --dry-run --verbose lists the names"
            )
        if not any(map(applies, matches)):
            raise TypeSpecError(f"{pattern}={value} matches only {excluded(matches[0])}")
