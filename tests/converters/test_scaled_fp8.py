"""Eight-bit floats with scales, in every spelling: values are codes times scales, in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from qformat.converters.arrays import ArrayTensor
from qformat.converters.quantized.recognize import recognize
from qformat.converters.sources.options import SourceOptions
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import QuantizedSource

LAYER = "blocks.0.to_q"


def codes(*shape: int, kind: str = "e4m3") -> Elements:
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 0x7F if kind == "e4m3" else 0x7C, shape) | rng.integers(0, 2, shape) << 7
    return Elements(DTYPES[f"f8_{kind}"], patterns.astype(np.uint8))


def floats(*shape: int) -> np.ndarray:
    return (np.random.default_rng(2).random(shape) + 0.5).astype(np.float32)


def powers(*shape: int, dtype: str = "f8_e8m0") -> Elements:
    return Elements(DTYPES[dtype], np.random.default_rng(3).integers(100, 140, shape).astype(np.uint8))


def told(**content: Any) -> np.ndarray:
    """Return ComfyUI's statement about a layer, as a tensor."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def found_in(parts: Mapping[str, Any], config: Any = None, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(np.asarray(part)))
        for name, part in parts.items()
    ]
    configs = {"config.json": {"quantization_config": config}} if config else {}
    return {tensor.name: tensor for tensor in recognize(tensors, configs, SourceOptions(), metadata or {}).tensors}


def layer(**parts: Any) -> dict[str, Any]:
    return {f"{LAYER}.{role}": part for role, part in parts.items()}


def values(tensor: Any) -> np.ndarray:
    assert isinstance(tensor, QuantizedSource)
    count = int(np.prod(tensor.shape))
    return tensor.read(slice(0, count)).data.reshape(tensor.shape)


