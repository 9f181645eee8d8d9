"""The names of the parts of quantized layers: what they say by themselves, whatever the layout."""

from __future__ import annotations

import re

from qformat.dtypes import DTYPES
from qformat.pipeline.source import SourceTensor

#: the name of most weights, and the beginning of the roles of their parts
WEIGHT = "weight"

_PLAIN = frozenset(DTYPES[name] for name in ("bool", "f16", "bf16", "f32", "f64"))
_LONG = frozenset(DTYPES[name] for name in ("i64", "u64"))

# Of inputs, outputs and cached keys and values, which are quantized when a model runs
_ACTIVATION = re.compile(
    r"(weight\.|weight_)?(input|output|act|activation|in|out|x|a)_?(global_)?(scales?|amax|zero_?points?|zeros?|offsets?|minmax)(_inv)?"
    r"|(input|output|activation)s?_(scaling_factor|quant_scale)|scale_(input|output)|qscale_act"
    r"|([qkv]|kv|kv_cache|prob|softmax|attn|bmm\d*)_(proj_)?(cache_)?(output_)?(scales?|amax|zero_?points?|offsets?|scaling_factor)"
    r"|(input|output)_(min|max|observer)"
    r"|(input|output|[qkv]_bmm)_quantizer\.(?!_?pre_quant).*"
)

# Indices, positions and masks are integers that are no codes
_NO_WEIGHT = re.compile(
    r"(.*[._])?(ids?|index(es)?|idx|masks?|maps?|mapping|positions?|pos|order|ordering|perm|counts?|lengths?|sizes?|shapes?|bins?"
    r"|buckets?|table|tril|triu|causal|segments?|types?|labels?|vocab|steps?|tracked|epochs?|seen|seeds?|states?|biases|bias|coords?"
    r"|grid|anchors?|edges?|neighbors|faces|d2t|t2d|freqs?|num\w*|offsets?)(_\d+)?"
)

# Companions of codes. Some words stand in other places too: the scale of a norm or of logits.
_COMPANION = re.compile(
    r"scal(e|ing)|absmax|amax|zero|(?<![a-z])zp(?![a-z])|codebook|centroid|quant|(?<![a-z])scb(?![a-z])|(?<![a-z])lut(?![a-z])|smooth"
    r"|hadamard|(?<![a-z])s[uv]h?(?![a-z])"
)
_NO_COMPANION = re.compile(
    r"(.*[._])?(logit|layer|attn|attention|temperature|residual|embed|embedding|learned|skip)_?scales?\d*|.*scale_shift.*"
)
_CODES = re.compile(
    r"w_q|q_?weight|weight_packed|_weight_qdata|weight\._data|qidxs|dense_weights|quantized_weight|weight_quantized"
)
_WEIGHT = re.compile(r".*weight.*|(q|int|packed)?_?(w|kernel|codes?|qidxs|indices|trellis|b)\d?(_q|_packed|_24|_meta)?")


# Names, below a layer, of what its weights have been multiplied by or turned with
_CHANGES_WEIGHTS = re.compile(r"(.*[._])?(pre_?quant|smooth|hadamard|rotat|transform)\w*(\..*)?")


def changes_weights(path: str) -> bool:
    """Return whether a tensor below a layer, given its name there, changes what the weights of the layer mean."""
    return bool(_CHANGES_WEIGHTS.fullmatch(path.lower()))


def holds_codes(tensor: SourceTensor) -> bool:
    """Return whether a tensor may hold the codes of a quantized weight, by its dtype and shape."""
    return tensor.dtype not in _PLAIN and tensor.dtype not in _LONG and len(tensor.shape) >= 2 and 0 not in tensor.shape


def may_be_codes(role: str, tensor: SourceTensor) -> bool:
    """Return whether a part of a layer may hold the codes of a quantized weight, by its name too."""
    lower = role.lower()
    if 0 in tensor.shape or not tensor.shape or _NO_WEIGHT.fullmatch(lower):
        return False
    if _CODES.fullmatch(lower):
        return True
    if re.search("scal(e|ing)|zero|absmax|amax|codebook|smooth|quant_", lower):
        return False
    integers = tensor.dtype not in _PLAIN and not tensor.dtype.floating
    return holds_codes(tensor) or (integers and WEIGHT in lower)


def is_weight(role: str) -> bool:
    """Return whether a role is the one of the weights of a layer rather than of one of its parameters."""
    return bool(_WEIGHT.fullmatch(role.lower()))


def is_plain(role: str, tensor: SourceTensor) -> bool:
    """Return whether a part of a layer is of no importance to its weights: a bias, or one for numbers of inputs and outputs."""
    if role == "bias":
        return len(tensor.shape) <= 2  # of stacked matrices
    return len(tensor.shape) <= 1 and role.endswith("_bias") and "quant" not in role


def is_activation_only(role: str) -> bool:
    """Return whether a part concerns only the numbers that a model computes, so that its weights are the same without it.

    `role` is the last component of a name, or a role of a layer.
    """
    return bool(_ACTIVATION.fullmatch(role))


def tells_of_codes(role: str) -> bool:
    """Return whether a name is one of the companions of codes: scales, zero points, tables, in any spelling."""
    lower = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", role).lower()
    return bool(_COMPANION.search(lower)) and not _NO_COMPANION.fullmatch(lower)
