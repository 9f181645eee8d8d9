"""Layers that are quantized in a way that no layout explains are kept whole, warned of and never made smaller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat.converters.arrays import ArrayTensor
from qformat.converters.quantized.recognize import Recognized, recognize
from qformat.converters.quantized.roles import is_activation_only
from qformat.converters.request import Request
from qformat.converters.sources.options import SourceOptions
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import QuantizedSource
from tests.helpers.checkpoints import model
from tests.helpers.quantized import awq, compressed, gptq, layer

I8, U8, I16, I32, U32 = (np.ones((4, 8), dtype) for dtype in ("int8", "uint8", "int16", "int32", "uint32"))
F8 = Elements(DTYPES["f8_e4m3"], np.ones((4, 8), np.uint8))
F16, ONE = np.ones((4, 8), np.float16), np.ones(1, np.float32)
STACKED = {role: part[None] for role, part in gptq(layer(4, 16, 64, 32), 4, g_idx=False).items() if role != "scales"}
V1, AWQ, PACKED = gptq(layer(4, 16, 64, 32), 4), awq(layer(4, 16, 64, 32)), compressed(layer(4, 16, 64, 32), 4)


def found(parts: Mapping[str, Any], config: Any = None, metadata: Mapping[str, str] | None = None) -> Recognized:
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(part)) for name, part in parts.items()
    ]
    return recognize(tensors, {"quantize_config.json": config} if config else {}, SourceOptions(), metadata)


def fixed(parts: Mapping[str, Any], config: Any = None, metadata: Mapping[str, str] | None = None) -> set[str]:
    return {tensor.name for tensor in found(parts, config, metadata).tensors if tensor.fixed_because}


# (parts of a layer, what the configuration says, the name of the format)
FORMATS: list[tuple[dict[str, Any], Any, str]] = [
    ({"W_q": U8, "scale": F16, "zero": F16}, {"quant_method": "hqq"}, "HQQ"),
    ({"W_q": F16, "scale": F16, "zero": F16}, None, "HQQ"),
    ({"W_q": U8, "scale": F16, "zero": F16, "scale2": F16[0]}, {"quant_method": "sinq"}, "SINQ"),
    ({"codes": I8, "codebooks": F16, "scales": F16}, None, "AQLM"),
    ({"weight": I8, "weight_scales": ONE}, None, "EETQ"),
    ({"qweight": U8, "scales": U8, "forward_hadamard_matrix": F16}, None, "FP-Quant"),
    ({"qweight": I8, "wscales": F16, "smooth": F16[0], "proj_down": F16, "proj_up": F16}, None, "SVDQuant (nunchaku)"),
    ({"B": I32, "s": ONE}, None, "Marlin"),
    ({"B": I32, "s_channel": ONE, "s_group": F16}, None, "QQQ"),
    ({"q_weight": I32, "q_scale": I32, "q_scale_max": F16[0], "q_invperm": I32[0]}, None, "EXL2"),
    ({"trellis": np.ones((2, 2, 4), np.int16), "suh": F16[0], "svh": F16[0]}, None, "EXL3"),
    ({"indices": I32, "weight_scale": F16[0], "weight_bias": F16[0], "centroids.weight": F16}, None, "VPTQ"),
    ({"Qidxs": np.ones((4, 8), np.int64), "SU": F16[0], "SV": F16[0]}, None, "QuIP#"),
    ({"dense_weights": np.ones(8, np.int64), "row_offsets": I32[0], "col_vals": I32[0]}, None, "SpQR"),
    ({"weight": I16, "scales": F16, "tables": F16, "tables2": F16}, None, "HIGGS"),
    ({"weight": I8, "weights_scaling_factor": F16, "prequant_scaling_factor": F16}, None, "TensorRT-LLM"),
    ({"weight": I8, "quant_bias": I32[0], "deq_scale": F16[0], "input_scale": ONE}, None, "W8A8 (Ascend)"),
    ({"weight_packed": I32, "scale_packed": F16, "meta": I16}, None, "marlin-24"),
    ({"compressed": F16, "bitmask": U8, "shape": I32[0]}, {"quant_method": "compressed-tensors"}, "sparse-bitmask"),
    ({"weight": U8, "blocks": F16}, {"bigdl_transformers_low_bit": "sym_int4"}, ""),
    (STACKED | {"scales": np.ones((1, 2, 16), np.float16)}, {"quant_method": "gptq"}, "gptq of stacked experts"),
    (PACKED | {"weight_packed": np.ones((2, 16, 8), np.int32)}, None, "pack-quantized of stacked experts"),
    (V1 | {"qweight": np.zeros((8, 17), np.int32)}, None, "packed for a certain kernel, such as Marlin"),
    (V1, {"checkpoint_format": "marlin"}, "marlin"),
    (V1, {"quant_method": "squeezellm"}, "squeezellm"),
    ({"qweight": I8, "scales": F16, "s2_zeros": F16}, None, ""),
    ({"weight": I8, "weight_scale": ONE, "quant_bias": I32[0], "deq_scale": F16[0]}, None, "W8A8 (Ascend)"),
    (V1, {"checkpoint_format": "gptq_p"}, "gptq_p"),
    (V1, {"is_marlin_format": True}, "Marlin"),
    (AWQ, {"quant_method": "awq", "version": "gemv"}, "gemv"),
    (AWQ, {"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
]


@pytest.mark.parametrize(
    ("parts", "config", "name"), FORMATS, ids=[f"{name}-{n}" for n, (_, _, name) in enumerate(FORMATS)]
)
def test_layers_in_formats_that_cannot_be_read_are_kept_whole_and_named(parts, config, name):
    every = {f"a.b.{role}": part for role, part in parts.items()} | {"c.weight": F16, "c.scale": F16}
    result = found(every, config)
    assert {tensor.name for tensor in result.tensors if tensor.fixed_because} == {f"a.b.{role}" for role in parts}
    assert {tensor.name for tensor in result.tensors} == set(every)
    assert result.layers
    what = f"the format {name}, which cannot be read" if name else "an unknown format"
    assert result.warnings == [f"layer 'a.b': quantized in {what}; all its tensors are kept as they are"]


def test_several_layers_of_one_format_are_one_warning():
    parts = {f"{n}.{role}": part for n in "abc" for role, part in {"weight": I8, "weight_scales": ONE}.items()}
    assert [warning[:40] for warning in found(parts).warnings] == ["layer 'a' and 2 more: quantized in the f"]


def test_types_for_the_tensors_of_unknown_layers_are_refused():
    parts = {"a.weight": I8, "a.weight_scales": F16, "b.weight": np.ones((4, 64), np.float32)}
    tensors = {tensor.name: tensor for tensor in found(parts).tensors}
    with pytest.raises(SourceError) as caught:
        Recipe.parse("q4_0").encoder_for(tensors["a.weight_scales"])
    assert str(caught.value) == (
        "tensor 'a.weight_scales' belongs to layer 'a', which is quantized in the format EETQ, which cannot be read: it can only "
        "stay as it is; leave out q4_0, or give it to other tensors by name"
    )
    by_name = Recipe.parse(None, ["b*=q4_0"])
    assert [str(by_name.encoder_for(tensors[name])) for name in ("a.weight", "a.weight_scales", "b.weight")] == [
        "i8",
        "f16",
        "q4_0",
    ]
    with pytest.raises(SourceError, match="it can only stay"):
        Recipe.parse(None, ["a.weight=q4_0"]).encoder_for(tensors["a.weight"])


LETTERS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
CODES = st.sampled_from([I8, U8, I16, I32, U32, F8])
WEIGHTS = st.sampled_from(
    ["weight", "qweight", "W_q", "w", "kernel", "weight_packed", "_weight_qdata", "weight._data", "q_weight"]
)


def is_plain(role: str) -> bool:
    return role.endswith("bias") or role.startswith("lora_")


@given(
    codes=CODES,
    weight=WEIGHTS,
    companion=LETTERS.filter(lambda role: not is_plain(role)),
    joint=st.sampled_from([".", "_", ""]),
)
def test_codes_with_a_companion_of_any_spelling_are_never_plain(codes, weight, companion, joint):
    role = companion if joint == "." else f"{weight}{joint}{companion}"
    if role == weight or role.startswith(f"{weight}."):
        return
    result = None
    try:
        result = found({f"model.a.{weight}": codes, f"model.a.{role}": np.ones((4, 1), np.float32)})
    except SourceError:
        return
    assert result.layers
    kept = {tensor.name for tensor in result.tensors if tensor.fixed_because}
    assert kept >= {f"model.a.{weight}", f"model.a.{role}"} or f"model.a.{weight}" not in {
        t.name for t in result.tensors if t.dtype.size == 1
    }


SPELLINGS = (
    *(
        "scale",
        "scales",
        "weight_scale",
        "weight_scale_inv",
        "scale_weight",
        "weightScale",
        "zero_point",
        "scales_and_zeros",
        "absmax",
    ),
    *(
        "wscales",
        "quant_map",
        "codebook",
        "qscale",
        "ScaleInv",
        "weight_quantizer._scale",
        "meta.scale",
        "lut",
        "scaling_factor",
    ),
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "name",
    [
        "a.0.q_proj.{}",
        "a.0.q_proj_{}",
        "{}.a.0.q_proj.weight",
        "a.0.q_proj.weight.{}",
        "fp8_{}_a_0_q_proj",
        "a.0.q_proj.weight_{}",
    ],
)
def test_companions_under_any_prefix_belong_to_the_codes(spelling, name):
    parts = {
        "a.0.q_proj.weight": Elements(DTYPES["f8_e5m2"], np.ones((4, 8), np.uint8)),
        name.format(spelling): F16[:, :1],
    }
    try:
        result = found(parts)
    except SourceError:
        return
    assert result.layers
    assert all(isinstance(tensor, QuantizedSource) or tensor.fixed_because for tensor in result.tensors)


# Integers and eight-bit floats of models that are not quantized
PLAIN: list[dict[str, Any]] = [
    {"a.weight": F8, "a.bias": ONE, "b.weight": F8},
    {"img_attn.qkv.weight": F8, "img_attn.norm.query_norm.scale": F16[0], "img_attn.proj.weight": F8},
    {"text_projection": F8, "logit_scale": np.ones((), np.float32)},
    {"embeddings.position_ids": I32, "embeddings.cls_token": F16, "embeddings.weight": F16},
    {"attn.relative_position_index": I32, "attn.logit_scale": F16, "attn.relative_position_bias_table": F16},
    {"attn.bias": U8, "attn.masked_bias": ONE, "attn.c_attn.weight": F16},
    {"a.attention_mask": U8, "a.token_type_ids": I32, "a.scale": F16},
    {"ids": I32, "a": F16, "b": F16},
    {"q.weight": F8, "q.lora_A.weight": F16, "q.lora_B.weight": F16},
    {"x.weight": F16, "x.weight_g": F16, "x.weight_v": F16, "x.input_scale": ONE, "x.k_scale": ONE},
    {"scale_shift_table": F8, "a.weight": F8},
]


@pytest.mark.parametrize("parts", PLAIN, ids=[next(iter(parts)) for parts in PLAIN])
def test_integers_and_floats_that_are_not_codes_are_plain(parts):
    result = found(parts)
    assert result.warnings == []
    assert not result.layers
    assert not [tensor for tensor in result.tensors if tensor.fixed_because]


def test_eight_bit_floats_are_codes_if_a_file_says_so():
    parts = {"a.weight": F8, "b.weight": F16}
    assert fixed(parts, {"quant_method": "new"}) == {"a.weight"}
    assert fixed(parts, None, {"quantization": "int8"}) == {"a.weight"}
    assert fixed(parts) == set()


STATED: list[tuple[str, Any]] = [
    ("config.json", {"quantization_config": {"load_in_8bit": True}}),
    ("config.json", {"text_config": {"quantization_config": {"bits": 4}}}),
    ("config.json", {"thinker_config": {"text_config": {"llm_config": {"quantization_config": {"bits": 4}}}}}),
    ("config.json", {"quantization": {"bits": 4, "group_size": 64}}),
    ("config.json", {"quantization_bit": 4}),
    ("config.json", {"load_in_4bit": True}),
    ("config.json", {"bigdl_transformers_low_bit": "sym_int4"}),
    ("config.json", {"compression_config": {"format": "new"}}),
    ("params.json", {"quantization": {"qformat_weight": "fp8_e4m3"}}),
    ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A16"}}),
    ("quant_model_description_w8a8.json", {"model_quant_type": "W8A8"}),
    ("quanto_qmap.json", {"a": {"weights": "qint8"}}),
    ("quant_config.json", {"w_bit": 4}),
]


@pytest.mark.parametrize(("file", "content"), STATED, ids=[f"{file}-{n}" for n, (file, _) in enumerate(STATED)])
def test_what_any_file_says_about_quantization_counts(tmp_path, file, content):
    source = model(tmp_path / "m", {"a.weight": np.ones((4, 64), np.float32)}, config="{}")
    (source / file).write_text(json.dumps(content))
    (plan,) = Request(str(source)).plans()
    assert str(plan.encoder) == "f32"
    checkpoint, _ = Request(str(source)).open()
    (warning,) = [text for text in checkpoint.warnings if "says" in text]
    assert warning.startswith(f"{file} says ")
    assert warning.endswith("but no tensor is quantized: they stay as they are if no type is given")


NOTHING_SAID: list[Any] = [
    {"quantization_config": None},
    {"quantization_config": {}},
    {"num_quantizers": 8, "quantizer_dropout": 0.1, "quantization_bit": 0, "load_in_8bit": False},
    {"force_dequant": "none", "quant_mode": False, "quantization": "none"},
]


@pytest.mark.parametrize("content", NOTHING_SAID)
def test_configurations_that_say_nothing_about_quantization_do_not_count(tmp_path, content):
    source = model(tmp_path / "m", {"a.weight": np.ones((4, 64), np.float32)}, config=json.dumps(content))
    assert str(Request(str(source)).plans()[0].encoder) == "q4_0"


def test_activation_scales_are_told_from_those_of_weights():
    for role in (
        "input_scale",
        "input_global_scale",
        "output_scale",
        "k_scale",
        "v_scale",
        "kv_cache_scaling_factor",
        "act_scale",
    ):
        assert is_activation_only(role), role
    for role in (
        "weight_scale",
        "scale",
        "scales",
        "pre_quant_scale",
        "weight_scale_2",
        "smooth",
        "weight",
        "zero_point",
    ):
        assert not is_activation_only(role), role


def test_sources_of_all_kinds_keep_unknown_layers(tmp_path: Path):
    folder = model(tmp_path / "m", {"a.weight": I8, "a.weight_scales": np.ones((4, 64), np.float32)}, config="{}")
    assert {plan.source.name: str(plan.encoder) for plan in Request(str(folder)).plans()} == {
        "a.weight": "i8",
        "a.weight_scales": "f32",
    }
    with pytest.raises(SourceError, match="format EETQ"):
        Request(str(folder), type="q8_0").plans()
