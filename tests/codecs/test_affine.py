from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qformat
from qformat.codecs import base
from qformat.codecs.affine import _EXTREMES, _STEPS
from qformat.codecs.base import Chunk
from qformat.codecs.registry import codec_of, parse_type
from qformat.errors import FormatError, SourceError, TypeSpecError
from tests.helpers.codecs import (
    check_wrong_lengths_are_refused,
    decode,
    part_of,
    record_of,
    round_trip,
    segment_lengths,
)
from tests.helpers.kernels import FAMILIES, codes_in, modules, padded_rows, using

WIDTHS = [2, 3, 4, 8]
BOTH = [NUMBA, NUMPY] = modules("packing", "affine", "affine_search")
every_width = pytest.mark.parametrize("width", WIDTHS)


@every_width
@given(data=st.data(), runs=st.integers(0, 5))
def test_affine_codes_are_packed_from_the_lowest_bit_up(width, data, runs):
    packed = data.draw(hnp.arrays(np.uint8, 4 * width * runs))
    expected = codes_in(packed, width)
    for kernels in BOTH:
        codes = np.zeros(32 * runs, np.uint8)
        kernels["packing"].unpack(packed, codes, width)
        np.testing.assert_array_equal(codes, expected)
        again = np.zeros_like(packed)
        kernels["packing"].pack(codes, again, width)
        np.testing.assert_array_equal(again, packed)


