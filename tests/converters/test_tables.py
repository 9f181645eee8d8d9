"""Layers whose codes select entries of a table, packed here bit by bit: bitsandbytes, NVFP4, MXFP4."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import safe_open
from qformat.codecs.codebook import Codebook
from qformat.codecs.layout import Matrix
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.quantized.recognize import recognize
from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.safetensors import open_safetensors
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, QuantizedSource
from tests.helpers.codecs import chunks_of, decode

DATA = Path(__file__).parents[1] / "data" / "tables"
RNG = np.random.default_rng(0)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Tables of bitsandbytes, as its kernels have them; files have 0.0 for -0.0
MAPS = {
    "nf4": "-1.0 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0.0 0.0795803 0.1609302 0.2461123"
    " 0.33791524 0.44070983 0.562617 0.72295684 1.0",
    "fp4": "0.0 0.0052083335 0.6666667 1.0 0.33333334 0.5 0.16666667 0.25 -0.0 -0.0052083335 -0.6666667 -1.0 -0.33333334 -0.5"
    " -0.16666667 -0.25",
}
TABLES = {kind: np.array(text.split(), np.float32) for kind, text in MAPS.items()}


def scales(*shape: int) -> np.ndarray:
    return (np.random.default_rng(2).random(shape) + 0.5).astype(np.float32)


def eights(name: str, data: np.ndarray) -> Elements:
    return Elements(DTYPES[name], data.astype(np.uint8))


def halves(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Return two codes in each byte."""
    flat = codes.reshape(-1).astype(np.uint8)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    first, second = flat[0::2], flat[1::2]
    return (first << 4 | second) if high_first else (first | second << 4)


def found_in(parts: dict[str, Any], config: Any = None, metadata: Any = None) -> Any:
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(np.asarray(part)))
        for name, part in parts.items()
    ]
    configs = {"config.json": {"quantization_config": config}} if config else {}
    return recognize(tensors, configs, SourceOptions(), metadata or {})


def only(parts: dict[str, Any], config: Any = None, metadata: Any = None) -> Any:
    found = found_in(parts, config, metadata)
    assert found.warnings == []
    (tensor,) = found.tensors
    assert isinstance(tensor, QuantizedSource)
    return tensor


def check(tensor: Any, expected: np.ndarray) -> None:
    """Compare the values of a tensor read whole, in part and chunk by chunk."""
    expected = expected.astype(np.float32)
    assert tensor.shape == expected.shape
    flat = expected.reshape(-1)
    assert tensor.read(slice(0, flat.size)).data.tobytes() == flat.tobytes()
    start, stop = flat.size // 3, flat.size - flat.size // 5
    assert tensor.read(slice(start, stop)).data.tobytes() == flat[start:stop].tobytes()
    matrix = Matrix.of(tensor.shape)
    for chunk in chunks_of(tensor.codec, tensor.shape):
        decoded = decode(tensor.codec, tensor.encoded(chunk), chunk.shape)
        assert decoded.tobytes() == flat[chunk.elements(matrix)].tobytes()


# ---- real tools


def test_layers_quantized_by_real_tools_have_the_values_that_these_compute(tmp_path):
    found = recognize(open_safetensors(DATA / "layers.safetensors").tensors, {}, SourceOptions(), {})
    assert found.warnings == []
    digests = json.loads((DATA / "expected.json").read_bytes())
    assert {tensor.name for tensor in found.tensors} == set(digests)
    convert(Checkpoint(found.tensors), tmp_path / "a.qf", Recipe.parse(None))
    with safe_open(tmp_path / "a.qf") as file:
        for name, digest in digests.items():
            assert file.info(name).codec in ("codebook", "fp8")
            assert file.info(name).error.rmse == 0
            assert hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() == digest, name


# ---- bitsandbytes


def state(kind: str, shape: Any, block: int, nested: Any = None, **changes: Any) -> np.ndarray:
    content = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        content |= {"nested_blocksize": nested[0], "nested_dtype": "float32", "nested_offset": nested[1]}
    return np.frombuffer(json.dumps(content | changes).encode(), np.uint8)


