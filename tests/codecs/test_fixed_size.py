"""Properties that ``affine`` and ``lut`` share: sizes follow from the shape, and bytes from the weights."""

from __future__ import annotations

import numpy as np
import pytest

import qformat
from qformat.codecs.layout import Chunk
from qformat.codecs.registry import codec_of, parse_type
from qformat.errors import FormatError
from tests.helpers.codecs import encode, part_of, record_of, round_trip, segment_lengths, wrong_lengths_are_refused
from tests.helpers.kernels import every_family, using

AFFINE = [
    *("affine", "affine:bits=8,group=row", "affine:bits=3,group=96,sym=false,scale=bf16"),
    *("affine:bits=2,group=32,sym=false,scale=f32", "affine:bits=4,group=row,sym=false"),
]
LUT = [
    *("lut", "lut:size=8,fit=percentile", "lut:size=4,fit=gauss", "lut:scale=row", "lut:size=8,scale=row,fit=gauss"),
    *("lut:scale=row,fit=percentile", "lut:scope=block", "lut:scope=block,block=256,size=8"),
]
every_type = pytest.mark.parametrize("type_", [*AFFINE, *LUT])


@every_type
@pytest.mark.parametrize("shape", [(3, 64), (5, 341), (7, 1), (8, 5, 3), (2, 2, 2, 40), (33,), (), (0, 32), (4, 0)])
def test_tensors_of_every_shape_round_trip_with_the_recorded_error(tmp_path, shape, type_):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + np.float32(0.5)
    decoded, info, _ = round_trip(tmp_path, x, type_)
    assert (decoded.shape, decoded.dtype) == (shape, np.float32)
    assert info.nbytes == parse_type(type_).nbytes(shape)
    if x.size:
        error = (x - decoded).astype(np.float64)
        assert info.error.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6, abs=1e-9)
        assert info.error.maximum == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert info.error.rmse < 0.6 or type_ in LUT
    else:
        assert all(segment.length == 0 for segment in info.segments)


@every_type
def test_bytes_do_not_depend_on_threads_and_chunks_where_chunks_are_encoded_by_themselves(tmp_path, monkeypatch, type_):
    x = np.random.default_rng(2).standard_normal((6, 1000)).astype(np.float32)
    whole, info, data = round_trip(tmp_path, x, type_, jobs=1)
    assert round_trip(tmp_path, x, type_, jobs=2)[2] == data
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 200)
    cut, cut_info, data = round_trip(tmp_path, x, type_, jobs=1)
    assert round_trip(tmp_path, x, type_, jobs=2)[2] == data
    if type_ in AFFINE or "scope=block" in type_:
        np.testing.assert_array_equal(whole, cut)
        assert [s.sha256 for s in cut_info.segments] == [s.sha256 for s in info.segments]
    np.testing.assert_allclose(whole, cut, rtol=1e-3)  # sums for one codebook are added in another order
    with qformat.safe_open(tmp_path / "x.qf") as f:
        np.testing.assert_array_equal(f.get_rows("x", [4, 1, 2]), cut[[4, 1, 2]])


@every_type
def test_files_written_with_numpy_and_numba_kernels_are_identical(tmp_path, type_):
    x = np.random.default_rng(3).standard_normal((6, 341)).astype(np.float32)
    compiled = round_trip(tmp_path, x, type_)[2]
    with using("numpy"):
        assert round_trip(tmp_path, x, type_)[2] == compiled


@every_type
@every_family
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encoding_reports_nan_and_infinity_at_any_position(bad, family, type_):
    codec = parse_type(type_)
    with using(family):
        for position in (0, 31, 40, 63, 64, 140, 299):
            x = np.random.default_rng(4).standard_normal((2, 300)).astype(np.float32)
            x[1, position] = bad
            assert not encode(codec, x).finite


@pytest.mark.parametrize("type_", ["affine:sym=false", "lut", "lut:scale=row", "lut:scope=block"])
def test_parts_of_the_wrong_length_are_refused(type_):
    wrong_lengths_are_refused(parse_type(type_), (2, 200))


@pytest.mark.parametrize(
    ("type_", "spans"),
    [
        ("affine:sym=false", [slice(8, 16), slice(4, 8), slice(224, 448)]),
        ("lut:scope=block", [slice(128, 256), slice(224, 448)]),
    ],
)
def test_the_parts_of_a_chunk_are_contiguous(type_, spans):
    codec = parse_type(type_)
    segments = [np.random.default_rng(0).bytes(length) for length in segment_lengths(codec, (4, 200)).values()]
    expected = tuple(segment[span] for segment, span in zip(segments, spans, strict=True))
    assert part_of(codec, (4, 200), Chunk(2, 2, 0, 200), segments) == expected


@pytest.mark.parametrize(
    ("type_", "changes"),
    [
        *(("affine", {"group": group}) for group in (48, 0, "col")),
        *(("affine", changes) for changes in ({"bits": 5}, {"sym": 1})),
        *(("lut", {"block": block}) for block in (256, 0, "0")),
        *(("lut", changes) for changes in ({"scope": "block"}, {"scope": "block", "block": 64})),
        *(("lut", {"size": size}) for size in (5, True)),
    ],
)
def test_records_with_impossible_parameters_are_refused(type_, changes):
    codec = parse_type(type_)
    assert codec_of(record_of(codec, (2, 200))) == codec
    with pytest.raises(FormatError, match="'x'"):
        codec_of(record_of(codec, (2, 200), params=codec.params() | changes))
