from __future__ import annotations

from types import ModuleType

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.codecs.base import Chunk
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, F32, F64, Elements
from qformat.errors import TypeSpecError
from qformat.kernels import load
from tests.helpers.codecs import decode, segment_lengths
from tests.helpers.codecs import encode as encode_with
from tests.helpers.kernels import FAMILIES, battery, modules, rows

FORMATS = {"q4_1": (20, gguf.GGMLQuantizationType.Q4_1), "q5_1": (24, gguf.GGMLQuantizationType.Q5_1)}
NAMES = [*FORMATS, "q4_1_als", "q4_1_best"]
BOTH = [NUMBA, NUMPY] = modules(*NAMES)
SEARCHES = ["als", "best"]
every_format = pytest.mark.parametrize("name", FORMATS)
every_family = pytest.mark.parametrize("kernels", BOTH, ids=FAMILIES)

# Blocks as weights are: around some value, of some spread, perhaps with few different values.
numbers = st.sampled_from([0.0, 1.0, -0.7, 10.0, 3e-5, -1e-7, 1000.0])
likely = st.tuples(
    hnp.arrays(np.float32, st.integers(1, 40).map(lambda n: 32 * n), elements=st.integers(-9, 9).map(np.float32)),
    numbers,
    numbers,
).map(lambda parts: (parts[0] * np.float32(parts[1]) + np.float32(parts[2])).astype(np.float32))


def gguf_blocks(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x.reshape(-1, 32), FORMATS[name][1]).reshape(-1, FORMATS[name][0])


def gguf_values(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.reshape(-1, FORMATS[name][0]), FORMATS[name][1]).reshape(-1)


def certain(x: np.ndarray) -> np.ndarray:
    """Which blocks have only one smallest value.

    If it is a zero, and there are zeros of both signs, numpy's minimum may be either of them (it depends on its vector code).
    """
    values = x.reshape(-1, 32)
    zero, minus = values == 0, np.signbit(values)
    return ~((values.min(axis=1) == 0) & (zero & minus).any(axis=1) & (zero & ~minus).any(axis=1))


def quantize(module: ModuleType, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    size = FORMATS[module.__name__.rpartition(".")[2]][0]
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


def test_numba_kernels_are_loaded_for_q4_1_and_q5_1():
    for name in NAMES:
        assert load(name) is NUMBA[name]


@every_format
@given(x=rows)
def test_naive_q4_1_and_q5_1_blocks_are_those_of_gguf(name, x):
    blocks, lanes, found = quantize(NUMBA[name], x)
    np.testing.assert_array_equal(blocks[certain(x)], gguf_blocks(name, x)[certain(x)])
    numpy_blocks, numpy_lanes, numpy_found = quantize(NUMPY[name], x)
    np.testing.assert_array_equal(blocks, numpy_blocks)
    assert found == numpy_found
    if not found[2]:
        assert lanes.tobytes() == numpy_lanes.tobytes()


@every_format
@pytest.mark.parametrize("case", battery())
@every_family
def test_awkward_q4_1_and_q5_1_blocks_are_those_of_gguf(kernels, case, name):
    x = battery()[case].astype(np.float32)
    blocks, lanes, (peak, largest, overflowed, zeroed) = quantize(kernels[name], x)
    np.testing.assert_array_equal(blocks[certain(x)], gguf_blocks(name, x)[certain(x)])
    assert peak == np.abs(x).view(np.uint32).max()
    header = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32)
    assert overflowed == np.isinf(header).any(axis=1).sum()
    assert zeroed == ((header == 0).all(axis=1) & (x != 0).any(axis=1)).sum()
    if not overflowed:
        decoded = np.empty(x.size, np.float32)
        kernels[name].dequantize(blocks.reshape(-1), decoded)
        np.testing.assert_array_equal(decoded, gguf_values(name, blocks))
        error = x.reshape(-1) - decoded
        np.testing.assert_allclose(lanes.sum(), (error.astype(np.float64) ** 2).sum(), rtol=1e-6, atol=1e-40)
        assert np.uint32(largest).view(np.float32) == np.abs(error).max()


@every_format
@every_family
@pytest.mark.parametrize("signs", [(0.0, -0.0), (-0.0, 0.0)])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_the_first_of_several_zeros_is_the_minimum_of_a_block(kernels, name, signs, rest):
    x = np.full(32, rest, np.float32)
    x[[7, 20]] = signs
    x[:7] = np.abs(rest) or signs[0]
    blocks, _, _ = quantize(kernels[name], x)
    assert blocks[0, 3] == (0x80 if np.signbit(np.float32(signs[0])) else 0)
    assert blocks[0, 1] & 0x80 == 0


@every_format
@given(patterns=hnp.arrays(np.uint16, 64, elements=st.integers(0, 0xFFFF).filter(lambda p: p & 0x7F80 != 0x7F80)))
def test_q4_1_and_q5_1_blocks_of_bfloat16_are_those_of_the_same_float32_values(name, patterns):
    values = (patterns.astype(np.uint32) << 16).view(np.float32)
    expected = quantize(NUMBA[name], values)
    for kernels in BOTH:
        blocks, lanes, found = quantize(kernels[name], patterns)
        np.testing.assert_array_equal(blocks, expected[0])
        assert found == expected[2]
        if not found[2]:
            assert lanes.tobytes() == expected[1].tobytes()


@every_format
@given(data=st.data())
def test_q4_1_and_q5_1_blocks_decode_as_in_gguf(name, data):
    blocks = data.draw(hnp.arrays(np.uint8, (4, FORMATS[name][0])))
    blocks[:, [1, 3]] &= 0xBF  # keep the scale and the minimum finite
    expected = gguf_values(name, blocks)
    for kernels in BOTH:
        values = np.empty(128, np.float32)
        kernels[name].dequantize(blocks.reshape(-1), values)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@every_format
def test_q4_1_and_q5_1_histograms_count_each_code(name):
    blocks, _, _ = quantize(NUMBA[name], battery()["normal"])
    header = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32)
    codes = np.rint((gguf_values(name, blocks).reshape(-1, 32) - header[:, 1:]) / header[:, :1]).astype(int)
    top = 16 if name == "q4_1" else 32
    expected = np.bincount(codes.ravel(), minlength=top) + 1
    for kernels in BOTH:
        counts = np.ones(top, np.int64)
        kernels[name].code_histogram(blocks.reshape(-1), counts)
        np.testing.assert_array_equal(counts, expected)


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


@given(x=st.one_of(rows, likely))
def test_no_q4_1_search_errs_more_than_a_cheaper_one(x):
    assert_searches_are_in_order(x)


@pytest.mark.parametrize("case", battery())
def test_no_q4_1_search_errs_more_than_a_cheaper_one_on_awkward_blocks(case):
    assert_searches_are_in_order(battery()[case].astype(np.float32))


@pytest.mark.parametrize("how", SEARCHES)
@every_family
def test_q4_1_searches_treat_each_block_by_itself(kernels, how):
    x = np.concatenate([battery()[case] for case in ("normal", "sparse", "constant", "scale vanishes")])
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
    assert len(encoded.parts[0]) == codec.nbytes((3, 70)) == 9 * FORMATS[codec.id][0]
    assert segment_lengths(codec, (3, 70)) == {"blocks": 9 * FORMATS[codec.id][0]}
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
