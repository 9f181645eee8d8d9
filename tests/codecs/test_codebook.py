"""Codes of a table: the codec against the definition, damaged parts, and both kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import safe_open
from qformat.codecs.codebook import Codebook
from qformat.codecs.layout import Matrix
from qformat.codecs.registry import codec_of, parse_type, types_for_weights
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements
from qformat.errors import FormatError, SourceError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from tests.helpers.codecs import decode, record_of, segment_lengths
from tests.helpers.kernels import FAMILIES, codes_in, using
from tests.helpers.quantized import Codes

SCALES = ("f32", "f16", "bf16", "f8_e4m3", "f8_e8m0")


def contents(codec: Codebook, shape: tuple[int, ...], seed: int = 0) -> dict[str, bytes]:
    """Return segments of finite numbers."""
    rng = np.random.default_rng(seed)
    sizes = {name: length or 0 for name, length in segment_lengths(codec, shape).items()}
    matrix = Matrix.of(shape)
    raw = rng.integers(0, 255 if codec.scale == "f8_e8m0" else 0x40, sizes["scales"], np.uint8)
    if codec.scale in ("f32", "f16"):
        size = DTYPES[codec.scale].size
        raw = rng.normal(size=sizes["scales"] // size).astype(DTYPES[codec.scale].storage)
    every = {
        "table": rng.normal(size=1 << codec.bits).astype("<f4"),
        "factor": rng.normal(size=1).astype("<f4"),
        "scales": raw,
        "starts": (np.arange(matrix.rows) * matrix.cols).astype("<u8"),
        "codes": rng.integers(0, 256, sizes["codes"], np.uint8),
    }
    return {name: every[name].tobytes() if size else b"" for name, size in sizes.items()}


def values_of(codec: Codebook, shape: tuple[int, ...], parts: dict[str, bytes]) -> np.ndarray:
    """Decode by the definition, an element at a time."""
    rows, cols = Matrix.of(shape).rows, Matrix.of(shape).cols
    table = np.frombuffer(parts["table"], "<f4")
    factor = np.frombuffer(parts.get("factor", b"\0\0\0\0"), "<f4")[0]
    scales = Elements(DTYPES[codec.scale], np.frombuffer(parts["scales"], DTYPES[codec.scale].storage)).to_f32()
    codes = codes_in(np.frombuffer(parts["codes"], np.uint8), codec.bits).reshape(rows, -1)
    group = cols if codec.group == "row" else codec.group
    values = np.empty((rows, cols), np.float32)
    with np.errstate(all="ignore"):
        for row in range(rows):
            for col in range(cols):
                number = (row * cols + col) // group if codec.flat else row * -(-cols // group) + col // group
                entry, scale = table[codes[row, col]], scales[number]
                if codec.factor == "scale":
                    scale = np.float32(scale * factor)
                elif codec.factor == "divisor":
                    scale = np.float32(scale / factor)
                value = np.float32(entry * scale)
                values[row, col] = np.float32(value * factor) if codec.factor == "value" else value
    if codec.transposed:
        values = values.reshape(rows, -1, codec.transposed).transpose(0, 2, 1)
    return np.ascontiguousarray(values).reshape(shape)


@st.composite
def cases(draw: Any) -> tuple[Codebook, tuple[int, ...], int]:
    flat = draw(st.booleans())
    group = draw(st.sampled_from([16, 32, 48, 64] if flat else [16, 32, 48, 64, "row"]))
    cols = draw(st.integers(1, 130))
    inner = 0 if flat else draw(st.sampled_from([0, 0, 16, 5]))
    shape = (draw(st.integers(1, 5)), inner, cols // 10 + 1) if inner else (draw(st.integers(1, 5)), cols)
    scale, factor = draw(st.sampled_from(SCALES)), draw(st.sampled_from(["none", "scale", "divisor", "value"]))
    return Codebook(draw(st.sampled_from([4, 8])), group, flat, scale, factor, inner), shape, draw(st.integers(0, 99))


@pytest.mark.parametrize("family", FAMILIES)
def test_codebook_values_are_those_of_the_definition_to_the_bit(family):
    @given(cases())
    def check(case: Any) -> None:
        codec, shape, seed = case
        parts = contents(codec, shape, seed)
        matrix = Matrix.of(shape)
        found = decode(codec, list(parts.values()), (matrix.rows, matrix.cols)).reshape(shape)
        assert found.tobytes() == values_of(codec, shape, parts).tobytes()

    with using(family):
        check()


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Codebook(4, 64), (7, 300)),
        (Codebook(4, 16, scale="f8_e4m3", factor="scale"), (7, 1600)),
        (Codebook(8, "row", factor="value"), (30, 100)),
        (Codebook(4, 64, flat=True), (30, 100)),
        (Codebook(4, 32, scale="f8_e8m0", transposed=64), (3, 64, 40)),
        (Codebook(4, 64), (100,)),
        (Codebook(4, 64), (0, 64)),
    ],
)
def test_codebook_tensors_are_copied_and_read_whole_and_by_rows(tmp_path, reference, monkeypatch, codec, shape):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 700)  # several chunks, also within a row
    parts = contents(codec, shape)
    tensor = Codes("x", shape, codec, tuple(parts.values()))
    convert(Checkpoint([tensor]), tmp_path / "a.qf", Recipe.parse(None), jobs=2)
    with safe_open(tmp_path / "a.qf") as file:
        info, values = file.info("x"), file.get_tensor("x")
        if len(shape) > 1 and shape[0]:
            some = [shape[0] - 1, *range(shape[0] // 2)]
            assert np.array_equal(file.get_rows("x", some), values[some])
    (stored,) = reference.read((tmp_path / "a.qf").read_bytes()).tensors.values()
    assert reference.decode(stored).tobytes() == values.tobytes()
    assert (info.codec, info.error.rmse, info.error.maximum) == ("codebook", 0, 0)
    if 0 not in shape:
        assert values.tobytes() == values_of(codec, shape, parts).tobytes()


@pytest.mark.parametrize("factor", ["none", "scale"])
@pytest.mark.parametrize("flat", [False, True])
def test_codebook_parts_of_wrong_lengths_are_refused(factor, flat):
    codec, shape = Codebook(4, 16, flat, factor=factor), (3, 40)
    good = list(contents(codec, shape).values())
    for number, part in enumerate(good):
        for wrong in (b"", part[:-1], part + b"\0"):
            with pytest.raises(ValueError, match=r"are needed|that have scales"):
                decode(codec, [*good[:number], wrong, *good[number + 1 :]], shape)


@pytest.mark.parametrize("wrong", [97, 2**63, 2**64 - 1, 2**40])
def test_codebook_rows_beyond_the_last_group_are_refused(wrong):
    codec, shape = Codebook(4, 16, flat=True), (3, 31)
    parts = contents(codec, shape)
    parts["starts"] = np.array([0, wrong, 62], "<u8").tobytes()
    with pytest.raises(ValueError, match=f"a row begins at element {wrong} of 96"):
        decode(codec, list(parts.values()), shape)


@pytest.mark.parametrize("name", ["table", "factor"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_codebook_numbers_that_are_not_finite_are_refused(name, number):
    codec, shape = Codebook(4, 16, factor="value"), (3, 31)
    parts = contents(codec, shape)
    parts[name] = np.array([number], "<f4").tobytes() + parts[name][4:]
    with pytest.raises(ValueError, match=f"the {name} holds NaN or infinity"):
        decode(codec, list(parts.values()), shape)


def test_codebook_scales_that_are_not_finite_are_refused_by_conversion(tmp_path):
    codec, shape = Codebook(4, 32, scale="f8_e8m0"), (2, 32)
    parts = contents(codec, shape)
    parts["scales"] = b"\x7f\xff"
    with pytest.raises(SourceError, match="holds NaN or infinity"):
        convert(Checkpoint([Codes("x", shape, codec, tuple(parts.values()))]), tmp_path / "a.qf", Recipe.parse(None))


@pytest.mark.parametrize(
    "params",
    [
        {"bits": 5},
        {"group": 8},
        {"group": 24},
        {"group": 0},
        {"group": 1 << 21},
        {"group": "column"},
        {"group": "row", "flat": True},
        {"flat": 1},
        {"scale": "f64"},
        {"factor": "both"},
        {"transposed": 0},
        {"transposed": -1},
        {"transposed": 1 << 31},
        {"transposed": 16, "flat": True},
        {"more": 1},
    ],
)
def test_codebook_records_with_other_parameters_are_refused(params):
    record = record_of(Codebook(), (2, 64))
    with pytest.raises(FormatError, match="codebook"):
        codec_of(record_of(Codebook(), (2, 64), params={**record.params, **params}))


def test_codebook_rows_that_are_no_matrices_are_refused():
    codec = Codebook(4, 16, transposed=7)
    with pytest.raises(ValueError, match="rows of 30 elements are no matrices with columns of 7"):
        decode(codec, list(contents(codec, (3, 30)).values()), (3, 30))


def test_codebook_is_no_type_for_weights():
    assert "codebook" not in types_for_weights()
    with pytest.raises(TypeSpecError, match="codebook holds only tensors that are quantized already"):
        parse_type("codebook")
