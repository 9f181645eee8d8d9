"""Eight-bit floats with scales: the codec, and the checkpoints that they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import safe_open
from qformat.codecs.base import Encoder
from qformat.codecs.fp8 import Fp8
from qformat.codecs.layout import Chunk, Matrix
from qformat.codecs.registry import codec_of, codecs, encoders, parse_type, types_for_weights
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.quantized.recognize import recognize
from qformat.converters.sources.options import SourceOptions
from qformat.dtypes import BF16, DTYPES, Elements, from_array
from qformat.errors import FormatError, SourceError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, QuantizedSource, SourceTensor
from qformat.records import TensorRecord
from tests.helpers.codecs import decode, part_of, record_of, segment_lengths, wrong_lengths_are_refused

FORMATS = ("e4m3", "e5m2")


def codes(shape: Any, kind: str = "e4m3", seed: int = 0) -> Elements:
    """Return finite codes."""
    magnitudes = np.random.default_rng(seed).integers(0, 0x7F if kind == "e4m3" else 0x7C, shape)
    signs = np.random.default_rng(seed + 1).integers(0, 2, shape) << 7
    return Elements(DTYPES[f"f8_{kind}"], (magnitudes | signs).astype(np.uint8))


def scales(shape: Any, dtype: str = "f32", seed: int = 2) -> Elements:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if dtype == "bf16":
        return Elements(BF16, (values.view(np.uint32) >> 16).astype(np.uint16))
    return from_array(values.astype(DTYPES[dtype].storage))


def found_in(*arguments: Any) -> tuple[list[SourceTensor], list[str]]:
    """Return the tensors and warnings of recognition."""
    result = recognize(*arguments)
    return list(result.tensors), list(result.warnings)


def recognized(parts: dict[str, Elements], config: Any = None) -> Any:
    sources = [ArrayTensor(f"a.{role}", part) for role, part in parts.items()]
    return found_in(sources, {"config.json": {"quantization_config": config or {}}}, SourceOptions())


def only(weight: Elements, scale: Elements, config: Any = None, role: str = "weight_scale") -> Any:
    found, warnings = recognized({"weight": weight, role: scale}, config)
    assert not warnings
    assert [tensor.name for tensor in found] == ["a.weight"]
    assert isinstance(found[0], QuantizedSource)
    return found[0]


def values_of(weight: Elements, scale: Elements, rows: int, cols: int) -> np.ndarray:
    each = np.repeat(np.repeat(scale.to_f32(), rows, axis=0), cols, axis=1)
    height, width = weight.data.shape
    return weight.to_f32() * each[:height, :width]


def stored(tensor: Any, path: Any, reference: Any, **options: Any) -> tuple[TensorRecord, np.ndarray]:
    """Store a tensor; check that both readers see the same and that rows can be had alone."""
    convert(Checkpoint([tensor]), path, Recipe.parse(None), overwrite=True, **options)
    with safe_open(path) as file:
        info, values = file.info(tensor.name), file.get_tensor(tensor.name)
        some = [len(values) - 1, *range(len(values) // 2)]
        if values.ndim > 1:
            assert np.array_equal(file.get_rows(tensor.name, some), values[some])
    (same,) = reference.read(path.read_bytes()).tensors.values()
    assert reference.decode(same).tobytes() == values.tobytes()
    assert (info.codec, info.error.rmse, info.error.maximum) == ("fp8", 0, 0)
    return info, values


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("shape", "given", "rows", "cols"),
    [
        *(((300, 200), given, "all", "all") for given in ((1,), (), (1, 1))),
        *(((300, 200), given, 1, "all") for given in ((300,), (300, 1))),
        ((300, 200), (1, 200), "all", 1),
        ((300, 200), (3, 2), 128, 128),
        ((300, 100), (3, 1), 128, "all"),
        ((100, 300), (1, 3), "all", 128),
        *((shape, given, "all", "all") for shape, given in (((128, 128), (1, 1)), ((3, 4, 5), (1,)), ((7,), (1,)))),
    ],
)
def test_fp8_tensors_with_scales_of_every_shape_are_stored_and_read_exactly(
    tmp_path, reference, monkeypatch, kind, dtype, shape, given, rows, cols
):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 7 * 200)  # so that chunks begin anywhere in a block
    weight, scale = codes(shape, kind), scales(given, dtype)
    tensor = only(weight, scale)
    assert tensor.codec == Fp8(kind, rows, cols, dtype)
    info, values = stored(tensor, tmp_path / "a.qf", reference, jobs=2)
    assert dict(info.params) == {"format": kind, "rows": rows, "cols": cols, "scale": dtype}
    flat = scale if scale.data.ndim == 2 else Elements(scale.dtype, scale.data.reshape(-1, 1))
    matrix = Matrix.of(shape)
    as_rows = Elements(weight.dtype, weight.data.reshape(matrix.rows, matrix.cols))
    numbers = {"all": 10**3}
    expected = values_of(as_rows, flat, numbers.get(rows, rows), numbers.get(cols, cols))
    assert values.tobytes() == expected.tobytes()
    assert values.shape == shape
    assert tensor.read(slice(2, 5)).data.tobytes() == expected.reshape(-1)[2:5].tobytes()


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [64, 32]},
        {"config_groups": {"a": {"weights": {"block_structure": "64x32"}}}},
        {"config_groups": {"a": {"weights": {"block_structure": [64, 32]}}, "b": {"weights": {"strategy": "channel"}}}},
    ],
)
def test_fp8_block_sizes_come_from_the_configuration(tmp_path, reference, config):
    weight, scale = codes((150, 100)), scales((3, 4))
    tensor = only(weight, scale, config, "weight_scale_inv")
    info, values = stored(tensor, tmp_path / "a.qf", reference)
    assert (info.params["rows"], info.params["cols"]) == (64, 32)
    assert values.tobytes() == values_of(weight, scale, 64, 32).tobytes()
    assert info.nbytes == 150 * 100 + 3 * 4 * 4 + 4 * 150


def test_fp8_products_are_rounded_once_and_keep_subnormals(tmp_path, reference):
    weight = Elements(DTYPES["f8_e4m3"], np.arange(0x7F, dtype=np.uint8).reshape(1, 127))
    for number in (1 / 3, 2.0**-140, -(2.0**-149), 2.0**119):
        scale = from_array(np.array([number], np.float32))
        _, values = stored(only(weight, scale), tmp_path / "a.qf", reference)
        exact = weight.to_f32().astype(np.float64) * np.float64(np.float32(number))
        assert values.tobytes() == exact.astype(np.float32).tobytes()


def refused(parts: dict[str, Elements], config: Any = None) -> str:
    with pytest.raises(SourceError) as caught:
        recognized(parts, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BLOCKS_64, INVERSE = {"weight_block_size": [64, 64]}, {"weight_scale_semantics": "inverse"}


@pytest.mark.parametrize(
    ("scale", "config", "message"),
    [
        (scales((3, 4)), None, "'a.weight_scale' of shape [3, 4] does not fit 'a.weight' of shape [300, 200]; if it"),
        (scales((299,)), None, "'a.weight_scale' of shape [299] does not fit"),
        (scales((3, 2, 1)), None, "'a.weight_scale' of shape [3, 2, 1] does not fit"),
        (scales((0,)), None, "'a.weight_scale' of shape [0] does not fit"),
        (scales((0, 0)), None, "'a.weight_scale' of shape [0, 0] does not fit"),
        (scales((3, 2)), BLOCKS_64, "in blocks of 64x64, the weight_block_size of the configuration"),
        (scales((1,)), BLOCKS_64, "'a.weight_scale' of shape [1] does not fit"),
        (scales((1,)), INVERSE, "'a.weight' cannot be stored: config.json says weight_scale_s"),
        (from_array(np.ones((3, 2))), None, "'a.weight_scale' is of dtype f64"),
        (from_array(np.ones((300, 6), np.uint8)), None, "'a.weight_scale' of shape [300, 6] does not fit"),
    ],
)
def test_fp8_scales_of_the_wrong_shape_or_dtype_are_refused(scale, config, message):
    assert message in refused({"weight": codes((300, 200)), "weight_scale": scale}, config)


def test_fp8_scales_under_two_names_and_nonzero_zero_points_are_refused():
    parts = {"weight": codes((4, 4)), "weight_scale": scales((1,))}
    assert "has both 'a.weight_scale' and 'a.weight_scale_inv'" in refused(parts | {"weight_scale_inv": scales((1,))})
    zeros = from_array(np.zeros((), np.float16))
    assert [tensor.name for tensor in recognized(parts | {"weight_zero_point": zeros})[0]] == ["a.weight"]
    ones = from_array(np.ones(1, np.int8))
    assert "'a.weight_zero_point' is not zero" in refused(parts | {"weight_zero_point": ones})


def test_fp8_scales_named_as_in_deepseek_checkpoints_are_recognized():
    parts = {"weight": codes((256, 256)), "scale": scales((2, 2))}
    (tensor,), _ = recognized(parts)
    assert (tensor.name, str(tensor.codec)) == ("a.weight", "fp8:cols=128,rows=128")


def test_float8_tensors_without_scales_stay_raw():
    parts = {"weight": codes((4, 4)), "bias": scales((4,))}
    found, warnings = recognized(parts)
    assert [(tensor.name, tensor.dtype.name) for tensor in found] == [
        ("a.weight", "f8_e4m3"),
        ("a.bias", "f32"),
    ]
    assert warnings == []


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
def test_fp8_codes_and_scales_that_are_not_finite_are_refused(tmp_path, bad):
    weight = codes((4, 40))
    weight.data[2, 3] = bad
    with pytest.raises(SourceError, match=r"tensor 'a.weight' holds NaN or infinity"):
        convert(Checkpoint([only(weight, scales((1,)))]), tmp_path / "a.qf", Recipe.parse(None))
    scale = scales((4, 1))
    scale.data[1] = np.inf
    with pytest.raises(SourceError, match=r"tensor 'a.weight' holds NaN or infinity"):
        convert(Checkpoint([only(codes((4, 40)), scale)]), tmp_path / "a.qf", Recipe.parse(None))


def test_fp8_tensors_convert_to_f32(tmp_path):
    weight, scale = codes((8, 64)), scales((8, 1))
    convert(Checkpoint([only(weight, scale)]), tmp_path / "a.qf", Recipe.parse("f32"))
    with safe_open(tmp_path / "a.qf") as file:
        assert np.array_equal(file.get_tensor("a.weight"), values_of(weight, scale, 1, 64))


def test_fp8_is_refused_as_a_type_for_weights():
    copied = set(codecs()) - set(encoders())
    assert "fp8" in copied
    assert not copied & set(types_for_weights())
    for text in ("fp8", "fp8:format=e5m2"):
        with pytest.raises(TypeSpecError, match="fp8 holds only tensors that are quantized already; the types for"):
            parse_type(text)
    assert not isinstance(Fp8(), Encoder)


# ---- hostile files


@pytest.mark.parametrize(
    "codec", [Fp8(), Fp8("e5m2", 1, "all", "f16"), Fp8("e4m3", 128, 128, "bf16"), Fp8("e4m3", "all", 3)]
)
@pytest.mark.parametrize("shape", [(300, 200), (0, 4), (4, 0), (), (9,), (2, 3, 4)])
def test_fp8_records_of_every_shape_are_accepted(codec, shape):
    assert codec_of(record_of(codec, shape)) == codec
    lengths = segment_lengths(codec, shape).values()
    assert all(lengths) if np.prod(shape, dtype=int) else not any(lengths)


@pytest.mark.parametrize(
    "changes",
    [
        *({"rows": rows} for rows in (0, -1, True, 1.0, "row", (1 << 20) + 1, None)),
        *({"cols": cols} for cols in (0, "", 1 << 21)),
        *({"format": name} for name in ("e4m3fn", "f8_e4m3", 1)),
        *({"scale": name} for name in ("f64", "f8_e4m3")),
        {"more": 1},
    ],
)
def test_records_with_impossible_fp8_parameters_are_refused(changes):
    codec = Fp8(rows=128, cols=128)
    with pytest.raises(FormatError, match="'x'"):
        codec_of(record_of(codec, (300, 200), params={**codec.params(), **changes}))
    for key in codec.params():
        missing = {name: value for name, value in codec.params().items() if name != key}
        with pytest.raises(FormatError, match="'x'"):
            codec_of(record_of(codec, (300, 200), params=missing))


def test_fp8_parts_of_the_wrong_length_or_with_missing_bands_are_refused():
    for codec in (Fp8(), Fp8(rows=1, cols=7), Fp8(rows=5, cols=7, scale="bf16")):
        wrong_lengths_are_refused(codec, (20, 30))
    scales, bands, codes = (bytes(length) for length in segment_lengths(codec, (20, 30)).values())
    outside = (np.arange(20) // 5 + 1).astype("<u4").tobytes()
    with pytest.raises(ValueError, match="a row is in band 4 of 4"):
        decode(codec, [scales, outside, codes], (20, 30))
    segments = [np.random.default_rng(0).bytes(len(part)) for part in (scales, bands, codes)]
    expected = segments[0], segments[1][12:20], segments[2][90:150]
    assert part_of(codec, (20, 30), Chunk(3, 2, 0, 30), segments) == expected


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    rows=st.sampled_from(["all", 1, 2, 7, 64]),
    cols=st.sampled_from(["all", 1, 3, 64]),
    kind=st.sampled_from(FORMATS),
    dtype=st.sampled_from(["f16", "bf16", "f32"]),
    seed=st.integers(0, 99),
)
def test_fp8_decodes_as_in_the_reference_reader(reference, shape, rows, cols, kind, dtype, seed):
    """On random bytes, with bands in any order."""
    import reference_codecs

    codec = Fp8(kind, rows, cols, dtype)
    rng = np.random.default_rng(seed)
    layout = segment_lengths(codec, shape)
    bands = -(-shape[0] // rows) if isinstance(rows, int) else 1
    segments = {name: rng.integers(0, 256, length, dtype=np.uint8).tobytes() for name, length in layout.items()}
    number = scales(layout["scales"] // DTYPES[dtype].size, dtype, seed)
    segments["scales"] = number.data.tobytes()
    if "bands" in segments:
        segments["bands"] = rng.integers(0, max(1, bands), layout["bands"] // 4).astype("<u4").tobytes()
    out = np.empty(shape, np.float32)
    if out.size:
        out = decode(codec, list(segments.values()), shape)

    def decode_independently() -> np.ndarray:
        parts = list(segments.items())
        return reference_codecs.decode("fp8", "f32", shape, codec.params(), parts, has_error=True, where="x")

    assert np.array_equal(decode_independently(), out, equal_nan=True)
    if "bands" in segments and out.size:
        segments["bands"] = np.full(shape[0], bands, "<u4").tobytes()
        with pytest.raises(reference.SpecError, match="band that does not exist"):
            decode_independently()
