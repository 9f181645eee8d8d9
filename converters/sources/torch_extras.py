"""Values beside a state dict as JSON, as far as it can hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from qformat.converters.sources.pickles import Name, StandIn
from qformat.converters.sources.state_dict import holds_tensors
from qformat.converters.sources.torch_pickle import PickledArray

# Longer values are left out: a small pickle may describe endless text
_MOST_BYTES = 1 << 20
_MOST_VALUES = 1 << 18


class _LeftOutError(Exception):
    """JSON cannot hold a value, or it is too long."""


def as_json(extras: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """Return the values as the text of a JSON object, nothing if there are none, and a text for each that is left out.

    Where a dict holds an object of a class, or a number that JSON lacks, only that entry is left out.
    """
    known: dict[str, Any] = {}
    left_out: list[str] = []
    budget = _MOST_BYTES
    for key, value in extras.items():
        pruner = _Pruner()
        try:
            if holds_tensors(value):
                raise _LeftOutError
            pruned = pruner.prune(value, key)
            text = json.dumps(pruned, allow_nan=False)
            if len(text) > budget:
                raise _LeftOutError
        except (_LeftOutError, TypeError, ValueError, RecursionError):
            left_out.append(_described(key, value))
            continue
        known[key] = pruned
        budget -= len(text)
        left_out += pruner.left_out
    if not known:
        return b"", left_out
    return json.dumps(known, sort_keys=True, indent=1).encode() + b"\n", left_out


class _Pruner:
    """Copies values without the entries of dicts that JSON cannot hold."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._values = 0
        self._bytes = 0

    def prune(self, value: object, path: str) -> Any:
        """Return a value as JSON can hold it; raise `_LeftOutError` if it cannot."""
        if isinstance(value, PickledArray) and value.value is not None and value.value.dtype.kind in "biuf":
            value = value.value.tolist() if value.value.size < _MOST_VALUES else None
        self._values += 1
        self._bytes += len(value) if isinstance(value, str) else 0
        if self._values > _MOST_VALUES or self._bytes > _MOST_BYTES:
            raise ValueError("too long")
        if isinstance(value, dict):
            entries = {}
            for key, item in value.items():
                inner = f"{path}.{key if isinstance(key, str) else repr(key)}"
                try:
                    entries[_key(key)] = self.prune(item, inner)
                except _LeftOutError:
                    self.left_out.append(_described(inner, item))
            return entries
        if isinstance(value, list | tuple):
            return [self.prune(item, path) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise _LeftOutError
        if value is None or isinstance(value, str | int | float):
            return value
        raise _LeftOutError


def _key(key: object) -> str:
    """Return a key as JSON has it."""
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    raise _LeftOutError


def _described(path: str, value: object) -> str:
    class_ = value.title if isinstance(value, StandIn) else value.name if isinstance(value, Name) else ""
    return f"{path[:200]!r} ({class_[:200]})" if class_ else repr(path[:200])
