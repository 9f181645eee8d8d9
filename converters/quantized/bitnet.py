"""BitNet's ternary layers: a byte holds four codes, one of each quarter of the rows; a code is the value plus one."""

from __future__ import annotations

import numpy as np

from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode, Grouping
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES, F32, Elements
from qformat.errors import SourceError

METHOD = "bitnet"
ROLES = ("weight", "weight_scale")
_U8 = DTYPES["u8"]


def is_bitnet(layer: Layer) -> bool:
    """Return whether a layer has weights in bytes and a scale."""
    if not layer.has("weight", "weight_scale") or layer.has("qweight"):
        return False
    weight, scale = layer.parts["weight"], layer.parts["weight_scale"]
    return weight.dtype is _U8 and scale.dtype in coded.SCALES and scale.shape in ((), (1,))


def bitnet_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer.

    Raises `SourceError` if it is not BitNet's, or the configuration does not say whether its scale multiplies.
    """
    if claims.method and claims.method.value != METHOD:
        raise SourceError(
            f"tensor {layer.named('weight')!r} has bytes and a scale, a layout that only BitNet is known for, but {claims.method}"
        )
    stored = layer.part("weight", "weight", [_U8])
    scale = layer.part("weight_scale", "weight", coded.SCALES, dims=len(layer.parts["weight_scale"].shape))
    divides = _scale_divides(stored.name, claims)
    quarter, cols = stored.shape
    rows = 4 * quarter
    codec = coded.affine_codec(stored.name, 2, Grouping("row"), sym=False, scale=F32)

    def packed(start: int, stop: int) -> U8:
        codes = np.empty((stop - start, cols), np.uint8)
        for block in range(start // quarter, -(-stop // quarter)):
            first, last = (min(max(row - block * quarter, 0), quarter) for row in (start, stop))
            data = stored.read(slice(first * cols, last * cols)).data.reshape(-1, cols)
            at = block * quarter + first - start
            codes[at : at + last - first] = (data >> np.uint8(2 * block)) & np.uint8(3)
        return coded.pack(codes, 2)

    def load() -> Encode:
        value = Elements(scale.dtype, coded.whole(scale).reshape(1)).to_f32()
        with np.errstate(all="ignore"):  # infinity is refused later, with the name of the tensor
            factor = np.float32(1) / value if divides else value
        return coded.affine_encode(codec, (rows, cols), np.full(rows, factor[0]), np.ones(rows, np.uint8), None, packed)

    return CodedTensor(layer.named("weight"), (rows, cols), codec, load)


def _scale_divides(name: str, claims: Claims) -> bool:
    """Return whether values are divided by the scale, which only the configuration can tell."""
    if claims.method is None:
        raise SourceError(
            f"tensor {name!r} is packed like BitNet's, and only config.json says whether its scale multiplies or divides: give the "
            "checkpoint's directory"
        )
    linear = claims.text("linear_class") or "bitlinear"
    if linear not in ("bitlinear", "autobitlinear") or claims.text("quantization_mode") == "online":
        wrong = claims.get("linear_class" if linear not in ("bitlinear", "autobitlinear") else "quantization_mode")
        raise SourceError(f"tensor {name!r} is packed like BitNet's, but {wrong}, which has no packed weights")
    return linear == "bitlinear"
