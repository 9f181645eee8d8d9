"""Layers of integers whose scales and zeros are floats, packed here by hand, have the values that their tools compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open as safetensors_open

from qformat import safe_open
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.quantized.recognize import Recognized, recognize
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.options import SourceOptions
from qformat.dtypes import BF16, DTYPES, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, QuantizedSource
from tests.helpers.quantized import random_scales, words_of

DATA = Path(__file__).parents[1] / "data" / "quantized"
TOOLS = ("mlx", "hqq", "quanto", "torchao")
Parts = Mapping[str, Any]

# ---- checks


def elements(part: Any) -> Elements:
    return part if isinstance(part, Elements) else from_array(np.asarray(part))


def found(parts: Parts, config: Any = None, metadata: Any = None, name: str = "a.b") -> Recognized:
    sources = [ArrayTensor(f"{name}.{role}", elements(part)) for role, part in parts.items()]
    return recognize(sources, {"config.json": config or {}}, SourceOptions(), metadata)


def only(*arguments: Any, **options: Any) -> Any:
    result = found(*arguments, **options)
    assert result.warnings == []
    (tensor,) = result.tensors
    assert isinstance(tensor, QuantizedSource)
    assert tensor.name == "a.b.weight"
    return tensor


def stored(tensor: Any, folder: Path) -> np.ndarray:
    """Store a tensor and read it, by both readers of containers."""
    convert(Checkpoint([tensor]), folder / "x.qf", Recipe.parse(None), overwrite=True)
    with safe_open(folder / "x.qf") as file:
        assert file.info(tensor.name).error.rmse == 0
        return file.get_tensor(tensor.name)


def check(tensor: Any, values: np.ndarray, folder: Path | None = None) -> None:
    assert values.dtype == np.float32
    assert tensor.shape == values.shape
    flat = values.reshape(-1)
    assert tensor.read(slice(0, flat.size)).data.tobytes() == flat.tobytes()
    start, stop = flat.size // 3, flat.size - flat.size // 5
    assert tensor.read(slice(start, stop)).data.tobytes() == flat[start:stop].tobytes()
    if folder:
        assert stored(tensor, folder).tobytes() == values.tobytes()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        found(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(parts: Parts, *arguments: Any, **options: Any) -> str:
    """Assert that all parts of a layer are left as they are, and return the warnings."""
    result = found(parts, *arguments, **options)
    assert sorted(tensor.name for tensor in result.tensors) == sorted(f"a.b.{role}" for role in parts)
    assert not any(hasattr(tensor, "codec") for tensor in result.tensors)
    assert result.layers
    return "; ".join(result.warnings)


def replaced(parts: Parts, **changes: Any) -> Parts:
    """Return parts with others in their place; without those that are None."""
    return {role: part for role, part in {**parts, **changes}.items() if part is not None}


def each(numbers: Elements, cols: int) -> np.ndarray:
    """Return the number of each column, given those of groups."""
    values = numbers.to_f32()
    return np.repeat(values, cols // values.shape[-1], axis=-1)


# ---- real tools


@pytest.mark.parametrize("tool", TOOLS)
def test_layers_of_mlx_hqq_quanto_and_torchao_have_the_values_that_the_tools_compute(tmp_path, tool):
    digests = json.loads((DATA / "expected.json").read_bytes())[tool]
    checkpoint = open_checkpoint(DATA / tool)
    assert checkpoint.warnings == []
    convert(checkpoint, tmp_path / "x.qf", Recipe.parse(None))
    with safe_open(tmp_path / "x.qf") as file:
        rest = [name for name in file.keys() if name not in digests]  # noqa: SIM118  no mapping
        assert all(name.endswith((".bias", ".input_scale", ".output_scale")) for name in rest)
        for name, digest in digests.items():
            assert hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() == digest, name
            assert file.info(name).error.rmse == 0


# ---- MLX


def mlx(rows: Any, cols: int, bits: int, group: int, dtype: str = "bf16", seed: int = 0) -> tuple[Parts, np.ndarray]:
    rng = np.random.default_rng(seed)
    lead = rows if isinstance(rows, tuple) else (rows,)
    codes = rng.integers(0, 1 << bits, (*lead, cols))
    words = np.array([words_of(row, bits) for row in codes.reshape(-1, cols)], np.uint32).reshape(*lead, -1)
    scales, biases = (random_scales(rng, (*lead, cols // group), dtype) for _ in range(2))
    values = codes.astype(np.float32) * each(scales, cols) + each(biases, cols)
    return {"weight": words, "scales": scales, "biases": biases}, values


def settings(bits: Any = 4, group: Any = 64, **more: Any) -> dict[str, Any]:
    return {"quantization": {"group_size": group, "bits": bits, **more}}


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["f16", "bf16", "f32"]),
    rows=st.sampled_from([1, 5, (2, 3)]),
)
def test_mlx_layers_have_the_values_of_their_codes(bits, group, dtype, rows):
    parts, values = mlx(rows, 256, bits, group, dtype)
    check(only(parts, settings(bits, group)), values)


def test_mlx_layers_may_have_bits_of_their_own(tmp_path):
    parts, values = mlx(4, 128, 6, 32)
    config = settings(4, 64, **{"a.b": {"bits": 6, "group_size": 32}, "a.c": False})
    config["quantization_config"] = config["quantization"]
    check(only(parts, config), values, tmp_path)
    parts, values = mlx(4, 128, 8, 64)
    check(only(parts, settings(4, 32, mode="mxfp4", **{"a.b": {"bits": 8}})), values)


def test_mlx_layers_without_a_configuration_are_kept():
    parts, _ = mlx(4, 128, 4, 64)
    assert "only config.json says bits: give the checkpoint's directory" in kept(parts)


def test_several_layers_that_are_kept_are_one_warning_of_each_kind():
    parts, _ = mlx(4, 128, 4, 64)
    sources = [ArrayTensor(f"{n}.{role}", elements(part)) for n in "abc" for role, part in parts.items()]
    warnings = recognize(sources, {}, SourceOptions()).warnings
    assert [warning[:9] for warning in warnings] == ["layer 'a'", "layer 'a'"]
    assert warnings[0].endswith("kept as it is (and so are 2 more)")


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, settings(8), "config.json says bits 8"),
        ({}, settings(4, 32), "config.json says bits 4"),
        ({}, settings(7), "says bits 7"),
        ({}, settings("4"), "says bits '4'"),
        ({}, settings(4, 0), "says group_size 0"),
        ({}, settings(4, 64, mode="mxfp4"), "says mode 'mxfp4'"),
        ({}, settings(4, 64, **{"a.b": False}), "says a.b False"),
        ({"scales": np.ones((4, 3), np.float32)}, settings(), "does not fit"),
        ({"scales": np.ones((5, 2), np.float32)}, settings(), "'a.b.scales' of shape [5, 2] does not fit 'a.b.weight'"),
        ({"biases": np.ones((4, 2), np.float64)}, settings(), "'a.b.biases' is of dtype f64"),
        ({"weight": np.ones((2, 2, 4, 16), np.uint32)}, settings(), "where 2 dimensions"),
    ],
)
def test_mlx_layers_that_contradict_the_configuration_or_themselves_are_refused(changes, config, message):
    parts, _ = mlx(4, 128, 4, 64)
    assert message in refused(replaced(parts, **changes), config)


# ---- HQQ

HQQ_PACKINGS = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}


def hqq(
    rows: int, cols: int, bits: int, group: int | None, axis: int, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Return parts and values as hqq's packing and dequantization are defined."""
    rng = np.random.default_rng(seed)
    shape = {None: (rows, cols), 0: (group, -1), 1: (-1, group)}[group if group is None else axis]
    grouped = rng.integers(0, 1 << bits, (rows, cols)).reshape(shape)
    numbers = (len(grouped), 1) if axis == 1 else (1, grouped.shape[1])
    scale, zero = (random_scales(rng, numbers, "f16") for _ in range(2))
    values = ((grouped.astype(np.float32) - zero.to_f32()) * scale.to_f32()).reshape(rows, cols)
    packing, each_item = HQQ_PACKINGS[bits]
    padded = np.pad(grouped, ((0, -len(grouped) % each_item if bits == 3 else 0), (0, 0)))
    step = len(padded) // each_item
    items = sum(padded[i * step : (i + 1) * step] << bits * (each_item - 1 - i) for i in range(each_item))
    parts = {
        "W_q": items.astype(np.int32 if bits == 3 else np.uint8),
        "scale": scale,
        "zero": zero,
        "shape": np.array([rows, cols]),
        "nbits": np.array(bits, np.int32),
        "axis": np.array(axis, np.int32),
        "packing": np.frombuffer(packing.encode(), np.uint8),
        "view_as_float": np.array(0, np.uint8),
        "compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
    }
    return parts | ({} if group is None else {"group_size": np.array(group, np.int32)}), values


