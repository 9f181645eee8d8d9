"""Refuse quantized layers that cannot be read: taken as plain tensors, their values would be nonsense."""

from __future__ import annotations

from qformat.converters.quantized import awq, gptq
from qformat.converters.quantized.claims import LABELS, Claims
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES
from qformat.errors import SourceError

# The formats by parts of a layer that only they have together
_REFUSED = {
    ("weight_packed", "weight_global_scale"): "nvfp4-pack-quantized",
    ("weight", "weight_scale", "weight_scale_2"): "NVFP4",
    ("weight_packed", "scale_packed"): "marlin-24",
    ("compressed", "bitmask"): "sparse-bitmask",
    ("q_weight", "q_scale_max"): "EXL2",
    ("trellis", "suh"): "EXL3",
}


def check_readable(layer: Layer, claims: Claims) -> None:
    """Raise `SourceError` if a layer is incomplete, or in a format that cannot be read."""
    parts = layer.parts
    if "qzeros" in parts and "qweight" not in parts:
        raise SourceError(
            f"tensor {layer.named('qweight')!r} is missing, to which {layer.named('qzeros')!r} belongs; give the whole checkpoint"
        )
    for roles, format_ in _REFUSED.items():
        if layer.has(*roles):
            raise _unreadable(layer.named(roles[0]), format_)
    if layer.has("B", "s") and parts["B"].dtype is DTYPES["i32"]:
        raise _unreadable(layer.named("B"), "Marlin")
    if "weight_packed" in parts and parts["weight_packed"].dtype is DTYPES["u8"]:
        raise _unreadable(layer.named("weight_packed"), "mxfp4-pack-quantized")
    if "qweight" in parts:
        _check_words(layer, claims)


def _check_words(layer: Layer, claims: Claims) -> None:
    """Check a layer that may be GPTQ's or AWQ's."""
    qweight, scales = layer.parts["qweight"], layer.parts.get("scales")
    for claim in claims.all(*LABELS):
        if str(claim.value).lower() not in (*gptq.VERSIONS, *awq.FORMATS):
            raise SourceError(
                f"tensor {qweight.name!r} cannot be read: {claim}, and only GPTQ (gptq, gptq_v2) and AWQ (gemm) can be"
            )
    if any(claim.value is True for claim in claims.all("is_marlin_format")):
        raise _unreadable(qweight.name, "Marlin")
    widths = [tensor.shape[1] if tensor and len(tensor.shape) == 2 else 0 for tensor in (qweight, scales)]
    if 0 not in widths and widths[1] not in (widths[0], 8 * widths[0]):
        raise SourceError(
            f"tensor {qweight.name!r} of shape {list(qweight.shape)} with scales {widths[1]} wide has neither GPTQ's nor AWQ's "
            "layout: it may be packed for a certain kernel, such as Marlin; use the checkpoint that it was made from"
        )


def _unreadable(name: str, format_: str) -> SourceError:
    return SourceError(
        f"tensor {name!r} is in the format {format_}, which cannot be read; use the model as it was before quantization"
    )
