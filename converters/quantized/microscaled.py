"""Four-bit floats with a scale for a few columns: MXFP4, whose scales are powers of two, and NVFP4, which has one more scale.

* compressed-tensors: ``weight_packed [out, in / 2]`` and ``weight_scale [out, in / 32]``, exponents; or
  ``weight_scale [out, in / 16]``, eight-bit floats that are divided by ``weight_global_scale``
* ModelOpt: ``weight [out, in / 2]``, ``weight_scale [out, in / 16]``, eight-bit floats that are multiplied by ``weight_scale_2``
* ComfyUI: the same names, but another order of codes and scales
* DeepSeek: ``weight [out, in / 2]`` of signed bytes, and ``scale [out, in / 32]``, exponents
* gpt-oss: ``X_blocks [experts, out, in / 32, 16]`` and ``X_scales [experts, out, in / 32]``, of which models take the transposed
  matrices, ``X [experts, in, out]``; in OpenAI's own files ``X.blocks`` and ``X.scales``, of matrices as they are
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.codebook import Codebook
from qformat.codecs.layout import Chunk, Matrix
from qformat.converters.quantized import comfy
from qformat.converters.quantized.claims import Claims, contradiction
from qformat.converters.quantized.coded import U8, CodedTensor, disagree, whole
from qformat.converters.quantized.fp8 import E4M3, MX_GROUP
from qformat.converters.quantized.integers import UnreadableLayerError
from qformat.converters.quantized.layer import Layer
from qformat.converters.quantized.tables import E2M1, nibbles, table_tensor
from qformat.dtypes import DTYPES, F32, DType
from qformat.pipeline.source import SourceTensor

PACKED_ROLES = ("weight_packed", "weight_scale", "weight_global_scale")
NVFP4_ROLES = ("weight", "weight_scale", "weight_scale_2", comfy.ROLE)
SIGNED_ROLES = ("weight", "scale", "weight_scale_inv")
BLOCK_ROLES = ("weight_blocks", "weight_scales")
ORIGINAL_ROLES = ("blocks", "scales")

_U8, _I8, _E8M0 = DTYPES["u8"], DTYPES["i8"], DTYPES["f8_e8m0"]
_EXPONENTS = (_U8, _E8M0)
_NV_GROUP = 16
_BLOCK_BYTES = 16


def _has(layer: Layer, role: str, *dtypes: DType) -> bool:
    return role in layer.parts and layer.parts[role].dtype in dtypes


def _has_one(layer: Layer, role: str) -> bool:
    """Return whether a part is a single number."""
    return role in layer.parts and prod(layer.parts[role].shape) == 1


def is_packed(layer: Layer) -> bool:
    """Return whether a layer is compressed-tensors' MXFP4 or NVFP4."""
    if "weight_global_scale" in layer.parts and not _has_one(layer, "weight_global_scale"):
        return False
    scales = (E4M3,) if "weight_global_scale" in layer.parts else _EXPONENTS
    return _has(layer, "weight_packed", _U8) and _has(layer, "weight_scale", *scales)


def is_nvfp4(layer: Layer) -> bool:
    """Return whether a layer is ModelOpt's or ComfyUI's NVFP4."""
    return _has(layer, "weight", _U8) and _has(layer, "weight_scale", E4M3) and _has_one(layer, "weight_scale_2")


