"""Layers that look like those of a known layout, but are packed in another way, or are incomplete."""

from __future__ import annotations

import re

from qformat.converters.quantized import awq, comfy, gptq
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import I32
from qformat.converters.quantized.layer import Layer
from qformat.converters.quantized.unknown import format_of
from qformat.dtypes import DTYPES
from qformat.errors import SourceError

_STACKED = 3  # dimensions
_BYTE = 8
_I8 = DTYPES["i8"]
# Where files say how wide the codes of a layer are: in text, and as a number
_WIDTH_IN_TEXT = ("quant_algo", "model_quant_type", "quant_type", "quant_method", "method", "quantization_type")
_WIDTHS = ("bits", "w_bit", "wbits", "w_bits", "weight_bits", "nbits", "num_bits", "quant_bits")
# Tools whose ``weight`` and ``weight_scale`` are a code of eight bits for each weight, and a factor; beside those that say so
_METHODS_OF_BYTES = (
    *("", "compressed-tensors", "compressed_tensors", "llmcompressor", "smoothquant", "modelopt", "quark", "torchao"),
    *("ascend", "modelslim", "auto-round", "autoround", "auto_round", "chatglm", "bitsandbytes"),
)
_SAYS_BYTES = re.compile(r"(?:int|w)_?8")


def unreadable(layer: Layer, claims: Claims) -> str | None:
    """Return the format of a layer that no layout reads, though it has the parts of one, empty if unknown; None for other layers.

    Raises `SourceError` if it is incomplete.
    """
    parts = layer.parts
    if "qzeros" in parts and "qweight" not in parts:
        raise SourceError(
            f"tensor {layer.named('qweight')!r} is missing, to which {layer.named('qzeros')!r} belongs; give the whole checkpoint"
        )
    if layer.has("weight_packed", "scale_packed"):
        return "marlin-24"
    if (
        "weight_packed" in parts
        and parts["weight_packed"].dtype is I32
        and len(parts["weight_packed"].shape) == _STACKED
    ):
        return "pack-quantized of stacked experts"
    if "weight" in parts and parts["weight"].dtype is _I8:
        return _narrow(layer, claims)
    if "qweight" not in parts:
        return None
    qweight, scales = parts["qweight"], parts.get("scales")
    if len(qweight.shape) == _STACKED:
        return f"{_told(claims) or claims.text('quant_method') or 'GPTQ or AWQ'} of stacked experts"
    if qweight.dtype is not I32 and "qzeros" not in parts:
        return _told(claims) or format_of(layer, claims)
    if any(claim.value is True for claim in claims.all("is_marlin_format")):
        return "Marlin"
    label = _told(claims) or _other_method(claims)
    if label:
        return label
    widths = [tensor.shape[1] if tensor and len(tensor.shape) == 2 else 0 for tensor in (qweight, scales)]
    if 0 in widths or widths[1] in (widths[0], 8 * widths[0]):
        return None
    return "packed for a certain kernel, such as Marlin"


def _narrow(layer: Layer, claims: Claims) -> str | None:
    """Return the format of signed bytes that are not the codes of a weight each, if a file says so."""
    if layer.has("deq_scale"):
        return format_of(layer, claims)
    form = comfy.form_of(layer, claims)
    if form not in ("", "int8_tensorwise"):
        return f"{form} of ComfyUI" if form != comfy.UNKNOWN else "ComfyUI with more than a scale"
    for claim in claims.all(*_WIDTH_IN_TEXT, f"{layer.name}.weight"):
        bits = re.search(r"(?:INT|W|UINT)_?(\d+)", str(claim.value).upper())
        if bits and int(bits[1]) != _BYTE:
            return str(claim.value)
    for claim in claims.all(
        *_WIDTHS
    ):  # compressed-tensors states widths by groups of layers, and has a byte for each code
        if type(claim.value) is int and claim.value != _BYTE:
            return f"{claim.value} bits, packed into bytes"
    method = claims.text("quant_method", "method")
    if layer.has("weight_scale") and method not in _METHODS_OF_BYTES and not _SAYS_BYTES.search(method):
        return method
    return "int8 or ChatGLM's int4 (only config.json tells them apart)" if _may_be_halves(layer, claims) else None


def _may_be_halves(layer: Layer, claims: Claims) -> bool:
    """Return whether bytes may hold two codes each, as ChatGLM's do: only its configuration says so."""
    scale = layer.parts.get("weight_scale")
    return scale is not None and scale.dtype is DTYPES["f16"] and len(scale.shape) == 1 and not claims.statements


def _other_method(claims: Claims) -> str:
    """Return the tool or scheme, if it is none of those whose layers have the layout of GPTQ or AWQ."""
    method = claims.text("quant_method", "method")
    return "" if method in (*gptq.METHODS, *awq.METHODS) else method


def _told(claims: Claims) -> str:
    """Return the label of a packing that is neither GPTQ's nor AWQ's."""
    labels = (str(claim.value) for claim in claims.labels())
    return next((label for label in labels if label.lower() not in (*gptq.VERSIONS, *awq.FORMATS)), "")