def values_of(codec, parts, rows: int, cols: int) -> np.ndarray:
    """The specification's formula, in numpy."""
    group = cols if codec.group == "row" else codec.group
    column = np.arange(cols) // group
    count = -(-cols // group)
    stored = np.frombuffer(parts[0], {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}[codec.scale])
    if codec.scale == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    scales = stored.astype(np.float32).reshape(rows, count)[:, column]
    codes = np.stack([codes_in(row, codec.bits) for row in np.frombuffer(parts[-1], np.uint8).reshape(rows, -1)])
    zeros = np.full((rows, count), 1 << (codec.bits - 1))
    if not codec.sym:
        zeros = np.frombuffer(parts[1], np.uint8).reshape(rows, count).astype(int)
    return (codes[:, :cols].astype(int) - zeros[:, column]).astype(np.float32) * scales


@every_width
@pytest.mark.parametrize("cols", [1, 33, 128, 341])
@pytest.mark.parametrize("group", [32, 64, 96, 128, "row"])
def test_affine_codes_decode_as_the_spec_says(width, cols, group):
    rng = np.random.default_rng(cols)
    for sym in (True, False):
        for scale in ("f16", "bf16", "f32"):
            codec = parse_type(f"affine:bits={width},group={group},sym={str(sym).lower()},scale={scale}")
            lengths = segment_lengths(codec, (3, cols))
            assert list(lengths) == ["scales", *([] if sym else ["zeros"]), "codes"]
            parts = [rng.bytes(length) for length in lengths.values()]
            scales = rng.standard_normal(lengths["scales"] // codec._scale.size).astype(np.float32)
            stored = {"f16": scales.astype(np.float16), "bf16": (scales.view(np.uint32) >> 16).astype("<u2")}
            parts[0] = stored.get(scale, scales).tobytes()
            expected = values_of(codec, parts, 3, cols)
            for family in FAMILIES:
                with using(family):
                    out = decode(codec, parts, (3, cols))
                np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def search(kernels, x, cols, group, width, sym, kind):
    """Return scales, zeros, codes, lanes and what the encoder measured."""
    count = 5 * -(-cols // group)
    scales = np.empty(count, np.float32)
    zeros = np.full(count, 1 << (width - 1), np.uint8)
    codes, lanes = np.empty(x.size // 8 * width, np.uint8), np.zeros(16)
    if sym:
        choices = np.array(_EXTREMES[width], np.float32)
        kernels["affine_search"].symmetric(x, cols, group, width, kind, choices, scales)
    else:
        choices = np.array(_STEPS[width], np.float32)
        kernels["affine_search"].asymmetric(x, cols, group, width, kind, choices, scales, zeros)
    found = kernels["affine"].encode(x, cols, group, scales, zeros, codes, lanes, width)
    return scales, zeros, codes, lanes, tuple(int(value) for value in found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sym", [True, False])
def test_affine_encoding_reports_nan_and_infinity_at_any_position(bad, sym):
    for kernels in BOTH:
        for position in (0, 31, 40, 63, 64, 100):
            x = padded_rows(np.ones(5 * 101, np.float32), 101)
            x[position] = bad
            assert search(kernels, x, 101, 64, 4, sym, 0)[4][0] >= 0x7F800000


def plain_error(x: np.ndarray, group: int, width: int, sym: bool) -> float:
    """The squared error of scales from the extremes alone, with binary16 scales."""
    top = (1 << width) - 1
    groups = x.reshape(-1, group).astype(np.float64)
    if sym:
        scale = np.abs(groups).max(axis=1, keepdims=True) / (top // 2)
        zero = np.full_like(scale, 1 << (width - 1))
    else:
        low, high = (np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0))
        scale = ((high - low) / top)[:, None]
        zero = np.rint(-low[:, None] / scale)
    scale = scale.astype(np.float16).astype(np.float64)
    levels = np.clip(np.rint(groups / scale) + zero, 0, top) - zero
    return float(((groups - levels * scale) ** 2).sum())


@every_width
@pytest.mark.parametrize("sym", [True, False])
def test_affine_scales_from_the_search_err_no_more_than_scales_from_extremes(width, sym):
    rng = np.random.default_rng(11)
    for x in (rng.standard_normal(8192), rng.standard_t(3, 8192), rng.uniform(-1, 1, 8192)):
        rows = x.astype(np.float32)
        for group in (32, 128):
            scales = np.empty(rows.size // group, np.float32)
            zeros = np.full(scales.size, 1 << (width - 1), np.uint8)
            kernels = NUMBA["affine_search"]
            if sym:
                kernels.symmetric(rows, 256, group, width, 0, np.array(_EXTREMES[width], np.float32), scales)
            else:
                kernels.asymmetric(rows, 256, group, width, 0, np.array(_STEPS[width], np.float32), scales, zeros)
            lanes, codes = np.zeros(16), np.empty(rows.size // 8 * width, np.uint8)
            NUMBA["affine"].encode(rows, 256, group, scales, zeros, codes, lanes, width)
            assert lanes.sum() <= plain_error(rows, group, width, sym) * (1 + 1e-6)


def test_four_bit_affine_scales_come_within_half_a_percent_of_the_best_error():
    x = np.random.default_rng(13).standard_normal((64, 32)).astype(np.float32)
    scales = np.empty(64, np.float32)
    NUMBA["affine_search"].symmetric(x.reshape(-1), 32, 32, 4, 0, np.array(_EXTREMES[4], np.float32), scales)
    lanes, codes = np.zeros(16), np.empty(1024, np.uint8)
    NUMBA["affine"].encode(x.reshape(-1), 32, 32, scales, np.full(64, 8, np.uint8), codes, lanes, 4)
    best = np.full(64, np.inf)
    for step in np.linspace(-0.6, 0.6, 4801):  # every scale that could be good
        if step:
            levels = np.clip(np.rint(x / step), -8, 7).astype(np.float64)
            fitted = (x * levels).sum(axis=1) / np.maximum((levels**2).sum(axis=1), 1e-9)
            best = np.minimum(best, ((x - levels * fitted[:, None]) ** 2).sum(axis=1))
    assert np.sqrt(lanes.sum() / best.sum()) < 1.005


TYPES = [
    "affine",
    "affine:bits=8,group=row",
    "affine:bits=3,group=96,sym=false,scale=bf16",
    "affine:bits=2,group=32,sym=false,scale=f32",
    "affine:bits=4,group=row,sym=false",
]


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("shape", [(3, 64), (5, 341), (7, 1), (8, 5, 3), (2, 2, 2, 40), (33,), (), (0, 32), (4, 0)])
def test_affine_tensors_of_every_shape_round_trip_with_the_recorded_error(tmp_path, shape, type_):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + np.float32(0.5)
    decoded, info, _ = round_trip(tmp_path, x, type_)
    assert decoded.shape == shape
    assert decoded.dtype == np.float32
    assert info.nbytes == parse_type(type_).nbytes(shape)
    if x.size:
        error = (x - decoded).astype(np.float64)
        assert info.error.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6, abs=1e-9)
        assert info.error.maximum == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert info.error.rmse < 0.6
    else:
        assert all(segment.length == 0 for segment in info.segments)


@pytest.mark.parametrize("type_", TYPES)
def test_affine_bytes_do_not_depend_on_chunks_and_threads(tmp_path, monkeypatch, type_):
    x = np.random.default_rng(2).standard_normal((6, 1000)).astype(np.float32)
    whole, info, data = round_trip(tmp_path, x, type_, jobs=1)
    assert round_trip(tmp_path, x, type_, jobs=2)[2] == data
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 200)
    cut, cut_info, _ = round_trip(tmp_path, x, type_, jobs=2)
    np.testing.assert_array_equal(whole, cut)
    assert [s.sha256 for s in cut_info.segments] == [s.sha256 for s in info.segments]
    with qformat.safe_open(tmp_path / "x.qf") as f:
        np.testing.assert_array_equal(f.get_rows("x", [4, 1, 2]), whole[[4, 1, 2]])


def test_affine_files_written_with_numpy_and_numba_kernels_are_identical(tmp_path):
    x = np.random.default_rng(3).standard_normal((6, 341)).astype(np.float32)
    for type_ in TYPES:
        compiled = round_trip(tmp_path, x, type_)[2]
        with using("numpy"):
            assert round_trip(tmp_path, x, type_)[2] == compiled


def test_affine_stores_integer_grids_and_constants_exactly(tmp_path):
    x = (np.random.default_rng(4).integers(-8, 8, (9, 256)) * 0.25).astype(np.float32)
    decoded, info, _ = round_trip(tmp_path, x, "affine")
    np.testing.assert_array_equal(decoded, x)
    assert info.error.rmse == 0
    constant = np.full((2, 64), 0.375, np.float32)
    for type_ in TYPES:
        np.testing.assert_array_equal(round_trip(tmp_path, constant, type_)[0], constant)
        np.testing.assert_array_equal(round_trip(tmp_path, 0 * constant, type_)[0], 0 * constant)


def test_affine_refuses_weights_whose_scales_overflow_or_vanish(tmp_path):
    x = np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32)
    for sym in ("true", "false"):
        type_ = f"affine:sym={sym}"
        with pytest.raises(SourceError, match="too large"):
            round_trip(tmp_path, x * np.float32(1e7), type_)
        with pytest.raises(SourceError, match="would become zero"):
            round_trip(tmp_path, x * np.float32(1e-9), type_)
        for factor in (1e7, 1e-9):
            decoded, _, _ = round_trip(tmp_path, x * np.float32(factor), f"affine:sym={sym},scale=bf16")
            assert np.abs(decoded / np.float32(factor) - x).max() < 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("affine:bits=5", "bits may be 2 or 3 or 4 or 8"),
        ("affine:group=0", "multiple of 32"),
        ("affine:group=-32", "multiple of 32"),
        ("affine:group=33", "multiple of 32"),
        ("affine:group=2097152", "multiple of 32"),
        ("affine:group=col", "group"),
        ("affine:sym=1", "sym"),
        ("affine:scale=f64", "scale may be f16 or bf16 or f32"),
    ],
)
def test_impossible_affine_parameters_are_refused(text, message):
    with pytest.raises(TypeSpecError, match=message):
        parse_type(text)


def test_affine_types_print_as_they_are_written():
    for text in ("affine", "affine:bits=8,group=row", "affine:bits=2,scale=bf16,sym=false"):
        assert str(parse_type(text)) == text


def test_affine_parts_of_the_wrong_length_are_refused():
    codec = parse_type("affine:sym=false")
    check_wrong_lengths_are_refused(codec, (2, 200))


def test_the_parts_of_an_affine_chunk_are_contiguous():
    codec = parse_type("affine:sym=false")
    segments = [np.random.default_rng(0).bytes(length) for length in segment_lengths(codec, (4, 200)).values()]
    scales, zeros, codes = segments
    assert part_of(codec, (4, 200), Chunk(2, 2, 0, 200), segments) == (scales[8:16], zeros[4:8], codes[224:448])


@pytest.mark.parametrize("changes", [{"group": 48}, {"group": 0}, {"bits": 5}, {"sym": 1}, {"group": "col"}])
def test_records_with_impossible_affine_parameters_are_refused(changes):
    codec = parse_type("affine")
    with pytest.raises(FormatError, match="'x'"):
        codec_of(record_of(codec, (2, 200), params=codec.params() | changes))


def test_the_affine_histogram_counts_each_code():
    codec = parse_type("affine:bits=3")
    packed = np.random.default_rng(6).integers(0, 256, 48).astype(np.uint8)
    counts = codec.histograms([b"", packed.tobytes()], Chunk(0, 1, 0, 128))["histogram"]
    np.testing.assert_array_equal(counts, np.bincount(codes_in(packed, 3), minlength=8))
    assert parse_type("affine:bits=8").histograms([b"", b""], Chunk(0, 1, 0, 0)) == {}