def is_signed(layer: Layer) -> bool:
    """Return whether a layer is DeepSeek's, with a scale for 32 codes."""
    scale = next((layer.parts[role] for role in SIGNED_ROLES[1:] if _has(layer, role, _E8M0)), None)
    if scale is None or not _has(layer, "weight", _I8):
        return False
    shape = layer.parts["weight"].shape
    return len(shape) > 1 and scale.shape == (*shape[:-1], 2 * shape[-1] // MX_GROUP)


def is_blocks(layer: Layer) -> bool:
    """Return whether a layer is gpt-oss's."""
    return _has(layer, "weight_blocks", _U8) and _has(layer, "weight_scales", *_EXPONENTS)


def is_original(layer: Layer) -> bool:
    """Return whether a layer is of OpenAI's own file of gpt-oss."""
    return _has(layer, "blocks", _U8) and _has(layer, "scales", _U8) and len(layer.parts["blocks"].shape) > 3


def packed_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of compressed-tensors; raise `SourceError` if its parts do not match."""
    _expect(layer, claims, "weight_packed", "compressed-tensors")
    stored = layer.parts["weight_packed"]
    if "weight_global_scale" not in layer.parts:
        return _tensor(layer, stored, "weight_scale", Codebook(4, MX_GROUP, scale="f8_e8m0"))
    return _nvfp4(layer, stored, "weight_global_scale", "divisor", swizzled=False)


def nvfp4_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of ModelOpt or ComfyUI; raise `SourceError` if its parts do not match."""
    form = comfy.form_of(layer, claims)
    stored = layer.parts["weight"]
    if form not in ("", "nvfp4"):
        raise UnreadableLayerError(
            f"tensor {stored.name!r} has the parts of NVFP4, but ComfyUI's statement says something else"
        )
    return _nvfp4(layer, stored, "weight_scale_2", "scale", swizzled=form == "nvfp4")


def signed_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of DeepSeek; raise `SourceError` if its parts do not match."""
    _expect(layer, claims, "weight", "fp8", "deepseek_v4_fp8", "mxfp4")
    scale = next(role for role in SIGNED_ROLES[1:] if role in layer.parts)
    return _tensor(layer, layer.parts["weight"], scale, Codebook(4, MX_GROUP, scale="f8_e8m0"))


def block_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of gpt-oss; raise `SourceError` if its parts do not match."""
    _expect(layer, claims, "weight_blocks", "mxfp4")
    return _blocks(layer, layer.named("weight"), BLOCK_ROLES, transposed=True)


def original_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of OpenAI's own file of gpt-oss; raise `SourceError` if its parts do not match."""
    _expect(layer, claims, "blocks", "mxfp4")
    return _blocks(layer, layer.name, ORIGINAL_ROLES, transposed=False)


def _blocks(layer: Layer, name: str, roles: tuple[str, str], *, transposed: bool) -> CodedTensor:
    """Return a tensor of blocks of 16 bytes, each with an exponent."""
    blocks = layer.part(roles[0], roles[0], [_U8], dims=4)
    scales = layer.part(roles[1], roles[0], list(_EXPONENTS), dims=3)
    number, rows, groups, size = blocks.shape
    if size != _BLOCK_BYTES or scales.shape != (number, rows, groups):
        raise disagree(blocks, scales)
    cols = groups * MX_GROUP
    shape = (number, cols, rows) if transposed else (number, rows, cols)
    codec = Codebook(4, MX_GROUP, scale="f8_e8m0", transposed=cols if transposed else 0)
    matrix = Matrix.of(shape)
    return table_tensor(
        name,
        shape,
        codec,
        lambda: [E2M1, whole(scales)],
        lambda chunk: nibbles(blocks, matrix, chunk, high_first=False),
    )


def _expect(layer: Layer, claims: Claims, role: str, *methods: str) -> None:
    """Raise `SourceError` if the configuration names another method than those of a layout."""
    if claims.method and claims.method.value not in methods:
        raise contradiction(layer.named(role), "four-bit floats", claims.method)


def _nvfp4(layer: Layer, stored: SourceTensor, factor: str, kind: Any, *, swizzled: bool) -> CodedTensor:
    number = layer.part(factor, "weight", [F32], dims=len(layer.parts[factor].shape))
    codec = Codebook(4, _NV_GROUP, scale="f8_e4m3", factor=kind)
    return _tensor(layer, stored, "weight_scale", codec, number, swizzled=swizzled)


def _tensor(
    layer: Layer,
    stored: SourceTensor,
    role: str,
    codec: Codebook,
    factor: SourceTensor | None = None,
    *,
    swizzled: bool = False,
) -> CodedTensor:
    """Return a tensor of codes along the rows, two in a byte, the first one in the low half unless scales are swizzled."""
    scale = layer.parts[role]
    assert codec.group != "row"
    if len(stored.shape) < 2 or 0 in stored.shape:
        raise disagree(stored, scale)
    shape = (*stored.shape[:-1], 2 * stored.shape[-1])
    groups, rest = divmod(shape[-1], codec.group)
    expected = comfy.swizzled_shape(shape[0], groups) if swizzled else (*shape[:-1], groups)
    if rest or scale.shape != expected or (swizzled and len(shape) > 2):
        raise disagree(scale, stored)
    matrix = Matrix.of(shape)

    def numbers() -> list[NDArray[Any]]:
        scales = whole(scale)
        if swizzled:
            scales = comfy.unswizzled(scales, shape[0], groups)
        return [E2M1, *([] if factor is None else [whole(factor)]), np.ascontiguousarray(scales)]

    def codes(chunk: Chunk) -> U8:
        return nibbles(stored, matrix, chunk, high_first=swizzled)

    return table_tensor(layer.named("weight"), shape, codec, numbers, codes)
