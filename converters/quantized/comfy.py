"""ComfyUI's statements about single layers: a JSON object in the bytes of a tensor, or in the metadata of the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.converters.quantized import compressed_tensors
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import CodedTensor, whole
from qformat.converters.quantized.integers import UnreadableLayerError
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES

ROLE = "comfy_quant"
INT8_ROLES = ("weight", "weight_scale", ROLE)
_HEADER = "_quantization_metadata"
# Keys that leave the weights as they are: how a layer is computed
_NEUTRAL = ("format", "full_precision_matrix_mult", "format_version")
_LONGEST = 1 << 16  # bytes of a statement

UNKNOWN = "?"  # a statement that is not understood
UNLISTED = object()  # statements about other layers only


def form_of(layer: Layer, claims: Claims) -> str:
    """Return the format that ComfyUI states for a layer; empty without a statement, `UNKNOWN` if it says more than is known."""
    own, header = _in_tensor(layer), _in_header(layer, claims)
    if header is UNLISTED:  # beside layers that are
        header = None if own is not None else UNKNOWN
    found = {_form(content) for content in (own, header) if content is not None}
    return (found.pop() if len(found) == 1 else UNKNOWN) if found else ""


def is_int8(layer: Layer) -> bool:
    """Return whether a layer has signed bytes and ComfyUI's statement about them."""
    return layer.has(*INT8_ROLES) and layer.parts["weight"].dtype is DTYPES["i8"]


def int8_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of signed bytes times a scale; raise `SourceError` if it is another one."""
    if form_of(layer, claims) != "int8_tensorwise":
        raise UnreadableLayerError(
            f"tensor {layer.named('weight')!r} has ComfyUI's int8 codes, of a kind that is not known: kept as it is"
        )
    return compressed_tensors.byte_tensor(layer, claims)


def _form(content: Any) -> str:
    """Return the format in a statement."""
    if not isinstance(content, Mapping) or not isinstance(content.get("format"), str):
        return UNKNOWN
    others = (value for key, value in content.items() if key not in _NEUTRAL)
    return UNKNOWN if any(value not in (None, False) for value in others) else content["format"]


def _in_tensor(layer: Layer) -> Any:
    part = layer.parts.get(ROLE)
    if part is None:
        return None
    if part.dtype is not DTYPES["u8"] or len(part.shape) != 1 or part.shape[0] > _LONGEST:
        return UNKNOWN
    return _parsed(whole(part).tobytes())


def _in_header(layer: Layer, claims: Claims) -> Any:
    if _HEADER not in claims.metadata:
        return None
    content = _parsed(claims.metadata[_HEADER])
    layers = content.get("layers") if isinstance(content, Mapping) else None
    if not isinstance(layers, Mapping):
        return UNKNOWN
    # the names there, or those of the tensors, may have the prefix of one of several models in a file
    alike = [key for key in layers if f".{layer.name}".endswith(f".{key}") or f".{key}".endswith(f".{layer.name}")]
    return layers[max(alike, key=len)] if alike else UNLISTED


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return UNKNOWN


def unswizzled(scales: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Return scales as a matrix that are stored as the tensor cores read them: in tiles of 128 rows and 4 columns, padded.

    In a tile the rows r, r + 32, r + 64 and r + 96 stand beside each other.
    """
    tiles = scales.reshape(-(-rows // 128), -(-cols // 4), 32, 4, 4)
    matrix = tiles.transpose(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return np.ascontiguousarray(matrix[:rows, :cols])


def swizzled_shape(rows: int, cols: int) -> tuple[int, int]:
    """Return the shape of scales that are stored so."""
    return -(-rows // 128) * 128, -(-cols // 4) * 4
