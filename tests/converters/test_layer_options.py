"""Quantized layers are read by their own options and their own numbers, and no part or key that changes them is ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from qformat.converters.arrays import ArrayTensor
from qformat.converters.quantized.layer_options import for_layer
from qformat.converters.quantized.recognize import Recognized, recognize
from qformat.converters.sources.options import SourceOptions
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.source import FixedSource, QuantizedSource
from tests.helpers.quantized import awq, gptq, layer, less_one


def found(parts: Mapping[str, Any], config: Any = None, **files: Any) -> Recognized:
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(part)) for name, part in parts.items()
    ]
    configs = {"config.json": {"quantization_config": config}} if config else {}
    return recognize(tensors, configs | {f"{name}.json": content for name, content in files.items()}, SourceOptions())


def values(result: Recognized, name: str) -> np.ndarray:
    (tensor,) = [tensor for tensor in result.tensors if tensor.name == name]
    assert isinstance(tensor, QuantizedSource)
    return tensor.read(slice(0, int(np.prod(tensor.shape)))).data.reshape(tensor.shape)


def under(prefix: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{role}": part for role, part in parts.items()}


# ---- options of a layer

OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bits": 4}, {"bits": 4}),
    ({"bits": 4, "dynamic": {"+:.*q_proj.*": {"bits": 8}}}, {"bits": 8}),
    ({"bits": 4, "dynamic": {".*mlp.*": {"bits": 2}, r".*\.0\..*": {"bits": 8}, ".*": {"bits": 3}}}, {"bits": 8}),
    ({"bits": 4, "dynamic": {"-:.*q_proj": {}, ".*": {"bits": 8}}}, {"bits": 4}),
    ({"bits": 4, "extra_config": {"a.0.q_proj": {"bits": 8}}}, {"bits": 8}),
    ({"bits": 4, "extra_config": {"0.q_proj": {"bits": 8}}}, {"bits": 8}),
    ({"bits": 4, "a.0.q_proj": {"bits": 8}}, {"bits": 8}),
    ({"bits": 4, "dynamic": {"(a+)+$": {"bits": 8}, "(": {"bits": 8}, ".*" * 9: {"bits": 8}}}, {"bits": 4}),
    ({"quant_algo": "MIXED", "quantized_layers": {"a.0.q_proj": {"quant_algo": "FP8"}}}, {"quant_algo": "FP8"}),
]


@pytest.mark.parametrize(("content", "expected"), OPTIONS)
def test_options_of_a_layer_stand_instead_of_those_of_all(content, expected):
    own = for_layer(content, "a.0.q_proj")
    assert {key: own[key] for key in expected} == expected


def test_groups_of_layers_are_chosen_by_their_targets():
    groups = {"all": {"targets": ["Linear"]}, "q": {"targets": ["re:.*q_proj$"]}, "k": {"targets": ["a.k_proj"]}}
    assert [*for_layer({"config_groups": groups}, "a.q_proj")["config_groups"]] == ["q"]
    assert [*for_layer({"config_groups": groups}, "a.k_proj")["config_groups"]] == ["k"]
    assert [*for_layer({"config_groups": groups}, "a.v_proj")["config_groups"]] == [*groups]


def test_group_sizes_and_bits_of_gptq_are_those_of_each_layer():
    layers = {"a.up": (4, 256, 128), "a.q": (8, 256, 128), "a.down": (4, 192, 96), "a.gate": (4, 192, 128)}
    made = {name: layer(bits, 64, cols, group) for name, (bits, cols, group) in layers.items()}
    parts: dict[str, Any] = {}
    for name, x in made.items():
        parts |= under(name, gptq(x, layers[name][0], g_idx=False))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "checkpoint_format": "gptq"}
    config["dynamic"] = {"+:.*q$": {"bits": 8}, "+:.*down.*": {"group_size": 96}, "-:.*router$": {}}
    result = found(parts, config)
    assert result.warnings == []
    for name, x in made.items():
        assert values(result, f"{name}.weight").tobytes() == x.values.tobytes()


# ---- zero points


@pytest.mark.parametrize("label", ["auto_round:auto_gptq", "auto_round"])
@pytest.mark.parametrize("stored", [("v2", "v2"), ("v1", "v1"), ("v2", "v1")])
def test_zero_points_in_the_middle_are_found_in_each_layer(label, stored):
    made = [layer(4, 64, 128, 128, sym=True, seed=seed) for seed in range(2)]
    parts = under("model.up", gptq(made[0], 4, stored[0])) | under("mtp.up", gptq(made[1], 4, stored[1]))
    result = found(parts, {"quant_method": "auto-round", "bits": 4, "sym": True, "packing_format": label})
    for name, x in zip(("model", "mtp"), made, strict=True):
        assert values(result, f"{name}.up.weight").tobytes() == x.values.tobytes()
    right = "v1" if label.endswith("gptq") else "v2"
    wrong = [f"'{name}.up.weight'" for name, version in zip(("model", "mtp"), stored, strict=True) if version != right]
    assert len(result.warnings) == bool(wrong)
    if len(wrong) == 1:
        assert result.warnings[0].startswith(f"GPTQ: all zero points of {wrong[0]} are in the middle if read as ")


def test_layers_of_an_asymmetric_quantizer_follow_the_label():
    small = layer(4, 8, 64, 64, sym=True)
    parts = under("a", gptq(small, 4, "v2")) | under("b", gptq(layer(4, 8, 64, 32), 4))
    result = found(parts, {"quant_method": "gptq", "checkpoint_format": "gptq"})
    assert result.warnings == []
    assert values(result, "a.weight").tobytes() != small.values.tobytes()


@pytest.mark.parametrize("key", ["backend", "packing_format"])
@pytest.mark.parametrize("label", ["auto_round:exllamav2", "auto_round:triton", "auto_round"])
def test_older_labels_of_auto_round_mean_zero_points_as_they_are(key, label):
    x = layer(4, 64, 128, 128)
    config = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 128, "sym": False, key: label}
    assert values(found(under("a", gptq(x, 4, "v2")), config), "a.weight").tobytes() == x.values.tobytes()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("whole", [False, True])
def test_zero_points_of_zero_are_read_as_the_tool_stored_them(bits, whole):
    x = layer(bits, 64, 128, 32)
    x.zeros[::7] = 0
    parts = gptq(x, bits) | {"qzeros": less_one(x.zeros.T, bits, whole=whole)}
    config = {"quant_method": "gptq", "sym": False, "meta": {"quantizer": ["gptqmodel:5.0.0"]} if whole else {}}
    assert values(found(under("a", parts), config), "a.weight").tobytes() == x.values.tobytes()


@pytest.mark.parametrize(
    "method", ["gptq", "GPTQ", "auto-round", "intel/auto-round", "inc", "gptq_marlin", "optq", "gptqmodel"]
)
def test_methods_that_store_layers_as_gptq_does_are_known(method):
    x = layer(4, 64, 128, 128)
    config = {"quant_method": method, "bits": 4, "group_size": 128}
    assert values(found(under("a", gptq(x, 4)), config), "a.weight").tobytes() == x.values.tobytes()


def test_awq_layers_without_zero_points_have_them_in_the_middle():
    x = layer(4, 64, 128, 128, sym=True)
    parts = {role: part for role, part in awq(x).items() if role != "qzeros"}
    config = {"quant_method": "awq_marlin", "bits": 4, "group_size": 128, "zero_point": False, "version": "GEMM"}
    assert values(found(under("a", parts), config), "a.weight").tobytes() == x.values.tobytes()
    with pytest.raises(SourceError, match=r"tensor 'a\.qzeros' is missing"):
        found(under("a", parts), config | {"zero_point": True})


# ---- eight bits


@pytest.mark.parametrize(("cols", "group"), [(256, 64), (200, 100), (96, 32)])
def test_groups_of_float8_have_the_length_in_the_configuration(cols, group):
    rng = np.random.default_rng(0)
    codes = Elements(DTYPES["f8_e4m3"], rng.integers(0, 0x7F, (64, cols)).astype(np.uint8))
    scales = rng.uniform(0.5, 2, (64, cols // group)).astype(np.float32)
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": group, "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    result = found({"a.weight": codes, "a.weight_scale": scales}, config)
    assert values(result, "a.weight").tobytes() == (codes.to_f32() * scales.repeat(group, 1)).tobytes()


def test_groups_of_float8_of_two_possible_lengths_are_refused():
    codes = Elements(DTYPES["f8_e4m3"], np.zeros((64, 200), np.uint8))
    with pytest.raises(SourceError, match=r"in groups of one length: of 100 or of 128; set group_size in config\.json"):
        found({"a.weight": codes, "a.weight_scale": np.ones((64, 2), np.float32)})


@pytest.mark.parametrize("shape", [(8, 1), (8,), (8, 4), (1,)])
def test_offsets_of_signed_bytes_are_subtracted(shape):
    rng = np.random.default_rng(0)
    codes, offsets = rng.integers(-128, 128, (8, 32)).astype(np.int8), rng.normal(-100, 200, shape).astype(np.float32)
    scales = rng.uniform(0.5, 2, shape).astype(np.float32)
    result = found({"a.weight": codes, "a.weight_scale": scales, "a.weight_offset": offsets})
    full = [
        part.reshape(1, 1) if shape == (1,) else part.reshape(8, -1).repeat(32 // (part.size // 8), 1)
        for part in (offsets, scales)
    ]
    assert values(result, "a.weight").tobytes() == ((codes - full[0]) * full[1]).tobytes()
    with pytest.raises(SourceError, match=r"'a\.weight_offset' of shape \[3\] does not fit"):
        found({"a.weight": codes, "a.weight_scale": scales, "a.weight_offset": offsets.reshape(-1)[:1].repeat(3)})


@pytest.mark.parametrize("shape", [(2, 8, 1), (2, 8), (2, 8, 4), (1,)])
@pytest.mark.parametrize("name", ["experts.w1.{}", "experts.w1{}"])
def test_stacked_experts_of_signed_bytes_are_read(shape, name):
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-128, 128, (2, 8, 64)).astype(np.int8), rng.uniform(0.5, 2, shape).astype(np.float32)
    dotted = name.endswith(".{}")
    parts = {
        name.format("weight" if dotted else ""): codes,
        name.format("weight_scale" if dotted else "_scale"): scales,
    }
    full = scales.reshape(1, 1, 1) if shape == (1,) else scales.reshape(2, 8, -1)
    expected = codes.astype(np.float32) * full.repeat(64 // full.shape[2], 2)
    assert values(found(parts), name.format("weight" if dotted else "")).tobytes() == expected.tobytes()


@pytest.mark.parametrize("says", [{"model_quant_type": "W4A8_DYNAMIC"}, {"a.weight": "W4A8"}])
def test_bytes_that_hold_two_codes_are_kept(says):
    parts = {"a.weight": np.ones((8, 32), np.int8), "a.weight_scale": np.ones((8, 1), np.float32)}
    result = found(parts, quant_model_description=says)
    assert [tensor.name for tensor in result.tensors if tensor.fixed_because] == [*parts]
    assert "quantized in the format W4A8" in result.warnings[0]


# ---- what may not be ignored

BYTES = {"a.weight": np.ones((8, 32), np.int8), "a.weight_scale": np.ones((8, 1), np.float32)}


@pytest.mark.parametrize(
    "role", ["pre_quant_scale", "smooth_factor", "lora_down", "codebook", "weight_shift", "quant_bias"]
)
def test_parts_that_may_change_the_weights_of_a_layer_are_refused(role):
    x = layer(4, 16, 64, 32)
    for parts, name in ((BYTES, "int-quantized"), (under("a", gptq(x, 4)), "GPTQ"), (under("a", awq(x)), "AWQ")):
        with pytest.raises(SourceError) as caught:
            found(parts | {f"a.{role}": np.ones(32, np.float32)})
        assert str(caught.value) == (
            f"tensor 'a.{role}' belongs to a layer in the format {name}, and what it does to the weights there is not known; "
            "use the model as it was before quantization"
        )


@pytest.mark.parametrize(
    "role", ["bias", "input_scale", "output_scale", "input_zero_point", "k_scale", "e_score_correction_bias"]
)
def test_parts_that_leave_the_weights_as_they_are_stay(role):
    result = found(BYTES | {f"a.{role}": np.zeros(8, np.float32)})
    assert sorted(tensor.name for tensor in result.tensors) == sorted([f"a.{role}", "a.weight"])
    assert result.warnings == []


@pytest.mark.parametrize("role", ["input_quantizer._pre_quant_scale", "smooth.scales", "weight_hadamard.weight"])
def test_modules_below_a_layer_that_change_its_weights_are_refused(role):
    with pytest.raises(
        SourceError, match=rf"^tensor 'a\.{role}' belongs to a layer in the format int-quantized, and what"
    ):
        found(BYTES | {f"a.{role}": np.ones(32, np.float32)})


def test_other_modules_below_a_layer_stay():
    result = found(
        BYTES | {"a.input_quantizer._amax": np.ones(1, np.float32), "a.lora.weight": np.ones((8, 32), np.float32)}
    )
    assert sorted(tensor.name for tensor in result.tensors) == ["a.input_quantizer._amax", "a.lora.weight", "a.weight"]


@pytest.mark.parametrize(
    ("config", "format_"),
    [
        ({"quant_method": "new", "bits": 8}, "new"),
        ({"quant_method": "int4_weight_only"}, "int4_weight_only"),
        ({"quant_method": "w8a8", "bits": 4}, "4 bits, packed into bytes"),
        ({"w_bit": 4}, "4 bits, packed into bytes"),
    ],
)
def test_bytes_that_may_hold_several_codes_are_kept(config, format_):
    result = found(BYTES, config)
    assert sorted(tensor.name for tensor in result.tensors) == ["a.weight", "a.weight_scale"]
    assert result.warnings == [
        f"layer 'a': quantized in the format {format_}, which cannot be read; all its tensors are kept as they are"
    ]


def test_bytes_with_half_precision_scales_need_a_configuration():
    parts = {"a.weight": np.ones((8, 32), np.int8), "a.weight_scale": np.ones(8, np.float16)}
    (warning,) = found(parts).warnings
    assert warning == (
        "layer 'a': quantized in the format int8 or ChatGLM's int4 (only config.json tells them apart), which cannot be read; all "
        "its tensors are kept as they are"
    )
    assert [tensor.shape for tensor in found(parts, {"quant_method": "w8a8_int8"}).tensors] == [(8, 32)]


def test_words_of_two_in_four_kernels_are_kept():
    parts = {
        "a.B_24": np.ones((4, 128), np.int32),
        "a.B_meta": np.ones((8, 16), np.int16),
        "a.s": np.ones((2, 64), np.float16),
    }
    result = found(parts)
    assert result.warnings == [
        "layer 'a': quantized in the format Marlin 2:4, which cannot be read; all its tensors are kept as they are"
    ]
    assert all(isinstance(tensor, FixedSource) for tensor in result.tensors)


CHANGES: list[tuple[str, Any]] = [
    ("transform_config", {"config_groups": {"R4": {"type": "hadamard"}}}),
    ("rotation", "hadamard"),
    ("rotation_configs", [{"type": "R1"}]),
    ("pre_quant_scale", True),
    ("sparsity_config", {"format": "sparse-24-bitmask"}),
    ("adapter", {"name": "lora", "rank": 8}),
]


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_keys_that_mean_other_weights_are_refused(key, value):
    with pytest.raises(SourceError, match=f"config.json says {key} .*: the weights are others than their codes say"):
        found(BYTES, {"quant_method": "compressed-tensors", key: value})
    assert found(BYTES, {"quant_method": "compressed-tensors", key: None}).warnings == []


def test_keys_that_are_not_known_are_named():
    (warning,) = found(BYTES, {"quant_method": "w8a8_new", "mood": "good", "weather": 1}).warnings
    assert warning == "config.json says mood 'good' (and 'weather'), which is not known here: ignored"


# ---- files saved over older ones


def test_the_packed_codes_of_a_layer_count_if_an_older_weight_is_there_too():
    x = layer(4, 16, 64, 32)
    older = {"a.weight": np.ones((16, 64), np.float16), "a.weight_scale": np.ones((16, 1), np.float32)}
    result = found(under("a", gptq(x, 4)) | older)
    assert [tensor.name for tensor in result.tensors] == ["a.weight"]
    assert values(result, "a.weight").tobytes() == x.values.tobytes()
    assert result.warnings == [
        "tensor 'a.weight' and 1 more: left out, since its layer has packed codes too, which count"
    ]


def test_statements_of_one_part_of_a_model_are_for_its_layers():
    made = [layer(4, 8, 192, group, seed=group) for group in (96, 128)]
    parts = under("thinker.a", gptq(made[0], 4, g_idx=False)) | under("talker.a", gptq(made[1], 4, g_idx=False))
    inner = [{"quantization_config": {"bits": 4, "group_size": group}} for group in (96, 128)]
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(part)) for name, part in parts.items()
    ]
    config = {"thinker_config": inner[0], "talker_config": inner[1]}
    result = recognize(tensors, {"config.json": json.loads(json.dumps(config))}, SourceOptions())
    for name, x in zip(("thinker", "talker"), made, strict=True):
        assert values(result, f"{name}.a.weight").tobytes() == x.values.tobytes()