@pytest.mark.parametrize("bits", HQQ_PACKINGS)
@pytest.mark.parametrize(("group", "axis"), [(16, 1), (64, 1), (128, 1), (None, 1), (8, 0), (16, 0), (1, 0), (None, 0)])
def test_hqq_layers_have_the_values_of_their_codes(tmp_path, bits, group, axis):
    parts, values = hqq(16, 64, bits, group, axis)
    if len(parts["W_q"]) == 0:
        pytest.skip("too few rows to be packed")
    check(only(parts), values, tmp_path)


def test_hqq_codes_may_be_viewed_as_floats():
    parts, values = hqq(16, 64, 4, 64, 1)
    check(only(replaced(parts, W_q=parts["W_q"].view(np.float16))), values)


@pytest.mark.parametrize("nested", [True, False])
def test_files_of_hqq_itself_have_the_values_of_their_codes(tmp_path, nested):
    parts, values = hqq(16, 64, 3, 64, 1)
    settings = {"nbits": 3, "group_size": 64, "axis": 1, "shape": torch.Size([16, 64]), "packing": "3bit_32"}
    settings |= {"view_as_float": False, "quant_scale": False, "compute_dtype": torch.float16, "round_zero": None}
    tensors = {role: torch.from_numpy(elements(parts[role]).data) for role in ("W_q", "scale", "zero")}
    own: dict[str, Any] = {"W_q": tensors.pop("W_q"), "bias": torch.ones(16), "offload_meta": False}
    own |= {"meta": settings | tensors} if nested else settings | tensors
    torch.save({"a.b": own, "a.norm": {"weight": torch.ones(64)}, "a.c": {"bias": None}}, tmp_path / "qmodel.pt")
    checkpoint = open_checkpoint(tmp_path / "qmodel.pt")
    assert checkpoint.warnings == []
    convert(checkpoint, tmp_path / "x.qf", Recipe.parse(None))
    with safe_open(tmp_path / "x.qf") as file:
        assert list(file.keys()) == ["a.b.bias", "a.b.weight", "a.norm.weight"]
        assert file.get_tensor("a.b.weight").tobytes() == values.tobytes()


