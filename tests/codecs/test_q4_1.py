"""``q4_1`` and ``q5_1``: the searches for scales and minima, and the codecs."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.codecs.layout import Chunk
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, F32, F64, Elements
from qformat.errors import TypeSpecError
from qformat.kernels import load
from tests.helpers.codecs import decode, segment_lengths
from tests.helpers.codecs import encode as encode_with
from tests.helpers.kernels import FAMILIES, battery, likely_rows, modules, rows

BLOCK_BYTES = {"q4_1": 20, "q5_1": 24}
BOTH = [NUMBA, _] = modules(*BLOCK_BYTES, "q4_1_als", "q4_1_best")
SEARCHES = ["als", "best"]
every_family = pytest.mark.parametrize("kernels", BOTH, ids=FAMILIES)


def quantize(module: ModuleType, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    size = BLOCK_BYTES[module.__name__.rpartition(".")[2]]
    blocks, lanes = np.zeros((x.size // 32, size), np.uint8), np.zeros(load("blocks").LANES)
    found = module.quantize(x.reshape(-1), blocks.reshape(-1), lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def search(kernels: dict[str, ModuleType], how: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, minima = np.zeros(x.size // 32, np.uint16), np.zeros(x.size // 32, np.uint16)
    kernels[f"q4_1_{how}"].choose(x.reshape(-1), scales, minima)
    return scales, minima


def encode(kernels: dict[str, ModuleType], how: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    if how == "naive":
        return quantize(kernels["q4_1"], x)
    blocks, lanes = np.zeros((x.size // 32, 20), np.uint8), np.zeros(load("blocks").LANES)
    found = kernels["q4_1"].encode(x.reshape(-1), *search(kernels, how, x), blocks.reshape(-1), lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def errors(x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The squared error of each block, in float64."""
    decoded = np.empty(x.size, np.float32)
    NUMBA["q4_1"].dequantize(blocks.reshape(-1), decoded)
    with np.errstate(all="ignore"):
        return ((x.reshape(-1).astype(np.float64) - decoded) ** 2).reshape(-1, 32).sum(axis=1)


@pytest.mark.parametrize("how", ["naive", *SEARCHES])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@every_family
def test_q4_1_encoding_reports_nan_and_infinity_at_any_position(kernels, bad, how):
    x = np.tile(np.linspace(-1, 2, 32, dtype=np.float32), (70, 1))
    for position in range(32):
        x[2 * position, position] = bad
        one = np.ascontiguousarray(x[2 * position : 2 * position + 3])
        assert encode(kernels, how, one)[2][0] >= 0x7F800000
        if how == "naive" and kernels is NUMBA:
            assert quantize(kernels["q5_1"], one)[2][0] >= 0x7F800000
    assert encode(kernels, how, x)[2][0] >= 0x7F800000


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("case", battery())
def test_q4_1_searches_measure_the_error_of_their_blocks(how, case):
    x = battery()[case]
    blocks, lanes, found = encode(NUMBA, how, x)
    if not found[2]:
        np.testing.assert_allclose(lanes.sum(), errors(x, blocks).sum(), rtol=1e-6, atol=1e-37)


@given(
    x=rows, scales=hnp.arrays(np.uint16, 8), minima=hnp.arrays(np.uint16, 8), tie=st.sampled_from([0.0, 1.0, 0.0625])
)
def test_numba_and_numpy_encode_q4_1_with_any_scales_and_minima_alike(x, scales, minima, tie):
    x = np.where(np.arange(x.size) % 3 == 0, np.float32(tie), x)
    count = x.size // 32
    scales, minima = scales[:count] & 0xBFFF, minima[:count] & 0xBFFF
    results = []
    for kernels in BOTH:
        blocks, lanes = np.zeros(20 * count, np.uint8), np.zeros(load("blocks").LANES)
        found = kernels["q4_1"].encode(x, scales, minima, blocks, lanes)
        results.append((blocks.tobytes(), tuple(int(value) for value in found), lanes.tobytes()))
    assert results[0] == results[1]


def assert_searches_are_in_order(x: np.ndarray) -> None:
    blocks, _, _ = encode(NUMBA, "naive", x)
    header = np.ascontiguousarray(blocks[:, :4]).view(np.float16)
    fits = np.isfinite(header).all(axis=1)
    before = errors(x, blocks)
    for how in SEARCHES:
        chosen, _, (_, _, overflowed, _) = encode(NUMBA, how, x)
        assert overflowed == (~fits).sum()
        found = errors(x, chosen)
        assert (found[fits] <= before[fits] * (1 + 1e-6) + 1e-40).all()
        assert not found[fits & (before == 0)].any()
        before = found


@given(x=st.one_of(rows, likely_rows))
def test_no_q4_1_search_errs_more_than_a_cheaper_one(x):
    assert_searches_are_in_order(x)