def same(tensor: Any, expected: np.ndarray) -> None:
    assert values(tensor).tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    "role", ["weight_scale", "weight_scale_inv", "scale", "scale_weight", "qscale_weight", "weights_scaling_factor"]
)
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("shape", "repeats"),
    [
        ((), 1),
        ((1,), 1),
        ((64, 1), (1, 256)),
        ((64,), (1, 256)),
        ((64, 4, 1), (1, 64)),
        ((64, 4), (1, 64)),
        ((1, 2), (64, 128)),
    ],
)
def test_scales_of_every_name_and_shape_multiply(role, kind, shape, repeats):
    weight, scale = codes(64, 256, kind=kind), floats(*shape)
    found = found_in(layer(weight=weight, **{role: scale}))
    flat = scale.reshape(64, -1) if len(shape) and shape[0] == 64 else scale.reshape(1, -1)
    each = np.repeat(np.repeat(flat, 64 // len(flat), axis=0), 256 // flat.shape[1], axis=1)
    assert list(found) == [f"{LAYER}.weight"]
    same(found[f"{LAYER}.weight"], weight.to_f32() * each)


@pytest.mark.parametrize("dtype", ["f8_e8m0", "u8"])
def test_scales_that_are_exponents_are_powers_of_two(dtype):
    weight = codes(64, 96)
    scale = powers(64, 3, dtype=dtype)
    scale.data[0] = (0, 254, 127)
    weight.data[0, 32:64] = 0x38  # 1, as the largest power leaves no room
    each = np.repeat(np.ldexp(np.float32(1), scale.data.astype(int) - 127), 32, axis=1)
    same(found_in(layer(weight=weight, weight_scale=scale))[f"{LAYER}.weight"], weight.to_f32() * each)
    blocks = powers(2, 2, dtype=dtype)
    weight = codes(256, 200)
    each = np.ldexp(np.float32(1), blocks.data.astype(int) - 127).repeat(128, axis=0).repeat(128, axis=1)[:, :200]
    same(found_in(layer(weight=weight, scale=blocks))[f"{LAYER}.weight"], weight.to_f32() * each)


STACKED = [
    ((2,), (1, 256, 192)),
    ((2, 1), (1, 256, 192)),
    ((2, 1, 1), (1, 256, 192)),
    ((2, 256), (1, 1, 192)),
    ((2, 256, 1), (1, 1, 192)),
    ((2, 2, 2), (1, 128, 128)),
    ((2, 2, 1), (1, 128, 192)),
    ((2, 1, 2), (1, 256, 128)),
]


@pytest.mark.parametrize(("shape", "block"), STACKED)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_stacked_experts_have_scales_of_their_own(shape, block, suffix):
    weight, scale = codes(2, 256, 192), floats(*shape)
    found = found_in({"mlp.experts.gate_up_proj": weight, f"mlp.experts.gate_up_proj{suffix}": scale})
    full = scale.reshape(*shape, *[1] * (3 - len(shape)))
    for axis, length in enumerate(block):
        full = np.repeat(full, length, axis=axis)
    assert list(found) == ["mlp.experts.gate_up_proj"]
    same(found["mlp.experts.gate_up_proj"], weight.to_f32() * full[:, :256, :192])


def test_blocks_of_stacked_experts_follow_the_configuration():
    weight, scale = codes(2, 64, 96), floats(2, 2, 3)
    parts = {"experts.down_proj": weight, "experts.down_proj_scale_inv": scale}
    found = found_in(parts, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    same(found["experts.down_proj"], weight.to_f32() * scale.repeat(32, 1).repeat(32, 2))
    with pytest.raises(SourceError, match="in blocks of 64x64, the weight_block_size"):
        found_in(parts, {"quant_method": "fp8", "weight_block_size": [64, 64]})


@pytest.mark.parametrize("shape", [(2, 1, 192), (3, 2, 2), (2, 2, 2, 1)])
def test_stacked_experts_whose_scales_have_another_place_are_kept(shape):
    parts = {"experts.w": codes(2, 256, 192), "experts.w_scale": floats(*shape)}
    found = found_in(parts)
    assert list(found) == list(parts)
    assert [tensor.dtype.name for tensor in found.values()] == ["f8_e4m3", "f32"]


def test_comfyui_files_lose_their_marker_and_keep_other_parts():
    weight, scale = codes(64, 128), floats()
    parts = layer(weight=weight, scale_weight=scale, scale_input=floats(), bias=floats(64))
    parts["scaled_fp8"] = Elements(DTYPES["f8_e4m3"], np.zeros(2, np.uint8))
    found = found_in(parts)
    assert sorted(found) == [f"{LAYER}.{role}" for role in ("bias", "scale_input", "weight")]
    same(found[f"{LAYER}.weight"], weight.to_f32() * scale)
    marker = {"scaled_fp8": parts["scaled_fp8"], "a.weight": weight}
    assert list(found_in(marker)) == list(marker)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_comfyui_statements_of_known_formats_are_understood(kind):
    weight, scale = codes(64, 128, kind=kind), floats()
    form = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[kind]
    parts = layer(weight=weight, weight_scale=scale, comfy_quant=told(format=form, full_precision_matrix_mult=True))
    found = found_in(parts)
    assert list(found) == [f"{LAYER}.weight"]
    same(found[f"{LAYER}.weight"], weight.to_f32() * scale)


@pytest.mark.parametrize(
    "statement",
    [
        told(format="float9"),
        told(format="float8_e4m3fn", convrot=True),
        told(form="float8_e4m3fn"),
        np.zeros(3, np.uint8),
        np.zeros((2, 2), np.uint8),
    ],
)
def test_comfyui_statements_that_are_not_understood_leave_layers_as_they_are(statement):
    parts = layer(weight=codes(64, 128), weight_scale=floats(), comfy_quant=statement)
    found = found_in(parts)
    assert sorted(found) == sorted(parts)
    assert not any(isinstance(tensor, QuantizedSource) for tensor in found.values())


def swizzled(scales: np.ndarray) -> np.ndarray:
    """Return scales in the order of tensor cores, an element at a time."""
    rows, cols = scales.shape
    out = np.zeros((-(-rows // 128) * 128, -(-cols // 4) * 4), scales.dtype)
    flat = out.reshape(-1)
    for row in range(rows):
        for col in range(cols):
            tile = row // 128 * (out.shape[1] // 4) + col // 4
            flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4] = scales[row, col]
    return out


def test_comfyui_mxfp8_has_scales_in_the_order_of_tensor_cores():
    weight, scale = codes(160, 192), powers(160, 6)
    each = np.ldexp(np.float32(1), scale.data.astype(int) - 127).repeat(32, axis=1)
    stored = Elements(DTYPES["u8"], swizzled(scale.data))
    parts = layer(weight=weight, weight_scale=stored, comfy_quant=told(format="mxfp8"))
    same(found_in(parts)[f"{LAYER}.weight"], weight.to_f32() * each)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"to_q": {"format": "mxfp8"}}})}
    del parts[f"{LAYER}.comfy_quant"]
    same(found_in(parts, metadata=header)[f"{LAYER}.weight"], weight.to_f32() * each)
    with pytest.raises(SourceError, match=r"weight_scale' of shape \[160, 6\] does not fit"):
        found_in(parts | {f"{LAYER}.weight_scale": scale}, metadata=header)


@pytest.mark.parametrize("listed", ["to_q", LAYER, f"model.{LAYER}"])
def test_comfyui_statements_in_headers_are_found_under_any_prefix(listed):
    parts = layer(weight=codes(128, 128), weight_scale=Elements(DTYPES["u8"], np.full((128, 4), 127, np.uint8)))
    for form, quantized in (("mxfp8", True), ("other", False)):
        header = {"_quantization_metadata": json.dumps({"layers": {listed: {"format": form}}})}
        assert isinstance(found_in(parts, metadata=header)[f"{LAYER}.weight"], QuantizedSource) is quantized


def test_layers_that_comfyui_does_not_list_beside_others_are_kept():
    parts = layer(weight=codes(128, 128), weight_scale=floats())
    header = {"_quantization_metadata": json.dumps({"layers": {"other": {"format": "float8_e4m3fn"}}})}
    assert not isinstance(found_in(parts, metadata=header)[f"{LAYER}.weight"], QuantizedSource)
    parts |= layer(comfy_quant=told(format="float8_e4m3fn"))
    assert isinstance(found_in(parts, metadata=header)[f"{LAYER}.weight"], QuantizedSource)


def test_comfyui_int8_has_one_scale_unless_more_is_stated():
    weight, scale = np.random.default_rng(0).integers(-128, 128, (16, 64)).astype(np.int8), floats()
    parts = layer(weight=weight, weight_scale=scale, comfy_quant=told(format="int8_tensorwise"))
    same(found_in(parts)[f"{LAYER}.weight"], weight.astype(np.float32) * scale)
    for statement in (told(format="int8_tensorwise", convrot=True), told(format="int8_blockwise", group_size=128)):
        found = found_in(parts | {f"{LAYER}.comfy_quant": statement})
        assert sorted(found) == sorted(parts)
        assert not any(isinstance(tensor, QuantizedSource) for tensor in found.values())


def test_powers_of_two_are_no_weights_unless_named():
    tensor = ArrayTensor("a", powers(64, 64))
    keep = Recipe.parse("q4_0").encoder_for(tensor)
    assert str(keep) == "f8_e8m0"
    assert str(Recipe.parse(None, ["a=f32"]).encoder_for(tensor)) == "f32"
