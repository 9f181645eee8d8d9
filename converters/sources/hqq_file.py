"""HQQ's own files: a mapping for each layer, with the codes and a mapping of settings, in place of a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qformat.converters.sources.pickles import Name
from qformat.converters.sources.torch_pickle import PickledArray

_CODES, _SETTINGS = "W_q", "meta"


def hqq_names(root: object) -> object:
    """Return the state dict that HQQ writes to safetensors files, given the object in one of its own; any other object as it is."""
    if not isinstance(root, dict) or not any(_is_layer(child) for child in root.values()):
        return root
    flat: dict[object, Any] = {}
    for name, child in root.items():
        if not isinstance(child, dict) or not isinstance(name, str):
            flat[name] = child
            continue
        parts = dict(_parts(child)) if _is_layer(child) else child
        flat |= {f"{name}.{role}" if isinstance(role, str) else role: part for role, part in parts.items()}
    return flat


def _is_layer(node: object) -> bool:
    return isinstance(node, dict) and _CODES in node


def _parts(layer: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the tensors of a layer, and its settings as the tensors that stand for them in safetensors files."""
    settings = layer.get(_SETTINGS)
    for role, value in (*layer.items(), *(settings.items() if isinstance(settings, dict) else ())):
        if role == _SETTINGS and isinstance(value, dict):
            continue
        encoded = _encoded(value)
        if value is not None:
            yield role, value if encoded is None else PickledArray(encoded)


def _encoded(value: object) -> np.ndarray[Any, Any] | None:
    """Return a setting as an array; None if it is something else."""
    if isinstance(value, bool):
        return np.array(value, np.uint8)
    if isinstance(value, int) and abs(value) < 1 << 31:
        return np.array(value, np.int32)
    if isinstance(value, float):
        return np.array(value, np.float32)
    if isinstance(value, Name):  # a dtype
        value = value.name
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    numbers = isinstance(value, (tuple, list)) and all(
        type(number) is int and abs(number) < 1 << 62 for number in value
    )
    return np.array(value, np.int64) if numbers else None
