"""``lut``: codes into codebooks, of the tensor or of blocks."""

from __future__ import annotations

import numpy as np
import pytest

import qformat
from qformat.codecs.codebooks import Survey
from qformat.codecs.registry import parse_type
from qformat.errors import SourceError
from tests.helpers.arrays import distance
from tests.helpers.codecs import decode, encode, round_trip, segment_lengths
from tests.helpers.kernels import FAMILIES, codes_in, modules, using

BOTH = [NUMBA, NUMPY] = modules("lut", "lut_search")
SIZES = [4, 8, 16]
every_size = pytest.mark.parametrize("size", SIZES)

TYPES = [
    *("lut", "lut:size=8,fit=percentile", "lut:size=4,fit=gauss", "lut:scale=row"),
    *("lut:size=8,scale=row,fit=gauss", "lut:scale=row,fit=percentile", "lut:scope=block"),
    "lut:scope=block,block=256,size=8",
]


@every_size
@pytest.mark.parametrize("cols", [1, 33, 128, 341, 600])
def test_lut_codes_decode_as_the_spec_says(size, cols):
    rng = np.random.default_rng(cols)
    for text in ("", ",scale=row", ",scope=block", ",scope=block,block=256"):
        codec = parse_type(f"lut:size={size}{text}")
        layout = segment_lengths(codec, (3, cols))
        width = {4: 2, 8: 3, 16: 4}[size]
        per_row = -(-cols // codec.block) if codec.scope == "block" else 0
        assert layout["codebooks"] == 2 * size * (3 * per_row or 1)
        assert layout["codes"] == 3 * -(-cols // 32) * 4 * width
        books = rng.standard_normal(layout["codebooks"] // 2).astype(np.float16)
        scales = rng.standard_normal(3).astype(np.float16)
        codes = rng.integers(0, 256, layout["codes"]).astype(np.uint8)
        parts = [books.tobytes(), *([scales.tobytes()] if "scales" in layout else []), codes.tobytes()]
        chosen = np.stack([codes_in(row, width) for row in codes.reshape(3, -1)])[:, :cols]
        tables = books.astype(np.float32).reshape(-1, size)
        table = np.arange(3)[:, None] * per_row + np.arange(cols) // (codec.block if codec.scope == "block" else cols)
        expected = tables[table, chosen]
        if "scales" in layout:
            expected = expected * scales.astype(np.float32)[:, None]
        for family in FAMILIES:
            with using(family):
                out = decode(codec, parts, (3, cols))
            np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_the_histogram_for_codebooks_ignores_nan_and_infinity():
    x = np.array([1.5, np.nan, -np.inf, 1.5, -0.0, np.inf, -2.0], np.float32)
    for kernels in BOTH:
        found = Survey.empty()
        kernels["lut"].survey(x, found.counts, found.sums)
        assert found.counts.sum() == 4
        assert found.sums.sum() == 1.0
        assert found.counts[0x3FC0] == 2


# ---- codebooks of blocks


def least_error(values: np.ndarray, size: int) -> float:
    """The least squared error of `size` levels, by trying every cell."""
    n = values.size
    sums, squares = (np.concatenate([[0], np.cumsum(np.sort(values) ** power)]) for power in (1, 2))
    start, stop = np.arange(n + 1)[:, None], np.arange(n + 1)
    lengths = np.maximum(stop - start, 1)
    cost = squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / lengths
    cost[start > stop] = np.inf
    best = cost[0]
    for _ in range(size - 1):
        best = (best[:, None] + cost).min(axis=0)
    return best[n]


@every_size
@pytest.mark.parametrize("block", [128, 256])
def test_lut_codebooks_of_blocks_have_the_least_error(size, block):
    rng = np.random.default_rng(size)
    for source in (rng.standard_normal((2, 600)), rng.standard_t(3, (2, 600)), 10 + rng.uniform(-1, 1, (2, 600))):
        x = source.astype(np.float32)
        codec = parse_type(f"lut:scope=block,block={block},size={size}")
        books = np.empty(2 * -(-600 // block) * size, np.float32)
        padded = np.ascontiguousarray(np.pad(x, ((0, 0), (0, 8))))
        NUMBA["lut_search"].codebooks(padded.reshape(-1), 600, block, size, books)
        books = books.reshape(2, -1, size)
        total = 0.0
        for row in range(2):
            for number, start in enumerate(range(0, 600, block)):
                values = x[row, start : start + block].astype(np.float64)
                least = least_error(values, size)
                total += least
                assert distance(values, books[row, number]) ** 2 * values.size <= least * (1 + 1e-3)
        error = encode(codec, x).error
        assert error.squares <= total * 1.01 + x.size * (np.abs(x).max() * 2.0**-12) ** 2  # entries are rounded


def test_lut_codebooks_of_blocks_err_less_than_even_steps(tmp_path):
    x = np.random.default_rng(6).standard_normal((8, 384)).astype(np.float32)
    _, info, _ = round_trip(tmp_path, x, "lut:scope=block")
    groups = x.reshape(-1, 128)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    even = low + (high - low) / 15 * np.rint((groups - low) / (high - low) * 15)
    assert info.error.rmse < 0.75 * np.sqrt(np.mean((groups - even) ** 2))


@pytest.mark.parametrize("type_", ["lut", "lut:scope=block", "lut:scope=block,block=256"])
def test_lut_stores_tensors_of_few_values_exactly(tmp_path, type_):
    rng = np.random.default_rng(7)
    for count in (1, 2, 15, 16):
        values = (rng.permutation(64)[:count] * 0.125 - 4).astype(np.float32)
        x = rng.choice(values, (5, 341)).astype(np.float32)
        decoded, info, _ = round_trip(tmp_path, x, type_)
        np.testing.assert_array_equal(decoded, x)
        assert info.error.rmse == 0
    rounded, _, _ = round_trip(tmp_path, np.full((3, 40), 0.3, np.float32), type_)
    np.testing.assert_array_equal(rounded, np.float32(np.float16(0.3)))


def test_lut_row_scales_reduce_the_error_of_rows_of_different_magnitudes(tmp_path):
    rng = np.random.default_rng(11)
    spread = 2.0 ** rng.uniform(-6, 6, (64, 1))
    x = (rng.standard_normal((64, 500)) * spread).astype(np.float32)
    x[5] = 0
    errors = {}
    for type_ in ("lut", "lut:scale=row"):
        decoded, _, _ = round_trip(tmp_path, x, type_)
        errors[type_] = np.sqrt(np.mean(((x - decoded) / spread) ** 2))
    assert errors["lut:scale=row"] < 0.105
    assert errors["lut"] > 0.5
    np.testing.assert_array_equal(decoded[5], 0)
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert [(s.name, s.length) for s in f.info("x").segments][:2] == [("codebooks", 32), ("scales", 128)]


# ---- refusals


@pytest.mark.parametrize("type_", TYPES)
def test_lut_refuses_weights_that_overflow_or_are_zeroed(tmp_path, type_):
    x = np.random.default_rng(12).standard_normal((2, 256)).astype(np.float32)
    with pytest.raises(SourceError, match="too large"):
        round_trip(tmp_path, x * np.float32(1e6), type_)
    with pytest.raises(SourceError, match="would become zero"):
        round_trip(tmp_path, x * np.float32(1e-9), type_)
    decoded, _, _ = round_trip(tmp_path, 0 * x, type_)
    np.testing.assert_array_equal(decoded, 0)


def test_lut_blocks_default_to_128():
    assert str(parse_type("lut:scope=block")) == "lut:scope=block"
    assert parse_type("lut:block=128") == parse_type("lut")
    params = parse_type("lut:scope=block").params()
    assert params == {"scope": "block", "block": 128, "size": 16, "scale": "tensor"}
    assert type(parse_type("lut").params()["block"]) is int


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_lut_stores_f16_and_f64_like_the_same_values_in_f32(tmp_path, type_, dtype):
    x = np.random.default_rng(13).standard_normal((4, 200)).astype(dtype)
    np.testing.assert_array_equal(
        round_trip(tmp_path, x, type_)[0], round_trip(tmp_path, x.astype(np.float32), type_)[0].astype(np.float32)
    )