def test_hqq_layers_that_no_type_can_hold_are_kept():
    parts, _ = hqq(16, 64, 4, 32, 0)
    assert "groups of 32 in rows of 64 columns" in kept(parts)
    parts, _ = hqq(16, 96, 4, 64, 1)
    assert "groups of 64 in rows of 96 columns" in kept(parts)
    parts, _ = hqq(16, 64, 4, 64, 1)
    assert "in the format HQQ, which cannot be read" in kept(replaced(parts, packing=None))
    for changes in (
        {"shape": np.array([16, 68])},
        {"shape": np.array([32, 64])},
        {"W_q": parts["W_q"].reshape(4, 128)},
    ):
        assert "codes of packing 4bit_u8" in kept(replaced(parts, **changes))
    assert "quantized themselves" in kept(replaced(parts, quant_zero=np.array(1, np.uint8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": np.array([1024])}, "is no shape of a matrix"),
        ({"shape": np.array([-16, -64])}, "is no shape of a matrix"),
        ({"packing": np.frombuffer(b"5bit_u8", np.uint8)}, "packing '5bit_u8'"),
        ({"axis": np.array(2)}, "axis 2"),
        ({"axis": np.array(np.nan)}, "axis -1"),
        ({"group_size": np.array([64, 64])}, "is not a number"),
        ({"group_size": np.array(3)}, "group_size 3"),
        ({"zero": np.ones((16, 1), np.float64)}, "is of dtype f64"),
        ({"zero": np.ones((8, 1), np.float16)}, "does not fit"),
        ({"scale": np.ones((8, 1), np.float16), "zero": np.ones((8, 1), np.float16)}, "does not fit"),
    ],
)
def test_damaged_hqq_layers_are_refused(changes, message):
    parts, _ = hqq(16, 64, 4, 64, 1)
    assert message in refused(replaced(parts, **changes))


# ---- gpt-fast


def tinygemm(codes: np.ndarray, tiles: int) -> np.ndarray:
    """Pack a matrix as the kernel `_convert_weight_to_int4pack` for CUDA does, thread by thread."""
    rows, cols = codes.shape
    packed = np.zeros((rows // 8, cols // (16 * tiles), 32, tiles // 2), np.uint32)
    for tile, outer, thread, inner in np.ndindex(packed.shape):
        base = (outer * tiles + 2 * inner) * 16 + thread % 4 * 2
        v = codes[8 * tile + thread // 4, [base + step for step in (0, 1, 8, 9, 16, 17, 24, 25)]]
        word = sum(int(v[i]) << shift for i, shift in zip((7, 5, 3, 1, 6, 4, 2, 0), range(28, -1, -4), strict=True))
        packed[tile, outer, thread, inner] = word
    return packed.view(np.int32)


def int4(rows: int, cols: int, group: int, tiles: int) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (rows, cols))
    numbers = random_scales(rng, (cols // group, rows, 2), "bf16")
    scale, zero = numbers.to_f32().transpose(2, 1, 0)
    values = (codes - 8).astype(np.float32) * scale.repeat(group, 1) + zero.repeat(group, 1)
    return {"weight": tinygemm(codes, tiles), "scales_and_zeros": numbers}, values


@pytest.mark.parametrize("tiles", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_int4_layers_of_gpt_fast_have_the_values_of_their_codes(tmp_path, tiles, group):
    parts, values = int4(16, 256, group, tiles)
    check(only(parts), values, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": np.zeros((2, 2, 16, 4), np.int32)},
        {"weight": np.zeros((2, 2, 32, 3), np.int32)},
        {"weight": np.zeros((3, 2, 32, 4), np.int32)},
        {"scales_and_zeros": np.zeros((4, 16, 3), np.float32)},
        {"scales_and_zeros": np.zeros((4, 16), np.float32)},
        {"scales_and_zeros": np.zeros((3, 16, 2), np.float32)},
        {"scales_and_zeros": np.zeros((4, 16, 2), np.int32)},
    ],
)
def test_damaged_int4_layers_of_gpt_fast_are_refused(changes):
    parts, _ = int4(16, 256, 64, 8)
    assert "a.b." in refused(replaced(parts, **changes))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_int8_layers_of_gpt_fast_have_the_values_of_their_codes(tmp_path, shape):
    codes = np.random.default_rng(0).integers(-128, 128, (6, 50)).astype(np.int8)
    scales = random_scales(np.random.default_rng(1), shape, "bf16")
    tensor = only({"weight": codes, "scales": scales})
    check(tensor, codes.astype(np.float32) * scales.to_f32().reshape(6, 1), tmp_path)
    assert tensor.codec.id == "affine"


@pytest.mark.parametrize("dtype", ["f32", "i8"])
@pytest.mark.parametrize("group", [32, 16])
def test_groups_and_zero_points_of_bytes_have_the_values_of_their_codes(tmp_path, dtype, group):
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (6, 64)).astype(np.int8)
    scales = random_scales(rng, (6, 64 // group), "f32")
    zeros = random_scales(rng, (6, 64 // group)) if dtype == "f32" else rng.integers(-8, 8, (6, 64 // group))
    zeros = zeros.to_f32() if dtype == "f32" else zeros.astype(np.int8)
    values = (codes.astype(np.float32) - zeros.astype(np.float32).repeat(group, 1)) * each(scales, 64)
    check(only({"weight": codes, "scales": scales, "zeros": zeros}), values, tmp_path)
    check(only({"weight": codes, "scales": scales}), codes.astype(np.float32) * each(scales, 64), tmp_path)
    assert "does not fit" in refused({"weight": codes, "scales": scales, "zeros": zeros[:, :1]})


# ---- ChatGLM


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_chatglm_layers_of_two_codes_a_byte_have_the_values_of_their_codes(tmp_path, dtype):
    codes = np.random.default_rng(0).integers(-8, 8, (6, 50))
    scale = random_scales(np.random.default_rng(1), 6, dtype)
    pairs = ((codes[:, 0::2] & 15) << 4 | codes[:, 1::2] & 15).astype(np.uint8).view(np.int8)
    parts = {"weight": pairs, "weight_scale": scale}
    values = codes.astype(np.float32) * scale.to_f32()[:, None]
    check(only(parts, {"model_type": "chatglm", "quantization_bit": 4}), values, tmp_path)
    halves = pairs.astype(np.float32) * scale.to_f32()[:, None]
    check(only(parts, {"model_type": "chatglm", "quantization_bit": 8}), halves, tmp_path)


# ---- torchao


def header(kind: str, **attributes: Any) -> dict[str, str]:
    description = {"_type": kind, "_data": attributes, "_tensor_data_names": []}
    return {"tensor_names": '["a.b.weight"]', "a.b.weight": json.dumps(description)}


def test_int4_tensors_of_torchao_have_the_values_of_their_codes(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (2, 6, 64))
    scale, zero = (random_scales(rng, (2, 2, 6), "bf16") for _ in range(2))
    pairs = ((codes[..., 0::2] & 15) | (codes[..., 1::2] & 15) << 4).astype(np.uint8).view(np.int8)
    values = codes.astype(np.float32)
    d, z = (np.swapaxes(numbers.to_f32(), 1, 2).repeat(32, -1) for numbers in (scale, zero))
    values = values * d + z
    parts = {"_weight_qdata": pairs, "_weight_scale": scale, "_weight_zero_point": zero}
    check(only(parts, None, header("Int4Tensor", block_size=[1, 1, 32], shape=[2, 6, 64])), values, tmp_path)
    flat = {role: Elements(x.dtype, x.data[0]) for role, x in ((role, elements(part)) for role, part in parts.items())}
    check(only(flat, None, header("Int4Tensor", block_size=[1, 32], shape=[6, 64])), values[0], tmp_path)
    for wrong in ({"block_size": [1, 64]}, {"shape": [6, 32]}, {"shape": "6x64"}, {"shape": [6.0, 64]}):
        assert "a.b." in refused(flat, None, header("Int4Tensor", **wrong))


def test_tiled_int4_tensors_of_torchao_are_cropped_to_their_shape(tmp_path):
    parts, values = int4(16, 256, 32, 8)
    own = {"_weight_qdata": parts["weight"], "_weight_scale_and_zero": parts["scales_and_zeros"]}
    kind = "Int4TilePackedTo4dTensor"
    check(
        only(own, None, header(kind, block_size=[1, 32], shape=[13, 200])),
        np.ascontiguousarray(values[:13, :200]),
        tmp_path,
    )
    assert "header says 64" in refused(own, None, header(kind, block_size=[1, 64], shape=[16, 256]))
    assert "does not fit" in refused(own, None, header(kind, block_size=[1, 32], shape=[17, 256]))


@pytest.mark.parametrize("group", [32, 24, 96])
def test_integers_of_torchao_with_zero_points_have_the_values_of_their_codes(tmp_path, group):
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (6, 96)).astype(np.int8)
    zero = rng.integers(-8, 8, (6, 96 // group)).astype(np.int8)
    scale = random_scales(rng, zero.shape, "bf16")
    parts = {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}
    values = (codes - zero.repeat(group, 1)).astype(np.float32) * each(scale, 96)
    kind = header(
        "IntxUnpackedToInt8Tensor", block_size=[1, group], target_dtype={"_type": "torch.dtype", "_data": "int4"}
    )
    tensor = only(parts, None, kind)
    check(tensor, values, tmp_path)
    assert tensor.codec.id == ("scaled" if group == 24 else "affine")
    assert "does not fit" in refused(parts, None, header("IntxUnpackedToInt8Tensor", block_size=[1, 48]))


def test_tensors_of_torchao_that_are_not_understood_are_kept():
    parts = {"_weight_qdata": np.ones((6, 96), np.int8), "_weight_scale": np.ones((6, 1), np.float32)}
    assert "the header does not say how" in kept(parts)
    assert "the header does not say how" in kept(parts, None, {"a.b.weight": "[" * 10**5})
    assert "torchao's Int5Tensor" in kept(parts, None, header("Int5Tensor"))
    more = replaced(parts, _weight_act_pre_scale=np.ones(96, np.float32))
    assert "expects inputs scaled by 'a.b._weight_act_pre_scale'" in kept(
        more, None, header("Int8Tensor", block_size=[1, 96])
    )
    assert "an attribute 'rotation'" in kept(parts, None, header("Int8Tensor", block_size=[1, 96], rotation=[1]))
    columns = replaced(parts, _weight_scale=np.ones((2, 96), np.float32))
    assert "scales in blocks of rows" in kept(columns, None, header("Int8Tensor", block_size=[3, 1]))


# ---- quanto


def quanto(rows: int, cols: int, bits: int, group: int, shift: Any, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows * cols // group, group))
    scale = random_scales(rng, (len(codes), 1), "bf16")
    if shift is None:
        shift = random_scales(rng, (len(codes), 1), "bf16")
        values = codes.astype(np.float32) * scale.to_f32() - shift.to_f32()
    else:
        shift = rng.integers(0, 1 << bits, (len(codes), 1)).astype(shift)
        values = (codes - shift).astype(np.float32) * scale.to_f32()
    count = 8 // bits
    step = -(-len(codes) // count)
    padded = np.pad(codes, ((0, step * count - len(codes)), (0, 0))).reshape(count, step, group)
    data = sum(part << bits * i for i, part in enumerate(padded)).astype(np.uint8)
    parts = {"weight._data._data": data, "weight._scale": scale, "weight._shift": shift}
    return parts, np.ascontiguousarray(values.reshape(rows, cols))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shift", [None, np.int8, np.uint8])
@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(7, 256, 128), (5, 192, 96), (7, 80, 80), (6, 320, 64), (3, 130, 130)]
)
def test_packed_layers_of_quanto_have_the_values_of_their_codes(tmp_path, bits, shift, rows, cols, group):
    parts, values = quanto(rows, cols, bits, group, shift)
    bias = from_array(np.zeros(rows, np.float32))
    result = found(replaced(parts, bias=bias))
    assert result.warnings == []
    check(next(tensor for tensor in result.tensors if tensor.name == "a.b.weight"), values, tmp_path)


def test_shapes_of_quanto_layers_without_bias_come_from_the_models_configuration():
    parts, values = quanto(8, 256, 4, 128, None)
    assert "neither a bias nor config.json tells the shape" in kept(parts)
    config = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    for name in ("x.q_proj", "x.lm_head", "x.o_proj"):
        (tensor,) = found(parts, config, None, name).tensors
        check(tensor, values)
    (tensor,) = found(parts, config, None, "x.down_proj").tensors
    assert tensor.shape == (4, 512)


def test_bits_of_short_quanto_layers_come_from_the_map():
    parts, values = quanto(2, 80, 4, 80, None)
    assert "may have 2 or 4 bits" in kept(parts)
    sources = [ArrayTensor(f"a.b.{role}", elements(part)) for role, part in parts.items()]
    (tensor,) = recognize(sources, {"quanto_qmap.json": {"a.b": {"weights": "qint4"}}}, SourceOptions()).tensors
    check(tensor, values)


@pytest.mark.parametrize("kind", ["i8", "f8_e4m3", "f8_e5m2"])
@pytest.mark.parametrize("shape", [(6, 1), ()])
def test_bytes_of_quanto_have_the_values_of_their_codes(tmp_path, kind, shape):
    codes = Elements(DTYPES[kind], np.arange(96, dtype=DTYPES[kind].storage).reshape(6, 16))
    scale = random_scales(np.random.default_rng(0), shape, "bf16")
    levels = codes.to_f32() if codes.dtype.floating else codes.data.astype(np.float32)
    result = found(
        {"weight._data": codes, "weight._scale": scale, "input_scale": np.float32(1), "output_scale": np.float32(1)}
    )
    assert result.warnings == []
    (tensor,) = [tensor for tensor in result.tensors if tensor.name == "a.b.weight"]
    check(tensor, levels * scale.to_f32(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight._data._data": np.zeros((9, 128), np.uint8)},
        {"weight._data._data": np.zeros((8, 128), np.int8)},
        {"weight._shift": np.zeros((15, 1), np.float32)},
        {"weight._shift": np.zeros((16, 1), np.float64)},
        {"weight._scale": np.zeros((16, 1), np.int8)},
    ],
)
def test_damaged_layers_of_quanto_are_refused(changes):
    parts, _ = quanto(8, 256, 4, 128, None)
    assert "a.b" in refused({**parts, **changes, "bias": np.zeros(8, np.float32)})


# ---- all of them

LAYERS: dict[str, Callable[[], tuple[Parts, Any, Any]]] = {
    "MLX": lambda: (mlx(4, 128, 4, 64, "f32")[0], settings(), None),
    "HQQ": lambda: (hqq(16, 64, 4, 64, 1)[0], None, None),
    "int4": lambda: (int4(16, 256, 64, 8)[0], None, None),
    "quanto": lambda: (quanto(8, 80, 4, 80, None)[0], None, None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_scales_that_are_not_finite_are_refused_by_name(tmp_path, name):
    parts, config, metadata = LAYERS[name]()
    for role in [role for role, part in parts.items() if elements(part).dtype.floating]:
        broken = elements(parts[role])
        flat = broken.data.reshape(-1).copy()
        flat[-1] = 0x7FC0 if broken.dtype is BF16 else np.nan
        changed = replaced(parts, **{role: Elements(broken.dtype, flat.reshape(broken.data.shape))})
        with pytest.raises(SourceError, match=r"tensor 'a.b.weight' holds NaN or infinity"):
            stored(only(changed, config, metadata), tmp_path)


# ---- exports


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
def test_exports_of_torchao_layers_say_nothing_about_torchao(tmp_path, kind):
    convert(open_checkpoint(DATA / "torchao"), tmp_path / "x.qf", Recipe.parse(None))
    target = tmp_path / ("y" if kind == "hf" else "y.safetensors")
    export(tmp_path / "x.qf", target, kind)
    path = target / "model.safetensors" if kind == "hf" else target
    with safetensors_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"0.bias", *(f"{number}.weight" for number in range(6))}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_a_part_that_is_not_known_are_refused(name):
    parts, config, metadata = LAYERS[name]()
    message = refused(replaced(parts, smooth_factor=np.ones(128, np.float32)), config, metadata)
    assert message.startswith("tensor 'a.b.smooth_factor' belongs to a layer in the format")