@pytest.mark.parametrize("case", battery())
def test_no_q4_1_search_errs_more_than_a_cheaper_one_on_awkward_blocks(case):
    assert_searches_are_in_order(battery()[case].astype(np.float32))


@pytest.mark.parametrize("how", SEARCHES)
@every_family
def test_q4_1_searches_treat_each_block_by_itself(kernels, how):
    x = np.concatenate([battery()[case] for case in ("normal", "sparse", "constant", "scale is zero")])
    x = np.ascontiguousarray(np.random.default_rng(3).permutation(x + np.float32(0.5) * (x > 0)).astype(np.float32))
    scales, minima = search(kernels, how, x)
    for count in (1, 2, 15, 16, 17, 31, 33):
        some = search(kernels, how, x[5 : 5 + count])
        np.testing.assert_array_equal(some, (scales[5 : 5 + count], minima[5 : 5 + count]))
    assert search(kernels, how, x[:0])[0].size == 0


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("levels", range(2, 17))
def test_q4_1_searches_meet_equally_spaced_values(how, levels):
    rng = np.random.default_rng(levels)
    values = rng.integers(0, levels, (64, 32))
    values[:, :2] = 0, levels - 1
    x = (values * rng.uniform(0.01, 1, (64, 1)) - rng.uniform(0, 3, (64, 1))).astype(np.float32)
    blocks, _, _ = encode(NUMBA, how, x)
    assert errors(x, blocks).sum() < 1e-5 * x.var(axis=1).sum() * 32


#: squared error of the optimum over real scales and minima, from benchmarks/oracle_q4_1.py
OPTIMUM = {"normal": 19.4306982, "laplace": 48.0559494, "uniform": 0.930740478}


@pytest.mark.parametrize(("how", "limit"), [("als", 1.006), ("best", 1.001)])
@pytest.mark.parametrize("case", OPTIMUM)
def test_q4_1_searches_come_close_to_the_optimum(how, limit, case):
    x = sample(case)
    blocks, _, _ = encode(NUMBA, how, x)
    assert 1 - 1e-6 < np.sqrt(errors(x, blocks).sum() / OPTIMUM[case]) < limit


def sample(case: str) -> np.ndarray:
    """128 blocks."""
    rng = np.random.default_rng(11)
    draw = {"normal": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size), "uniform": rng.random}
    return draw[case]((128, 32)).astype(np.float32)


@pytest.mark.parametrize("text", ["q4_1", "q4_1:search=naive", "q4_1:search=als", "q4_1:search=best", "q5_1"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_q4_1_and_q5_1_codecs_round_trip_with_the_measured_error(text, dtype):
    codec = parse_type(text)
    values = np.random.default_rng(2).standard_normal((3, 70))
    stored = {
        F32: values.astype(np.float32),
        BF16: (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        F64: values,
    }[dtype]
    elements = Elements(dtype, stored)
    encoded = encode_with(codec, elements)
    assert (encoded.finite, encoded.overflowed, encoded.zeroed) == (True, 0, 0)
    assert len(encoded.parts[0]) == codec.nbytes((3, 70)) == 9 * BLOCK_BYTES[codec.id]
    assert segment_lengths(codec, (3, 70)) == {"blocks": 9 * BLOCK_BYTES[codec.id]}
    decoded = decode(codec, encoded.parts, (3, 70))
    squares = (elements.to_f32().astype(np.float64) - decoded) ** 2
    np.testing.assert_allclose(encoded.error.squares, squares.sum(), rtol=1e-5)
    assert squares.max() < (0.2 if codec.id == "q4_1" else 0.1) ** 2
    assert codec.histograms(encoded.parts, Chunk(0, 3, 0, 70))["histogram"].sum() == 9 * 32


def test_q4_1_and_q5_1_parameters_are_parsed_or_refused():
    assert parse_type("q4_1") == parse_type("q4_1:search=als")
    assert str(parse_type("q4_1")) == "q4_1"
    assert str(parse_type("q4_1:search=best")) == "q4_1:search=best"
    assert parse_type("q4_1").params() == {}
    assert [parse_type(f"q4_1:search={how}").takes_bf16 for how in ("naive", *SEARCHES)] == [True, False, False]
    with pytest.raises(TypeSpecError):
        parse_type("q4_1:search=worst")
    with pytest.raises(TypeSpecError):
        parse_type("q5_1:search=naive")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("how", ["naive", *SEARCHES])
def test_q4_1_codecs_report_nonfinite_overflowed_and_zeroed_blocks(how, bad):
    codec = parse_type(f"q4_1:search={how}")
    x = np.ones((2, 64), np.float32)
    x[1, 5] = bad
    assert not encode_with(codec, x).finite
    assert encode_with(codec, np.full((2, 64), 1e6, np.float32)).overflowed >= 4
    wide = np.tile(np.array([3e38, -3e38], np.float32), (2, 32))
    assert encode_with(codec, wide).overflowed >= 4
    assert encode_with(codec, np.full((2, 64), 1e-9, np.float32)).zeroed == 4
