"""``affine``: codes as integers between scales and zeros."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.codecs.affine import _EXTREMES, _STEPS
from qformat.codecs.layout import Chunk
from qformat.codecs.registry import parse_type
from qformat.errors import SourceError
from tests.helpers.codecs import decode, round_trip, segment_lengths
from tests.helpers.kernels import FAMILIES, codes_in, modules, using

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


def unsearched_error(x: np.ndarray, group: int, width: int, sym: bool) -> float:
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
            assert lanes.sum() <= unsearched_error(rows, group, width, sym) * (1 + 1e-6)


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


def test_affine_stores_integer_grids_and_constants_exactly(tmp_path):
    x = (np.random.default_rng(4).integers(-8, 8, (9, 256)) * 0.25).astype(np.float32)
    decoded, info, _ = round_trip(tmp_path, x, "affine")
    np.testing.assert_array_equal(decoded, x)
    assert info.error.rmse == 0
    constant = np.full((2, 64), 0.375, np.float32)
    for type_ in ("affine", "affine:bits=8,group=row", "affine:bits=3,group=96,sym=false,scale=bf16"):
        np.testing.assert_array_equal(round_trip(tmp_path, constant, type_)[0], constant)
        np.testing.assert_array_equal(round_trip(tmp_path, 0 * constant, type_)[0], 0 * constant)


def test_affine_refuses_weights_whose_scales_overflow_or_are_zeroed(tmp_path):
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


def test_the_affine_histogram_counts_each_code():
    codec = parse_type("affine:bits=3")
    packed = np.random.default_rng(6).integers(0, 256, 48).astype(np.uint8)
    counts = codec.histograms([b"", packed.tobytes()], Chunk(0, 1, 0, 128))["histogram"]
    np.testing.assert_array_equal(counts, np.bincount(codes_in(packed, 3), minlength=8))
    assert parse_type("affine:bits=8").histograms([b"", b""], Chunk(0, 1, 0, 0)) == {}
