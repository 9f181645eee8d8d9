"""MLX: codes of 2, 3, 4, 5, 6 or 8 bits in words, a string of bits for each row, with a scale and a bias for each group.

A value is code × scale + bias. ``weight [..., out, words]``, ``scales`` and ``biases [..., out, groups]``; only the configuration
says how many bits a code has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformat.codecs.layout import Buffer, Chunk, Matrix
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claim, Claims, contradiction
from qformat.converters.quantized.coded import CodedTensor, Encode
from qformat.converters.quantized.integers import UnreadableLayerError, encode_with
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES

ROLES = ("weight", "scales", "biases")
_U32 = DTYPES["u32"]
_BITS = (2, 3, 4, 5, 6, 8)
_DEFAULTS = {"bits": 4, "group_size": 64, "mode": "affine"}  # where the object of a layer does not say it


def is_mlx(layer: Layer) -> bool:
    """Return whether a layer has words, scales and biases."""
    return layer.has(*ROLES) and layer.parts["weight"].dtype is _U32


def mlx_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer; raise `SourceError` if its parts do not match, or contradict the configuration."""
    dims = 3 if len(layer.parts["weight"].shape) == 3 else 2  # experts are stacked
    weight = layer.part("weight", "weight", [_U32], dims)
    scales, biases = (layer.part(role, "weight", coded.SCALES, dims) for role in ("scales", "biases"))
    if scales.shape[:-1] != weight.shape[:-1]:
        raise coded.disagree(scales, weight)
    if biases.shape != scales.shape:
        raise coded.disagree(biases, scales)
    bits, group = (_setting(layer, key, claims) for key in ("bits", "group_size"))
    mode = _setting(layer, "mode", claims, needed=False)
    if mode and mode.value != "affine":
        raise contradiction(scales.name, "MLX's affine mode", mode)
    if bits.value not in _BITS or not isinstance(group.value, int) or not 0 < group.value <= 1 << 20:
        raise contradiction(weight.name, "MLX's layout", group if bits.value in _BITS else bits)
    cols, remainder = divmod(32 * weight.shape[-1], bits.value)
    if remainder or cols != scales.shape[-1] * group.value or cols % 32:
        raise contradiction(weight.name, f"{weight.shape[-1]} words and {scales.shape[-1]} groups in a row", bits)
    shape = (*weight.shape[:-1], cols)
    matrix = Matrix.of(shape)
    codec = Scaled(bits.value, 1, group.value, scales.dtype.name, biases.dtype.name)  # type: ignore[arg-type]

    def codes(chunk: Chunk) -> Buffer:
        elements = chunk.elements(matrix)
        return coded.as_bytes(
            weight.read(slice(elements.start * bits.value // 32, elements.stop * bits.value // 32)).data
        )

    def load() -> Encode:
        return encode_with(codec, matrix, [coded.whole(scales), coded.whole(biases)], codes)

    return CodedTensor(layer.named("weight"), shape, codec, load)


def _setting(layer: Layer, key: str, claims: Claims, *, needed: bool = True) -> Any:
    """Return what the configuration says for a layer, or for all: an object under the layer's name stands instead of the rest."""
    for own in claims.all(layer.name):
        if isinstance(own.value, Mapping):
            return Claim(own.where, f"{layer.name}.{key}", own.value.get(key, _DEFAULTS[key]))
        if own.value is False:
            raise contradiction(layer.named("weight"), "MLX's layout", own)
    claim = claims.get(key)
    if claim is None and needed:
        raise UnreadableLayerError(
            f"layer {layer.name!r} is packed like MLX's, and only config.json says {key}: give the checkpoint's directory; kept "
            "as it is"
        )
    return claim
