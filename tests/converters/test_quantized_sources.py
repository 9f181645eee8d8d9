"""Layers quantized by other tools, packed here bit by bit, have the values of their codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import safe_open
from qformat.codecs.layout import Matrix
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.quantized.recognize import recognize
from qformat.converters.request import Request
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.safetensors import open_safetensors
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, QuantizedSource, SourceTensor
from tests.helpers.checkpoints import model
from tests.helpers.codecs import chunks_of, decode, part_of, segment_lengths
from tests.helpers.quantized import Layer, awq, compressed, gptq, layer, loose_words_of, packed, random_scales, words_of

DATA = Path(__file__).parents[1] / "data" / "quantized"
CONFIGS = ("config.json", "quantize_config.json", "quantization_config.json")
UNIT = {2: 16, 3: 32, 4: 8, 8: 4}  # codes that fill whole words
every_width = pytest.mark.parametrize("bits", UNIT)


# ---- checks


def sources(parts: Mapping[str, Any], name: str = "a.b") -> list[Any]:
    return [
        ArrayTensor(f"{name}.{role}", part if isinstance(part, Elements) else from_array(part))
        for role, part in parts.items()
    ]


def found_in(*arguments: Any) -> tuple[list[SourceTensor], list[str]]:
    """Return the tensors and warnings of recognition."""
    result = recognize(*arguments)
    return list(result.tensors), list(result.warnings)


def recognized(parts: Mapping[str, Any], config: Any = None, version: Any = None) -> Any:
    configs = {} if config is None else {"quantize_config.json": config}
    return found_in(sources(parts), configs, SourceOptions(gptq_format=version))


def only(parts: Mapping[str, Any], config: Any = None, version: Any = None) -> Any:
    found, warnings = recognized(parts, config, version)
    assert not warnings
    assert len(found) == 1
    assert found[0].name == "a.b.weight"
    assert isinstance(found[0], QuantizedSource)
    return found[0]


def refused(parts: Mapping[str, Any], config: Any = None, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        recognized(parts, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(tensor: Any, values: np.ndarray) -> None:
    """Compare the values of a tensor read whole, in part, and chunk by chunk."""
    assert tensor.shape == values.shape
    flat = values.reshape(-1)
    assert tensor.read(slice(0, flat.size)).data.tobytes() == flat.tobytes()
    start, stop = flat.size // 3, flat.size - flat.size // 5
    assert tensor.read(slice(start, stop)).data.tobytes() == flat[start:stop].tobytes()
    for chunk in chunks_of(tensor.codec, tensor.shape):
        parts = tensor.encoded(chunk)
        segments = [bytes(length) for length in segment_lengths(tensor.codec, tensor.shape).values()]
        assert [len(part) for part in parts] == [
            len(part) for part in part_of(tensor.codec, tensor.shape, chunk, segments)
        ]
        decoded = decode(tensor.codec, parts, (chunk.rows, chunk.cols))
        assert decoded.tobytes() == flat[chunk.elements(Matrix.of(tensor.shape))].tobytes()


# ---- real tools


@pytest.mark.parametrize("name", sorted(path.parent.name for path in DATA.glob("*/quant*_config.json")))
def test_layers_quantized_by_real_tools_have_the_expected_values(tmp_path, name):
    folder = DATA / name
    configs = {file: json.loads((folder / file).read_bytes()) for file in CONFIGS if (folder / file).exists()}
    tensors, warnings = found_in(open_safetensors(folder / "model.safetensors").tensors, configs, SourceOptions())
    assert warnings == []
    convert(Checkpoint(tensors), tmp_path / "a.qf", Recipe.parse(None))
    digests = json.loads((DATA / "expected.json").read_bytes())[name]
    with safe_open(tmp_path / "a.qf") as file:
        assert set(file.keys()) > set(digests)
        assert not [key for key in file.keys() if key.endswith(("qweight", "qzeros", "scales", "g_idx"))]  # noqa: SIM118
        for key, digest in digests.items():
            assert hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() == digest
            assert file.info(key).codec == "affine"
            assert file.info(key).params["sym"] is (name in {"gptqmodel-gptq4-sym", "autoround-gptq4"})
            assert file.info(key).error.rmse == 0


# ---- every layout


SCALES = st.sampled_from(["f16", "bf16", "f32"])


@st.composite
def layers(draw: Any, bits: int, cols_unit: int | None = None, rows_unit: int | None = None) -> Layer:
    rows = draw(st.integers(1, 4)) * (rows_unit or UNIT[bits])
    cols = draw(st.integers(1, 6)) * (cols_unit or UNIT[bits])
    group = draw(st.sampled_from([1, 7, 24, 32, 64, cols]))
    options = {"order": draw(st.booleans()), "sym": draw(st.booleans()), "scale": draw(SCALES)}
    return layer(bits, rows, cols, min(group, cols), seed=draw(st.integers(0, 1000)), **options)


@every_width
@given(data=st.data())
def test_gptq_layers_have_the_values_of_their_codes(bits, data):
    x = data.draw(layers(bits))
    version = data.draw(st.sampled_from(["v1", "v2"]))
    group = int(np.bincount(x.places)[0])
    tensor = only(gptq(x, bits, version), {"bits": bits, "group_size": group}, version)
    check(tensor, x.values)
    natural = np.array_equal(x.places, np.arange(x.places.size) // group)
    assert tensor.codec.act_order == (x.places.max() > 0 and (group % 32 > 0 or not natural))
    assert tensor.codec.sym == bool((x.zeros == 1 << (bits - 1)).all())
    assert tensor.codec.scale == x.scales.dtype.name
    check(only(gptq(x, bits, version), None, version), x.values)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("config", [None, {"group_size": "given"}])
def test_gptq_layers_without_g_idx_have_columns_in_order(group, config):
    x = layer(4, 16, 128, group)
    config = config and {"group_size": -1 if group == 128 else group, "desc_act": group == 128}
    tensor = only(gptq(x, 4, g_idx=False), config)
    check(tensor, x.values)
    assert tensor.codec.group == ("row" if group == 128 else group)


@pytest.mark.parametrize("model", ["gpt2", "llama", 3, ["gpt2"]])
def test_gptq_models_that_keep_matrices_transposed_give_a_warning(model):
    config = {"config.json": {"model_type": model}}
    _, warnings = found_in(sources(gptq(layer(4, 8, 64, 32), 4)), config, SourceOptions())
    assert [warning for warning in warnings if "[in, out]" in warning] == (
        ["GPTQ: models of type gpt2 keep some matrices as [in, out], and those of quantized layers are [out, in] here"]
        if model == "gpt2"
        else []
    )


def test_gptq_layers_whose_last_group_is_short_are_read():
    x = layer(4, 8, 80, 32)
    check(only(gptq(x, 4)), x.values)  # g_idx tells
    check(only(gptq(x, 4, g_idx=False), {"group_size": 32}), x.values)
    assert "the length of 3 groups in 80 columns is unknown; set group_size" in refused(gptq(x, 4, g_idx=False))


@given(x=layers(4, cols_unit=5))
def test_awq_layers_have_the_values_of_their_codes(x):
    x.places.sort()
    check(only(awq(x), {"w_bit": 4, "q_group_size": int(np.bincount(x.places)[0]), "version": "GEMM"}), x.values)


@every_width
@pytest.mark.parametrize("pack", [words_of, loose_words_of])
@given(data=st.data())
def test_compressed_tensors_layers_have_the_values_of_their_codes(bits, pack, data):
    x = data.draw(
        layers(bits, cols_unit=data.draw(st.sampled_from([31, 32, 64])), rows_unit=data.draw(st.sampled_from([1, 5])))
    )
    group = int(np.bincount(x.places)[0])
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["config_groups"] = {"group_0": {"weights": {"num_bits": bits, "group_size": group, "strategy": "group"}}}
    symmetric = bool((x.zeros == 1 << (bits - 1)).all())
    parts = compressed(x, bits, pack, zeros=not symmetric) | {"weight_g_idx": x.places.astype(np.int32)}
    tensor = only(parts, config)
    check(tensor, x.values)
    assert tensor.codec.sym == symmetric


def test_compressed_tensors_layers_without_g_idx_have_columns_in_order():
    x = layer(4, 6, 64, 32, sym=True)
    parts = compressed(x, 4, zeros=False)
    check(only(parts), x.values)
    check(only(parts | {"weight_g_idx": np.full(64, -1, np.int32)}), x.values)
    check(only(parts | {"weight_shape": np.array([6, 64], np.int32)}), x.values)


def test_compressed_tensors_zero_points_of_int8_are_read():
    x = layer(4, 6, 64, 32)
    zeros = (x.zeros - 8).astype(np.int8)
    check(only(compressed(x, 4, zeros=False) | {"weight_zero_point": zeros}), x.values)
    one = layer(4, 6, 64, 64)
    one.zeros[:] = 3
    for shape in ((), (1,), (6,), (6, 1)):
        zeros = np.full(shape, 3 - 8, np.int8)
        if shape:
            check(only(compressed(one, 4, zeros=False) | {"weight_zero_point": zeros}), one.values)
    assert "does not fit" in refused(compressed(x, 4, zeros=False) | {"weight_zero_point": np.zeros((2, 6), np.int8)})


def test_compressed_tensors_scales_for_rows_and_for_the_tensor_are_read():
    x = layer(4, 6, 64, 64, sym=True)
    for scales in (x.scales, Elements(x.scales.dtype, x.scales.data.reshape(6))):
        check(only(compressed(x, 4, zeros=False) | {"weight_scale": scales}), x.values)
    one = Elements(x.scales.dtype, x.scales.data[:1])
    for scales in (one, Elements(one.dtype, one.data.reshape(1)), Elements(one.dtype, one.data.reshape(()))):
        if scales.data.ndim:
            expected = (x.codes - 8).astype(np.float32) * one.to_f32()
            check(only(compressed(x, 4, zeros=False) | {"weight_scale": scales}), expected)


@given(data=st.data())
def test_int8_layers_have_the_values_of_their_codes(data):
    x = data.draw(layers(8, cols_unit=17, rows_unit=1))
    x.places.sort()
    signed = (x.codes - 128).astype(np.int8)
    zeros = (x.zeros - 128).astype(np.int8)
    config = {"config_groups": {"a": {"weights": {"group_size": int(np.bincount(x.places)[0])}}}}
    check(only({"weight": signed, "weight_scale": x.scales, "weight_zero_point": zeros}, config), x.values)
    x.zeros[:] = 128
    check(only({"weight": signed, "weight_scale": x.scales}, config), x.values)


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear", None])
@pytest.mark.parametrize("dtype", ["bf16", "f32", "f16"])
@pytest.mark.parametrize("shape", [(4, 32), (12, 70), (20, 1)])
def test_bitnet_layers_have_the_values_of_their_codes(monkeypatch, linear, dtype, shape):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 3 * 96)  # so that chunks lie in two quarters
    rng = np.random.default_rng(1)
    values = rng.integers(-1, 2, shape).astype(np.float32)
    quarters = (values + 1).astype(np.uint8).reshape(4, -1, shape[1])
    stored = sum(quarters[i] << 2 * i for i in range(4)).astype(np.uint8)
    scale = random_scales(rng, (1,), dtype)
    config = {"quant_method": "bitnet"} | ({"linear_class": linear, "quantization_mode": "offline"} if linear else {})
    factor = scale.to_f32()
    expected = values * factor if linear == "autobitlinear" else values / factor
    check(only({"weight": stored, "weight_scale": scale}, config), expected)


def test_layers_of_several_tools_in_one_checkpoint_are_recognized(tmp_path, monkeypatch):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 400)
    gptq_layer, awq_layer, packed_layer = layer(4, 16, 96, 32), layer(4, 24, 100, 20), layer(3, 7, 62, 31)
    bias = np.arange(16, dtype=np.float32)
    parts = [
        *sources(gptq(gptq_layer, 4) | {"bias": bias, "input_scale": bias[:1]}, "x.gptq"),
        *sources(awq(awq_layer), "x.awq"),
        *sources(compressed(packed_layer, 3), "x.packed"),
        *sources({"weight": np.ones((3, 3), np.float32)}, "x.unquantized"),
        *sources({"scales": bias, "g_idx": bias}, "x.no_layer"),
    ]
    tensors, warnings = found_in(parts, {}, SourceOptions())
    assert warnings == []
    store = [convert(Checkpoint(tensors), tmp_path / f"{jobs}.qf", Recipe.parse(None), jobs=jobs) for jobs in (1, 4)]
    assert store[0].root == store[1].root
    with safe_open(tmp_path / "1.qf") as file:
        assert sorted(file.keys()) == [
            *("x.awq.weight", "x.gptq.bias", "x.gptq.input_scale", "x.gptq.weight", "x.no_layer.g_idx"),
            *("x.no_layer.scales", "x.packed.weight", "x.unquantized.weight"),
        ]
        for name, x in (("gptq", gptq_layer), ("awq", awq_layer), ("packed", packed_layer)):
            assert file.get_tensor(f"x.{name}.weight").tobytes() == x.values.tobytes()
        assert np.array_equal(file.get_tensor("x.gptq.bias"), bias)
    convert(Checkpoint(tensors), tmp_path / "q8.qf", Recipe.parse("q8_0"))
    with safe_open(tmp_path / "q8.qf") as file:
        assert file.info("x.gptq.weight").codec == "q8_0"


def test_quantized_rows_longer_than_a_chunk_are_read(monkeypatch):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 64)
    x = layer(4, 8, 256, 32)
    check(only(gptq(x, 4)), x.values)
    check(only(awq(x)), x.values)
    check(only(compressed(x, 4)), x.values)


def test_a_quantized_layer_without_a_prefix_is_named_weight():
    x = layer(4, 8, 32, 32)
    tensors = [ArrayTensor(t.name.removeprefix("a.b."), t.elements) for t in sources(gptq(x, 4))]
    found, _ = found_in(tensors, {}, SourceOptions())
    assert [tensor.name for tensor in found] == ["weight"]


class Counted:
    """A tensor that counts how often it is read."""

    def __init__(self, tensor: ArrayTensor) -> None:
        self.tensor, self.reads = tensor, 0
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape

    def read(self, elements: slice) -> Elements:
        self.reads += 1
        return self.tensor.read(elements)


def test_a_quantized_layer_is_read_once_for_all_its_chunks(monkeypatch):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 256)
    x = layer(4, 64, 128, 32)
    tensors = [Counted(tensor) for tensor in sources(gptq(x, 4))]
    (tensor,), _ = found_in(tensors, {}, SourceOptions())
    qweight = tensors[0]
    assert qweight.reads == 0
    every = chunks_of(tensor.codec, tensor.shape)
    for passes in (1, 2):
        with ThreadPoolExecutor(4) as pool:
            encoded = list(pool.map(tensor.encoded, every))
        assert qweight.reads == passes
        assert tensor._encode is None  # nothing is kept
    codes = b"".join(parts[-1] for parts in encoded)
    assert codes == packed(x.codes, 4).tobytes()


# ---- versions of GPTQ


@every_width
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_symmetric_gptq_zeros_reveal_their_version(bits, version):
    x = layer(bits, 32, 64, 32, sym=True)
    other = "v2" if version == "v1" else "v1"
    label = {"v1": "gptq", "v2": "gptq_v2"}
    check(only(gptq(x, bits, version), {"checkpoint_format": label[version]}), x.values)
    found, warnings = recognized(gptq(x, bits, version), {"checkpoint_format": label[other], "sym": True})
    check(found[0], x.values)
    assert len(warnings) == 1
    assert f"--gptq-format {version}" in warnings[0]
    assert f"quantize_config.json says checkpoint_format '{label[other]}'" in warnings[0]
    shifted = Layer(x.codes, x.zeros + (1 if version == "v2" else -1), x.scales, x.places)
    check(only(gptq(x, bits, version), {"checkpoint_format": label[other]}, other), shifted.values)
    found, warnings = recognized(gptq(x, bits, version), {"checkpoint_format": label[other], "sym": False})
    check(found[0], shifted.values)
    assert f"--gptq-format {version} reads them as {version}" in warnings[0]


def test_gptq_layers_without_a_label_are_v1():
    x = layer(4, 32, 64, 32, sym=True)
    assert recognized(gptq(x, 4, "v1"))[1] == []
    found, warnings = recognized(gptq(x, 4, "v2"))
    check(found[0], x.values)
    assert "no file says checkpoint_format" in warnings[0]
    x = layer(4, 32, 64, 32)
    assert not np.array_equal(only(gptq(x, 4, "v2")).read(slice(0, 99)).data, x.values.reshape(-1)[:99])


@pytest.mark.parametrize(
    ("label", "version"), [("auto_round:auto_gptq", "v1"), ("auto_round:gptqmodel", "v2"), ("auto_round", "v2")]
)
def test_auto_round_labels_select_the_gptq_version(label, version):
    x = layer(4, 32, 64, 32)
    check(only(gptq(x, 4, version), {"quant_method": "auto-round", "packing_format": label}), x.values)


def test_gptq_words_that_lost_their_zeros_give_a_warning():
    x = layer(4, 32, 64, 32)
    parts = gptq(x, 4)
    parts["qzeros"][0, 0] = np.int32(-1)  # a zero of 0 in the lowest field, ORed over all others
    warnings = recognized(parts)[1]
    assert len(warnings) == 1
    assert "a.b.qzeros" in warnings[0]
    assert "AutoGPTQ" in warnings[0]
    assert recognized(parts, None, "v2")[1] == []


# ---- refusals

V1 = gptq(layer(4, 16, 64, 32), 4)
PACKED = compressed(layer(4, 16, 64, 32), 4)


def without(parts: Mapping[str, Any], role: str) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name != role}


I32 = np.int32
GROUPS_65 = {"qzeros": np.zeros((65, 2), I32), "scales": np.ones((65, 16), np.float16)}
INT8 = {"weight": np.ones((4, 4), np.int8), "weight_scale": np.ones(1, np.float32)}
MALFORMED: list[tuple[dict[str, Any], str]] = [
    (without(V1, "qzeros"), "tensor 'a.b.qzeros' is missing"),
    (without(V1, "scales"), "tensor 'a.b.scales' is missing"),
    (without(V1, "qweight"), "tensor 'a.b.qweight' is missing"),
    (V1 | {"qweight": V1["qweight"].astype(np.int64)}, "'a.b.qweight' is of dtype i64, where i32"),
    (V1 | {"qzeros": V1["qzeros"].astype(np.float32)}, "'a.b.qzeros' is of dtype f32, where i32"),
    (V1 | {"scales": np.ones((2, 16), np.int32)}, "'a.b.scales' is of dtype i32, where f16 or bf16 or f32"),
    (V1 | {"scales": np.ones((2, 16))}, "'a.b.scales' is of dtype f64"),
    (V1 | {"g_idx": np.zeros(64, np.float32)}, "'a.b.g_idx' is of dtype f32"),
    (V1 | {"g_idx": np.zeros(63, I32)}, "'a.b.g_idx' of shape [63] does not fit 'a.b.qweight'"),
    (V1 | {"g_idx": np.zeros((64, 1), I32)}, "'a.b.g_idx' has shape [64, 1]"),
    (V1 | {"g_idx": np.where(np.arange(64) == 7, -1, 0).astype(I32)}, "'a.b.g_idx': a column is in group -1 of 2"),
    (V1 | {"g_idx": np.where(np.arange(64) == 7, 2, 0)}, "'a.b.g_idx': a column is in group 2 of 2"),
    (V1 | {"qweight": np.zeros((0, 16), I32)}, "'a.b.qweight' has shape [0, 16]"),
    (V1 | {"qweight": np.zeros((8, 0), I32)}, "'a.b.qweight' has shape [8, 0]"),
    (V1 | {"qweight": np.zeros(16, I32)}, "'a.b.qweight' has shape [16]"),
    (V1 | {"qzeros": np.zeros((3, 2), I32)}, "'a.b.qzeros' of shape [3, 2] does not fit 'a.b.scales'"),
    (V1 | {"qzeros": np.zeros((2, 1), I32)}, "'a.b.g_idx' of shape [64] does not fit"),
    (gptq(layer(4, 16, 64, 32), 4) | {"qzeros": np.zeros((2, 7), I32)}, "14-bit codes, but only 2, 3, 4 and 8 bits"),
    (gptq(layer(4, 32, 64, 32), 4) | {"qzeros": np.zeros((2, 5), I32)}, "5-bit codes, but only 2, 3, 4 and 8 bits"),
    (gptq(layer(3, 32, 64, 32), 3) | {"qweight": np.zeros((7, 32), I32)}, "'a.b.qweight' of shape [7, 32] does not"),
    (without(V1, "g_idx") | GROUPS_65, "'a.b.scales': there are scales for 65 groups in rows of 64 columns"),
    (awq(layer(4, 16, 64, 32)) | {"qzeros": np.zeros((2, 3), I32)}, "'a.b.qzeros' of shape [2, 3] does not fit"),
    (without(awq(layer(4, 16, 64, 32)), "qzeros"), "tensor 'a.b.qzeros' is missing"),
    (without(PACKED, "weight_shape"), "tensor 'a.b.weight_shape' is missing"),
    (without(PACKED, "weight_scale"), "tensor 'a.b.weight_scale' is missing"),
    (PACKED | {"weight_shape": np.array([16, -64])}, "'a.b.weight_shape' says shape [16, -64]"),
    (PACKED | {"weight_shape": np.array([17, 64])}, "'a.b.weight_shape' says shape [17, 64]"),
    (PACKED | {"weight_shape": np.array([16, 64, 1])}, "'a.b.weight_shape' says shape [16, 64, 1]"),
    (PACKED | {"weight_shape": np.array([16, 2**62])}, "no number of bits puts"),
    (PACKED | {"weight_packed": np.zeros((16, 10), I32)}, "'a.b.weight_packed' has codes of 5 bits"),
    (PACKED | {"weight_packed": np.zeros((16, 80), I32)}, "no number of bits puts 64 columns into 80 words"),
    (PACKED | {"weight_scale": np.ones((15, 2), np.float32)}, "'a.b.weight_scale' has shape [15, 2]"),
    (PACKED | {"weight_scale": np.ones((16, 2, 1), np.float32)}, "'a.b.weight_scale' has shape [16, 2, 1]"),
    (PACKED | {"weight_scale": np.ones((16, 3), np.float32)}, "the length of 3 groups in 64 columns is unknown"),
    (PACKED | {"weight_zero_point": np.zeros((3, 2), I32)}, "'a.b.weight_zero_point' of shape [3, 2] does not fit"),
    (PACKED | {"weight_zero_point": np.zeros((2, 2), np.int8)}, "'a.b.weight_zero_point' of shape [2, 2] does not fit"),
    (PACKED | {"weight_zero_point": np.zeros((0, 2), I32)}, "it has no elements"),
    (PACKED | {"weight_g_idx": np.full(64, 2, I32)}, "'a.b.weight_g_idx': a column is in group 2 of 2"),
    (INT8 | {"weight_scale": np.ones((5, 1), np.float32)}, "'a.b.weight_scale' has shape"),
    (INT8 | {"weight_zero_point": np.ones(3, np.int8)}, "'a.b.weight_zero_point' of shape [3] does not fit"),
    (INT8 | {"weight": np.ones((4, 4), np.uint8)}, "only config.json says whether"),
]


@pytest.mark.parametrize(("parts", "message"), MALFORMED, ids=[message[:50] for _, message in MALFORMED])
def test_malformed_quantized_layers_are_refused(parts, message):
    assert message in refused(parts)


def test_ambiguous_packings_are_decided_by_width_or_refused():
    x = layer(3, 4, 15, 15)
    config = {"config_groups": {"a": {"weights": {"num_bits": 3}}}}
    assert "old and new versions pack 15 columns into 2 words" in refused(compressed(x, 3), config)
    assert "set num_bits in config.json" in refused(compressed(layer(4, 4, 3, 3), 4))


SAYS = "quantize_config.json says"
CONFIG: list[tuple[Any, str]] = [
    ({"bits": 8}, "tensor 'a.b.qzeros': its shape means bits 4, but quantize_config.json says bits 8"),
    ({"bits": "4"}, "says bits '4'"),
    ({"bits": True}, "says bits True"),
    ({"bits": [4] * 9}, "says bits a list"),
    ({"group_size": 64}, f"'a.b.scales' has scales for 2 groups in rows of 64 columns, but {SAYS} group_size 64"),
    ({"group_size": -1}, "says group_size -1"),
    ({"group_size": 0}, "says group_size 0"),
    ({"quant_method": "awq"}, f"its shape means GPTQ's layout, but {SAYS} quant_method 'awq'"),
    ({"quant_method": ["gptq"]}, "says quant_method a list"),
    ({"checkpoint_format": "gemm"}, f"its shape means GPTQ's layout, but {SAYS} checkpoint_format 'gemm'"),
]


@pytest.mark.parametrize(("config", "message"), CONFIG)
def test_configurations_that_contradict_the_tensors_are_refused(config, message):
    assert message in refused(V1, config)


def test_configuration_files_that_contradict_each_other_are_refused():
    parts = sources(V1)
    ask = SourceOptions()
    inner = {"quantization_config": {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}}
    assert found_in(parts, {"config.json": inner, "quantize_config.json": {"bits": 4}}, ask)
    wrong = {"config.json": inner, "quantize_config.json": {"group_size": 16}}
    with pytest.raises(SourceError, match=f"{SAYS} group_size 16, but config.json says group_size 32"):
        found_in(parts, wrong, ask)
    wrong = {"config.json": inner, "quantize_config.json": {"checkpoint_format": "gptq_v2"}}
    with pytest.raises(SourceError, match=r"says checkpoint_format 'gptq_v2', but config.json says .* 'gptq'"):
        found_in(parts, wrong, ask)
    assert found_in(parts, wrong, SourceOptions(gptq_format="v1"))[1] == []


def test_gptq_layers_may_differ_as_the_configuration_says():
    x = layer(8, 16, 64, 16)
    config = {"bits": 4, "group_size": 32, "dynamic": {"+:.*b": {"bits": 8, "group_size": 16}}}
    check(only(gptq(x, 8), config), x.values)
    assert "says bits 4" in refused(gptq(x, 8), without(config, "dynamic"))


def test_a_missing_g_idx_is_refused_if_the_configuration_requires_it():
    assert "'a.b.g_idx' is missing, though" in refused(without(V1, "g_idx"), {"desc_act": True})


def test_compressed_tensors_that_contradict_the_configuration_are_refused():
    for bits, message in ((8, "mean 4 bits, but the configuration says num_bits 8"), (5, "num_bits 5")):
        config = {"format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": bits}}}}
        assert message in refused(PACKED, config)
    config = {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 128}}}}
    assert "groups of 32, but the configuration says group_size 128" in refused(PACKED, config)
    assert "format 'nvfp4-pack-quantized', which is not known" in refused(PACKED, {"format": "nvfp4-pack-quantized"})
    assert "compressed-tensors' layout, but quantize_config.json says quant_method 'gptq'" in refused(
        PACKED, {"quant_method": "gptq"}
    )


def test_bitnet_models_quantized_on_the_fly_are_refused():
    parts = {"weight": np.ones((4, 4), np.uint8), "weight_scale": np.ones(1, np.float32)}
    config = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    assert "quantization_mode 'online'" in refused(parts, config)
    assert "linear_class 'new'" in refused(parts, {"quant_method": "bitnet", "linear_class": "new"})
    assert "says quant_method 'gptq'" in refused(parts, {"quant_method": "gptq"})


def test_bitnet_layers_divided_by_a_zero_scale_are_refused(tmp_path):
    parts = {"weight": np.ones((4, 4), np.uint8), "weight_scale": np.zeros(1, np.float32)}
    tensor = only(parts, {"quant_method": "bitnet"})
    with pytest.raises(SourceError, match=r"tensor 'a.b.weight' holds NaN or infinity"):
        convert(Checkpoint([tensor]), tmp_path / "a.qf", Recipe.parse(None))


WORDS = st.sampled_from(["gptq", "awq", "4", "128x128", "row", "online"])
INNER_KEYS = st.sampled_from(["weights", "num_bits", "group_size", "block_structure", "a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    *("bits", "group_size", "quant_method", "method", "checkpoint_format", "format", "version", "desc_act", "sym"),
    *(
        "dynamic",
        "config_groups",
        "weight_block_size",
        "linear_class",
        "quantization_mode",
        "packing_format",
        "is_marlin_format",
    ),
)


@given(config=st.dictionaries(st.sampled_from(KEYS), JSON), text=JSON)
def test_any_configuration_is_read_or_refused(config, text):
    float8 = Elements(DTYPES["f8_e4m3"], np.zeros((128, 256), np.uint8))
    for parts in (
        V1,
        PACKED,
        awq(layer(4, 8, 32, 32)),
        {"weight": np.ones((4, 4), np.uint8), "weight_scale": np.ones(1, np.float32)},
        {"weight": float8, "weight_scale_inv": np.ones((1, 2), np.float32)},
    ):
        outer = {"quantization_config": config, "text_config": text, "compression_config": text}
        with suppress(SourceError):
            found_in(sources(parts), {"config.json": outer, "quantize_config.json": config}, SourceOptions())


def save(folder: Path, parts: Mapping[str, Any], config: Any) -> Path:
    return model(folder, parts, config=config if isinstance(config, str) else json.dumps(config))


def types(request: Request) -> dict[str, str]:
    return {plan.source.name: str(plan.encoder) for plan in request.plans()}


def test_a_configuration_that_is_no_json_is_refused(tmp_path):
    parts = {f"a.{role}": part for role, part in gptq(layer(4, 8, 64, 32), 4).items() if role != "scales"}
    parts["a.scales"] = np.ones((2, 8), np.float16)
    source = save(tmp_path / "m", parts, '{"quantization_config": {"quant_method": "gptq", "checkpoint_f')
    with pytest.raises(SourceError, match=r"config\.json: cannot be read as JSON"):
        open_checkpoint(source)
    assert len(open_checkpoint(save(tmp_path / "unquantized", {"a": np.ones((2, 2), np.float32)}, "{")).tensors) == 1


def test_pruning_quantized_tensors_requires_a_type():
    source = str(DATA / "gptqmodel-gptq4-sym")
    with pytest.raises(TypeSpecError, match="is quantized already, and float32 once it is pruned"):
        Request(source, prune=0.5).open()
    for request in (
        Request(source, prune=0.5, type="q4_0"),
        Request(source, prune=0.5, overrides=("*proj.weight=q4_0",)),
    ):
        assert types(request)["model.layers.0.self_attn.q_proj.weight"] == "q4_0"
