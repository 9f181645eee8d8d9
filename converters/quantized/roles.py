"""The names of the parts of quantized layers: what they say by themselves, whatever the layout."""

from __future__ import annotations

import re

from qformat.dtypes import DTYPES
from qformat.pipeline.source import SourceTensor

#: the name of most weights, and the beginning of the roles of their parts
WEIGHT = "weight"

_CODES = frozenset(DTYPES[name] for name in ("i8", "u8", "i16", "u16", "i32", "u32", "f8_e4m3", "f8_e5m2"))

# Of inputs, outputs and cached keys and values, which are quantized when a model runs
_ACTIVATION = re.compile(
    r"(input|output|act|activation|in|out|x|a)_?(global_)?(scales?|amax|zero_?points?|zeros?|offsets?|minmax)(_inv)?"
    r"|([qkv]|kv|kv_cache|prob|softmax|attn|bmm\d*)_(proj_)?(output_)?(scales?|amax|zero_?points?|offsets?)"
    r"|(input|output)_(min|max|observer|smooth)"
    r"|scaled?_(input|output)|(input|output|[qkv]_bmm)_quantizer\..*"
)


def holds_codes(tensor: SourceTensor) -> bool:
    """Return whether a tensor may hold the codes of a quantized weight."""
    return tensor.dtype in _CODES and len(tensor.shape) >= 2 and 0 not in tensor.shape


def is_activation_only(role: str) -> bool:
    """Return whether a part concerns only the numbers that a model computes, so that its weights are the same without it.

    `role` is the last component of a name, or a role of a layer.
    """
    return bool(_ACTIVATION.fullmatch(role))
