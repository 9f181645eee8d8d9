"""Tensors that only quantized programs use: scales of activations, which a model of plain weights does without."""

from __future__ import annotations

from qformat.converters.quantized.roles import is_activation_only


def is_activation_scale(name: str) -> bool:
    """Return whether a tensor of this name only scales activations."""
    *_, module, role = ("", "", *name.split("."))
    return is_activation_only(role) or is_activation_only(f"{module}.{role}")
