"""Integers with float scales and zeros: the codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.codecs.layout import Chunk, Matrix
from qformat.codecs.registry import codec_of, parse_type
from qformat.codecs.scaled import Scaled
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES
from qformat.errors import FormatError, SourceError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from tests.helpers.codecs import chunks_of, decode, part_of, record_of, segment_lengths, wrong_lengths_are_refused
from tests.helpers.quantized import Codes, packed, random_scales

WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def segments_of(codec: Scaled, shape: tuple[int, ...], seed: int) -> dict[str, bytes]:
    """Return random segments of finite numbers, with bands in any order."""
    rng = np.random.default_rng(seed)
    segments = {}
    for name, length in segment_lengths(codec, shape).items():
        assert length is not None
        segments[name] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        if name in ("scales", "zeros"):
            dtype = codec.scale if name == "scales" else codec.zero
            segments[name] = random_scales(rng, length // DTYPES[dtype].size, dtype).data.tobytes()
        elif name == "bands":
            bands = -(-Matrix.of(shape).rows // int(codec.rows))
            segments[name] = rng.integers(0, bands, length // 4).astype("<u4").tobytes()
    return segments


@given(
    shape=st.one_of(st.tuples(st.integers(0, 40), st.integers(0, 40)), st.sampled_from([(), (9,), (2, 3, 4)])),
    bits=st.sampled_from(WIDTHS),
    rows=st.sampled_from(["all", 1, 2, 7, 64]),
    cols=st.sampled_from(["all", 1, 3, 32, 64]),
    dtypes=st.tuples(st.sampled_from(["f16", "bf16", "f32"]), st.sampled_from(["f16", "bf16", "f32", "none"])),
    form=st.sampled_from(["add", "sub"]),
    seed=st.integers(0, 99),
)
def test_scaled_tensors_decode_as_in_the_reference_reader(reference, shape, bits, rows, cols, dtypes, form, seed):
    import reference_codecs

    scale, zero = dtypes
    codec = Scaled(bits, rows, cols, scale, zero, "add" if zero == "none" else form, seed % (1 << bits))
    assert codec_of(record_of(codec, shape)) == codec
    segments = segments_of(codec, shape, seed)
    expected = reference_codecs.decode(
        codec.id, "f32", shape, codec.params(), list(segments.items()), has_error=True, where="x"
    )
    matrix = Matrix.of(shape)
    found = decode(codec, list(segments.values()), (matrix.rows, matrix.cols))
    assert found.reshape(shape).tobytes() == expected.tobytes()
    for chunk in chunks_of(codec, shape):
        part = decode(codec, part_of(codec, shape, chunk, list(segments.values())), chunk.shape)
        assert np.array_equal(part, found[chunk.row : chunk.row + chunk.rows, chunk.col : chunk.col + chunk.cols])


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (Scaled(4, 1, 2, "bf16", "bf16"), lambda q, d, z: q * d + z),
        (Scaled(4, 1, 2, "f32", "f32", "add", 8), lambda q, d, z: (q - np.float32(8)) * d + z),
        (Scaled(4, 1, 2, "f32", "f32", "sub"), lambda q, d, z: (q - z) * d),
        (Scaled(4, 1, 2, "f32", "none", "add", 8), lambda q, d, z: (q - np.float32(8)) * d),
    ],
)
def test_each_operation_of_a_scaled_tensor_is_rounded_once(tmp_path, reference, codec, expected):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (6, 50))
    d, z = (random_scales(rng, (6, 25), dtype) for dtype in (codec.scale, codec.scale))
    words = packed(np.pad(codes, ((0, 0), (0, 14))), 4)
    segments = (d.data.tobytes(), *([] if codec.zero == "none" else [z.data.tobytes()]), words.tobytes())
    convert(Checkpoint([Codes("x", (6, 50), codec, segments)]), tmp_path / "x.qf", Recipe())
    each = (np.repeat(numbers.to_f32(), 2, axis=1) for numbers in (d, z))
    wanted = expected(codes.astype(np.float32), *each)
    assert wanted.dtype == np.float32
    with qformat.safe_open(tmp_path / "x.qf") as file:
        assert file.get_tensor("x").tobytes() == wanted.tobytes()
        assert file.info("x").params == codec.params()
        assert np.array_equal(file.get_rows("x", [4, 1]), wanted[[4, 1]])


def test_products_without_zeros_keep_their_sign():
    codec = Scaled(2, "all", "all", "f32", "none", offset=1)
    (scale,) = (np.array([-2], np.float32).tobytes(),)
    found = decode(codec, [scale, packed([[1, 0, 2, *[1] * 29]], 2).tobytes()], (1, 3))
    assert found.tobytes() == np.array([-0.0, 2, -2], np.float32).tobytes()


@pytest.mark.parametrize("rows", [1, 2, "all"])
def test_rows_of_scaled_tensors_are_cut_only_between_groups(monkeypatch, rows):
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 200)
    codec = Scaled(4, rows, 48, "f16", "f16")
    chunks = chunks_of(codec, (2, 300))
    assert [chunk.cols for chunk in chunks] == ([192, 108, 192, 108] if rows == 1 else [300, 300])
    assert chunks_of(Scaled(4, rows, "all"), (2, 300))[0] == Chunk(0, 1, 0, 192)


@pytest.mark.parametrize(
    "changes",
    [
        *({"bits": bits} for bits in (0, 7, 16, True, "4")),
        *({"rows": rows} for rows in (0, -1, True, "row", (1 << 20) + 1, None)),
        *({"cols": cols} for cols in (0, "", 1 << 21)),
        *({key: name} for key in ("scale", "zero") for name in ("f64", "i8", "", 1)),
        *({"form": form} for form in ("mul", "", 0)),
        *({"offset": offset} for offset in (-1, 16, "8", True)),
        {"zero": "none", "form": "sub"},
        {"more": 1},
    ],
)
def test_records_with_impossible_parameters_of_scaled_tensors_are_refused(reference, changes):
    import reference_codecs

    codec = Scaled(4, 1, 32)
    params = {**codec.params(), **changes}
    with pytest.raises(FormatError, match="'x'"):
        codec_of(record_of(codec, (30, 200), params=params))
    with pytest.raises(reference.SpecError):
        reference_codecs.decode(codec.id, "f32", (0, 4), params, [], has_error=True, where="x")


def test_each_parameter_of_scaled_tensors_is_needed():
    codec = Scaled()
    for key in codec.params():
        missing = {name: value for name, value in codec.params().items() if name != key}
        with pytest.raises(FormatError, match="'x'"):
            codec_of(record_of(codec, (30, 200), params=missing))


def test_scaled_parts_of_the_wrong_length_or_with_missing_bands_are_refused():
    for codec in (Scaled(), Scaled(3, "all", 7, zero="none"), Scaled(5, 5, 7, "bf16", "f32")):
        wrong_lengths_are_refused(codec, (20, 30))
    segments = segments_of(codec, (20, 30), 0) | {"bands": (np.arange(20) // 5 + 1).astype("<u4").tobytes()}
    with pytest.raises(ValueError, match="a row is in band 4 of 4"):
        decode(codec, list(segments.values()), (20, 30))


@pytest.mark.parametrize("part", [0, 1])
def test_scales_and_zeros_that_are_not_finite_are_refused(tmp_path, part):
    codec = Scaled(4, 1, 32, "f32", "f32")
    segments = list(segments_of(codec, (2, 64), 0).values())
    numbers = np.frombuffer(segments[part], np.float32).copy()
    numbers[1] = np.nan
    segments[part] = numbers.tobytes()
    with pytest.raises(SourceError, match="tensor 'x' holds NaN or infinity"):
        convert(Checkpoint([Codes("x", (2, 64), codec, tuple(segments))]), tmp_path / "x.qf", Recipe())


def test_scaled_is_refused_as_a_type_for_weights():
    with pytest.raises(TypeSpecError, match="scaled holds only tensors that are quantized already; the types for"):
        parse_type("scaled:bits=5")


def test_scaled_tensors_convert_to_other_types(tmp_path):
    codec = Scaled(4, 1, 32, "f32", "f32")
    tensor: Any = Codes("x", (4, 64), codec, tuple(segments_of(codec, (4, 64), 3).values()))
    values = tensor.read(slice(0, 256))
    convert(Checkpoint([tensor]), tmp_path / "x.qf", Recipe.parse("f32"))
    with qformat.safe_open(tmp_path / "x.qf") as file:
        assert np.array_equal(file.get_tensor("x").reshape(-1), values.data)
