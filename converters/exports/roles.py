"""Tensors that only quantized programs use: scales of activations, which a model of plain weights does without."""

from __future__ import annotations

import re

# Scales that static quantization of activations and of the cache was calibrated to; none of them scales a weight
_ACTIVATIONS = re.compile(
    r"(?:.*\.)?(?:(?:input|output|activation|act)_(?:scale|zero_point|global_scale|amax)|(?:[qkv]|kv|prob)_scale"
    r"|[kv]_zero_point|k_proj\.k_scale|v_proj\.v_scale)"
)


def is_activation_scale(name: str) -> bool:
    """Return whether a tensor of this name only scales activations."""
    return bool(_ACTIVATIONS.fullmatch(name))