def four_bit(
    kind: str = "nf4", shape: tuple[int, ...] = (8, 64), block: int = 64, *, nested: bool = False, **changes: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the parts of a layer and its values."""
    count = int(np.prod(shape))
    rng = np.random.default_rng(count + block)
    codes, blocks = rng.integers(0, 16, count), -(-count // block)
    absmax = rng.random(blocks).astype(np.float32) + np.float32(0.1)
    parts: dict[str, Any] = {"weight.absmax": absmax, "weight.quant_map": TABLES[kind] + np.float32(0)}
    inner = None
    if nested:
        inner = (16, 0.0123456789)
        stored, table = rng.integers(0, 256, blocks), rng.random(256).astype(np.float32)
        outer = rng.random(-(-blocks // 16)).astype(np.float32)
        absmax = np.array([table[code] * outer[i // 16] + np.float32(inner[1]) for i, code in enumerate(stored)])
        parts |= {
            "weight.absmax": stored.astype(np.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }
    parts["weight"] = halves(codes, high_first=True)[:, None]
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = state(kind, shape, block, inner, **changes)
    values = np.array([TABLES[kind][code] * absmax[i // block] for i, code in enumerate(codes)], np.float32)
    return {f"a.b.{role}": part for role, part in parts.items()}, values.reshape(shape)


CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((8, 64), 64), ((8, 128), 32), ((30, 50), 64), ((7, 33), 64), ((3, 100), 4096), ((2, 5, 64), 64), ((200,), 64)],
)
def test_four_bit_layers_of_bitsandbytes_have_its_values(kind, shape, block, nested, monkeypatch):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 300)
    parts, values = four_bit(kind, shape, block, nested=nested)
    tensor = only(parts, CONFIG | {"bnb_4bit_quant_type": kind})
    assert tensor.codec.flat == (len(shape) > 1 and np.prod(shape[1:]) % block > 0)
    check(tensor, values)
    check(only(parts), values)


def test_four_bit_codes_may_be_stored_in_elements_of_any_dtype_and_shape():
    parts, values = four_bit()
    stored = parts["a.b.weight"]
    for other in (
        stored.reshape(1, -1),
        stored.reshape(-1).view(np.float32)[:, None],
        stored.reshape(-1).view(np.int8),
    ):
        check(only(parts | {"a.b.weight": other}, CONFIG), values)
    check(only(parts | {"a.b.weight": Elements(DTYPES["bf16"], stored.reshape(-1).view(np.uint16)[:, None])}), values)


STATE = "a.b.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.b.weight.absmax": scales(7)}, "'a.b.weight.absmax' has 7 numbers, where 8 are needed for shape [8, 64]"),
        ({"a.b.weight.absmax": np.zeros(8, np.uint8)}, "'a.b.weight.absmax' is of dtype u8, where f32"),
        ({"a.b.weight.quant_map": TABLES["fp4"]}, "'a.b.weight.quant_map' is not the table of nf4"),
        ({"a.b.weight.quant_map": np.full(16, np.nan, np.float32)}, "'a.b.weight.quant_map' is not the table of nf4"),
        (
            {"a.b.weight": np.zeros((255, 1), np.uint8)},
            "'a.b.weight' of 255 bytes does not hold the codes of shape [8, 64]",
        ),
        ({STATE: np.zeros(9, np.uint8)}, "is no state of nf4 codes that is understood"),
        ({STATE: state("fp4", (8, 64), 64)}, "is no state of nf4 codes"),
        ({STATE: state("nf4", (8, 64), 64, more=1)}, "is no state of nf4 codes"),
        ({STATE: state("nf4", (8, 64), 7)}, "is no state of nf4 codes"),
        ({STATE: state("nf4", (8, 64), True)}, "is no state of nf4 codes"),
        ({STATE: state("nf4", (8, -64), 64)}, "is no state of nf4 codes"),
        ({STATE: state("nf4", (8, 64), 64, (16, 0.5))}, "is no state of nf4 codes"),
        ({STATE: np.frombuffer(b"[1]", np.uint8)}, "is no state of nf4 codes"),
        ({STATE: np.frombuffer(b"[" * 60000, np.uint8)}, "is no state of nf4 codes"),
        ({"a.b.weight.quant_state.bitsandbytes__fp4": state("fp4", (8, 64), 64)}, "has both nf4 and fp4 states"),
    ],
)
def test_four_bit_layers_with_parts_that_do_not_match_are_refused(changes, message):
    with pytest.raises(SourceError) as caught:
        found_in(four_bit()[0] | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["absmax", "quant_map"])
def test_four_bit_layers_without_a_part_are_refused(part):
    parts, _ = four_bit()
    del parts[f"a.b.weight.{part}"]
    with pytest.raises(
        SourceError, match=f"'a.b.weight.{part}' is missing, without which 'a.b.weight' cannot be decoded"
    ):
        found_in(parts)


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, CONFIG | {"bnb_4bit_quant_type": "fp4"}])
def test_four_bit_layers_that_contradict_the_configuration_are_refused(config):
    with pytest.raises(SourceError, match=r"'a\.b\.weight': its shape means .* correct the one that is wrong"):
        found_in(four_bit()[0], config)


@given(st.integers(1, 20), st.integers(1, 80), st.integers(0, 50))
def test_eight_bit_layers_of_bitsandbytes_are_rounded_as_it_does(rows, cols, seed):
    rng = np.random.default_rng(seed)
    codes, scb = rng.integers(-128, 128, (rows, cols)).astype(np.int8), rng.random(rows).astype(np.float32)
    parts = {"a.weight": codes, "a.SCB": scb, "a.weight_format": np.array(0, np.uint8)}
    values = (codes.astype(np.float32) * scb[:, None]) * np.float32(7.874015718698502e-3)
    check(only(parts, {"quant_method": "bitsandbytes", "load_in_8bit": True}), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.SCB": scales(3)}, "'a.SCB' of shape [3] does not fit 'a.weight' of shape [4, 8]"),
        ({"a.weight_format": np.array(2, np.uint8)}, "'a.weight_format' means codes in the order of a certain kernel"),
        ({"a.SCB": np.ones(4, np.float16)}, "'a.SCB' is of dtype f16, where f32 is needed"),
    ],
)
def test_eight_bit_layers_with_parts_that_do_not_match_are_refused(changes, message):
    parts = {"a.weight": np.zeros((4, 8), np.int8), "a.SCB": scales(4)}
    with pytest.raises(SourceError) as caught:
        found_in(parts | changes)
    assert message in str(caught.value)


# ---- four-bit floats


def packed_rows(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    return halves(codes, high_first=high_first).reshape(*codes.shape[:-1], codes.shape[-1] // 2)


def e4m3(data: np.ndarray) -> np.ndarray:
    return eights("f8_e4m3", data).to_f32()


@pytest.mark.parametrize("shape", [(5, 48), (160, 128), (3, 4, 32)])
def test_nvfp4_scales_are_multiplied_or_divided_as_the_tool_does(shape):
    codes, small = RNG.integers(0, 16, shape), RNG.integers(1, 0x7F, (*shape[:-1], shape[-1] // 16))
    factor = np.array([0.037], np.float32)
    stored = {"a.weight_packed": packed_rows(codes), "a.weight_scale": eights("f8_e4m3", small)}
    divided = E2M1[codes] * np.repeat(e4m3(small) / factor, 16, axis=-1)
    tensor = only(stored | {"a.weight_global_scale": factor}, {"quant_method": "compressed-tensors"})
    assert tensor.codec == Codebook(4, 16, scale="f8_e4m3", factor="divisor")
    check(tensor, divided)
    parts = {"a.weight": packed_rows(codes), "a.weight_scale": stored["a.weight_scale"]}
    for number in (factor, factor[0]):
        check(only(parts | {"a.weight_scale_2": number}), E2M1[codes] * np.repeat(e4m3(small) * factor, 16, axis=-1))


def test_comfyui_nvfp4_has_another_order_of_codes_and_scales():
    from tests.converters.test_scaled_fp8 import swizzled, told

    codes, small, factor = RNG.integers(0, 16, (160, 96)), RNG.integers(1, 0x7F, (160, 6)), np.float32(0.037)
    parts = {
        "a.weight": packed_rows(codes, high_first=True),
        "a.weight_scale": eights("f8_e4m3", swizzled(small)),
        "a.weight_scale_2": factor,
        "a.comfy_quant": told(format="nvfp4"),
    }
    check(only(parts), E2M1[codes] * np.repeat(e4m3(small) * factor, 16, axis=1))
    with pytest.raises(SourceError, match=r"'a.weight_scale' of shape \[256, 8\] does not fit"):
        found_in({name: part for name, part in parts.items() if name != "a.comfy_quant"})


@pytest.mark.parametrize("dtype", ["u8", "f8_e8m0"])
def test_mxfp4_scales_are_powers_of_two(dtype):
    codes, exponents = RNG.integers(0, 16, (9, 96)), RNG.integers(90, 150, (9, 3))
    exponents[0] = (0, 1, 252)  # a larger one may overflow
    values = E2M1[codes] * np.repeat(np.ldexp(np.float32(1), exponents - 127), 32, axis=1)
    parts = {"a.weight_packed": packed_rows(codes), "a.weight_scale": eights(dtype, exponents)}
    check(only(parts, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}), values)
    signed = {"a.weight": packed_rows(codes).view(np.int8)}
    for role in ("scale", "weight_scale_inv"):
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        check(only(signed | {f"a.{role}": eights("f8_e8m0", exponents)}, config), values)


def test_gpt_oss_experts_are_the_transposed_matrices_that_models_take(tmp_path, monkeypatch):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 7000)
    codes, exponents = RNG.integers(0, 16, (3, 40, 64)), RNG.integers(100, 140, (3, 40, 2))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {
        f"{name}_blocks": packed_rows(codes).reshape(3, 40, 2, 16),
        f"{name}_scales": exponents.astype(np.uint8),
        f"{name}_bias": scales(3, 40),
    }
    values = E2M1[codes] * np.repeat(np.ldexp(np.float32(1), exponents - 127), 32, axis=2)
    found = found_in(parts, {"quant_method": "mxfp4"})
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert sorted(tensors) == [name, f"{name}_bias"]
    check(tensors[name], np.ascontiguousarray(values.transpose(0, 2, 1)))
    convert(Checkpoint(found.tensors), tmp_path / "a.qf", Recipe.parse(None))
    with safe_open(tmp_path / "a.qf") as file:
        assert np.array_equal(file.get_tensor(name), values.transpose(0, 2, 1))
        assert np.array_equal(file.get_rows(name, [2, 0]), values.transpose(0, 2, 1)[[2, 0]])


def test_experts_of_openais_own_files_are_matrices_as_they_are():
    codes, exponents = RNG.integers(0, 16, (2, 12, 64)), RNG.integers(100, 140, (2, 12, 2))
    name = "block.0.mlp.mlp1_weight"
    parts = {f"{name}.blocks": packed_rows(codes).reshape(2, 12, 2, 16), f"{name}.scales": exponents.astype(np.uint8)}
    tensor = only(parts)
    assert tensor.name == name
    check(tensor, E2M1[codes] * np.repeat(np.ldexp(np.float32(1), exponents - 127), 32, axis=2))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"w_blocks": np.zeros((2, 4, 2, 15), np.uint8), "w_scales": np.zeros((2, 4, 2), np.uint8)},
            "'w_blocks' of shape [2, 4, 2, 15] does not fit 'w_scales'",
        ),
        (
            {"w_blocks": np.zeros((2, 4, 2, 16), np.uint8), "w_scales": np.zeros((2, 4, 3), np.uint8)},
            "does not fit 'w_scales' of shape [2, 4, 3]",
        ),
        (
            {"a.weight_packed": np.zeros((4, 16), np.uint8), "a.weight_scale": np.zeros((4, 2), np.uint8)},
            "'a.weight_scale' of shape [4, 2] does not fit 'a.weight_packed' of shape [4, 16]",
        ),
    ],
)
def test_four_bit_floats_with_parts_that_do_not_match_are_refused(parts, message):
    with pytest.raises(SourceError) as caught:
        found_in(parts)
    assert message in str(caught.value)


def test_exponents_that_are_no_number_are_refused(tmp_path):
    parts = {"a.weight_packed": np.zeros((4, 16), np.uint8), "a.weight_scale": np.full((4, 1), 255, np.uint8)}
    with pytest.raises(SourceError, match=r"tensor 'a\.weight' holds NaN or infinity"):
        convert(Checkpoint([only(parts)]), tmp_path / "a.qf", Recipe.parse(None))


@pytest.mark.parametrize("number", [(2,), (2, 1, 1)])
def test_nvfp4_experts_with_factors_of_their_own_are_kept(number):
    parts = {
        "a.weight": packed_rows(RNG.integers(0, 16, (2, 4, 32))),
        "a.weight_scale": eights("f8_e4m3", np.ones((2, 4, 2))),
        "a.weight_scale_2": scales(*number),
    }
    found = found_in(parts)
    assert sorted(tensor.name for tensor in found.tensors) == sorted(parts)
    assert not any(isinstance(tensor, QuantizedSource) for tensor in found.tensors)


# ---- what holds for all of them


def every_layer() -> dict[str, dict[str, Any]]:
    """Return a layer of each tool, as it was saved."""
    layers: dict[str, dict[str, Any]] = {}
    for tensor in open_safetensors(DATA / "layers.safetensors").tensors:
        prefix = tensor.name.split(".weight")[0] if ".weight" in tensor.name else tensor.name.rpartition(".")[0]
        if not prefix.startswith("experts"):
            layers.setdefault(prefix, {})[tensor.name] = tensor.read(slice(0, int(np.prod(tensor.shape))))
            data = layers[prefix][tensor.name]
            layers[prefix][tensor.name] = Elements(data.dtype, data.data.reshape(tensor.shape))
    return layers


@pytest.mark.parametrize("name", every_layer())
@pytest.mark.parametrize("role", ["pre_quant_scale", "weight_offset", "weight_perm", "codebook"])
def test_parts_that_are_not_understood_refuse_a_layer(name, role):
    parts = every_layer()[name]
    assert all(isinstance(tensor, QuantizedSource) for tensor in found_in(parts).tensors)
    with pytest.raises(SourceError, match=rf"'{re.escape(name)}\.{role}' belongs to a layer in the format"):
        found_in(parts | {f"{name}.{role}": scales(64)})


@pytest.mark.parametrize("name", every_layer())
def test_biases_and_scales_of_inputs_do_not_matter(name):
    others = {f"{name}.bias": scales(16), f"{name}.input_scale": scales()}
    found = {tensor.name: tensor for tensor in found_in(every_layer()[name] | others).tensors}
    assert sorted(found) == sorted([*others, f"{name}.weight"])
    assert isinstance(found[f"{name}.weight"], QuantizedSource)


def test_layers_convert_to_types_for_weights_from_their_values(tmp_path):
    parts, values = four_bit()
    convert(Checkpoint(found_in(parts).tensors), tmp_path / "a.qf", Recipe.parse("f32"))
    convert(Checkpoint(found_in(parts).tensors), tmp_path / "b.qf", Recipe.parse("q8_0"))
    with safe_open(tmp_path / "a.qf") as a, safe_open(tmp_path / "b.qf") as b:
        assert a.get_tensor("a.b.weight").tobytes() == values.tobytes()
        assert 0 < np.abs(b.get_tensor("a.b.weight") - values).max() < 0.01


@pytest.mark.parametrize("parts", [four_bit()[0], {"a.b.weight": np.ones((4, 8), np.int8), "a.b.SCB": scales(4)}])
def test_matrices_that_a_model_keeps_the_other_way_round_are_warned_of(parts):
    tensors = [
        ArrayTensor(name, part if isinstance(part, Elements) else from_array(np.asarray(part)))
        for name, part in parts.items()
    ]
    found = recognize(tensors, {"config.json": {"model_type": "gpt2"}}, SourceOptions(), {})
    (warning,) = found.warnings
    assert "models of type gpt2 keep some matrices as [in, out], and those of quantized layers are [out, in]" in warning
