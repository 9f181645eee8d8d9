from __future__ import annotations

from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.kernels import load
from qformat.kernels.jit import floats as jit_floats
from qformat.kernels.jit import q4_0 as jit_q4_0
from qformat.kernels.plain import floats as plain_floats
from qformat.kernels.plain import q4_0 as plain_q4_0

FLOATS = [jit_floats, plain_floats]
Q4_0 = [jit_q4_0, plain_q4_0]

finite_f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = hnp.arrays(np.float32, st.integers(1, 8).map(lambda n: 32 * n), elements=finite_f32)


def every_f32(step: int = 9973) -> np.ndarray:
    patterns = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    borders = np.array([0x38800000, 0x47800000, 0x477FE000, 0x477FF000, 0x33000000, 0x33000001, 0x7F7F8000], np.uint32)
    near = (borders[:, None] + np.arange(-70, 70).astype(np.uint32)).ravel()
    both = np.concatenate([patterns, near, near | 0x80000000]).astype(np.uint32)
    return both.view(np.float32)


def gguf_q4_0(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x.reshape(-1, 32), gguf.GGMLQuantizationType.Q4_0).reshape(-1)


def quantize(kernels: ModuleType, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    blocks = np.zeros(x.size // 32 * 18, np.uint8)
    lanes = np.zeros(kernels.LANES)
    found = kernels.quantize(x.reshape(-1), blocks, lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def test_the_compiled_kernels_are_the_ones_that_are_used():
    assert load("q4_0") is jit_q4_0
    assert load("floats") is jit_floats


@pytest.mark.parametrize("floats", FLOATS)
def test_every_binary16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.f16_to_f32(patterns, values)
    expected = patterns.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(values[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("floats", FLOATS)
def test_every_bfloat16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.bf16_to_f32(patterns, values)
    np.testing.assert_array_equal(values.view(np.uint32), patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize("floats", FLOATS)
def test_rounding_to_binary16_agrees_with_numpy_and_torch(floats):
    values = every_f32()
    halves = np.empty(values.size, np.uint16)
    floats.f32_to_f16(values, halves)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(halves[number], expected[number])
    assert np.isnan(halves[~number].view(np.float16)).all()
    np.testing.assert_array_equal(
        expected[number].view(np.int16), torch.from_numpy(values[number]).half().view(torch.int16)
    )


@pytest.mark.parametrize("floats", FLOATS)
def test_rounding_to_bfloat16_agrees_with_torch(floats):
    values = every_f32()
    halves = np.empty(values.size, np.uint16)
    floats.f32_to_bf16(values, halves)
    number = ~np.isnan(values)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(halves[number], expected[number])
    assert ((halves[~number] & 0x7FFF) > 0x7F80).all()


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100])
def test_twins_agree_on_every_length(size):
    x = every_f32(40_000_003)[:size].copy()
    assert x.size == size
    for name in ("f32_to_f16", "f32_to_bf16"):
        one, two = np.empty(size, np.uint16), np.empty(size, np.uint16)
        getattr(jit_floats, name)(x, one)
        getattr(plain_floats, name)(x, two)
        np.testing.assert_array_equal(one, two)
        assert jit_floats.peak_16(one) == plain_floats.peak_16(one)
    assert jit_floats.peak_f32(x) == plain_floats.peak_f32(x) == (np.abs(x).view(np.uint32).max() if size else 0)


@given(rows, st.integers(0, 31))
def test_twins_measure_the_same_error(x, cut):
    x = x[: x.size - cut]
    y = x[::-1].copy()
    results = []
    with np.errstate(over="ignore", invalid="ignore"):
        for floats in FLOATS:
            lanes = np.zeros(32)
            counts = np.zeros(1 << 19, np.int64)
            largest = floats.difference(x, y, lanes)
            floats.error_histogram(x, y, counts)
            results.append((int(largest), lanes.tobytes(), counts.tobytes()))
        assert results[0] == results[1]
        assert results[0][0] == np.abs(x - y).view(np.uint32).max()


@given(rows)
def test_q4_0_equals_gguf_and_its_twin(x):
    blocks, lanes, found = quantize(jit_q4_0, x)
    np.testing.assert_array_equal(blocks, gguf_q4_0(x))
    plain_blocks, plain_lanes, plain_found = quantize(plain_q4_0, x)
    np.testing.assert_array_equal(blocks, plain_blocks)
    assert found == plain_found
    if not found[2]:
        assert lanes.tobytes() == plain_lanes.tobytes()


def battery() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((64, 32)).astype(np.float32)
    grid = np.arange(-8, 8, dtype=np.float32) / 8
    return {
        "normal": normal,
        "heavy tails": rng.standard_cauchy((64, 32)).astype(np.float32),
        "zeros": np.zeros((4, 32), np.float32),
        "negative zeros": np.full((4, 32), -0.0, np.float32),
        "one weight": np.eye(32, dtype=np.float32),
        "tied extremes": np.tile(np.array([1, -1], np.float32), (4, 16)),
        "tied extremes, negative first": np.tile(np.array([-1, 1], np.float32), (4, 16)),
        "halfway codes": np.tile(np.concatenate([grid, grid + 1 / 16]), (3, 1)).astype(np.float32),
        "constant": np.full((4, 32), 0.3, np.float32),
        "ternary": rng.choice(np.array([-0.7, 0, 0.7], np.float32), (64, 32)),
        "sparse": (normal * (rng.random((64, 32)) < 0.1)).astype(np.float32),
        "scale is a subnormal half": normal * np.float32(1e-6),
        "scale vanishes": normal * np.float32(1e-9),
        "subnormal": normal * np.float32(1e-39),
        "smallest subnormal": np.where(normal > 0, np.float32(1e-45), np.float32(0)),
        "near overflow of the scale": normal / np.abs(normal).max() * np.float32(524000),
        "scale overflows": normal * np.float32(1e7),
        "largest floats": np.sign(normal) * np.finfo(np.float32).max,
    }


@pytest.mark.parametrize("name", battery())
@pytest.mark.parametrize("kernels", Q4_0)
def test_q4_0_equals_gguf_on_awkward_blocks(kernels, name, reference):
    x = battery()[name].astype(np.float32)
    blocks, lanes, (peak, largest, overflowed, vanished) = quantize(kernels, x)
    np.testing.assert_array_equal(blocks, gguf_q4_0(x))
    assert blocks.tobytes() == reference.quantize_q4_0(x)
    assert peak == np.abs(x).view(np.uint32).max()
    scales = blocks.reshape(-1, 18)[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
    assert overflowed == np.isinf(scales).sum()
    assert vanished == ((scales == 0) & (x != 0).any(axis=1)).sum()
    if not overflowed:
        decoded = np.empty(x.size, np.float32)
        kernels.dequantize(blocks, decoded)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(blocks.reshape(-1, 18), gguf.GGMLQuantizationType.Q4_0)
        np.testing.assert_array_equal(decoded, expected.reshape(-1))
        error = (x.reshape(-1) - decoded).astype(np.float64)
        np.testing.assert_allclose(lanes.sum(), (error**2).sum(), rtol=1e-6, atol=1e-40)
        assert np.uint32(largest).view(np.float32) == np.abs(error).max()


@given(hnp.arrays(np.uint16, 64, elements=st.integers(0, 0xFFFF).filter(lambda p: p & 0x7F80 != 0x7F80)))
def test_q4_0_of_bfloat16_is_q4_0_of_its_values(patterns):
    values = (patterns.astype(np.uint32) << 16).view(np.float32)
    expected = quantize(jit_q4_0, values)
    for kernels in Q4_0:
        blocks, lanes, found = quantize(kernels, patterns)
        np.testing.assert_array_equal(blocks, expected[0])
        assert found == expected[2]
        if not found[2]:
            assert lanes.tobytes() == expected[1].tobytes()


@given(hnp.arrays(np.uint8, (4, 18)))
def test_any_bytes_decode_as_with_gguf(blocks):
    blocks[:, 1] &= 0xBF  # keep the scale finite
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0).reshape(-1)
    for kernels in Q4_0:
        values = np.empty(128, np.float32)
        kernels.dequantize(blocks.reshape(-1), values)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kernels", Q4_0)
def test_a_value_that_is_not_finite_is_noticed_wherever_it_stands(kernels, bad):
    for position in range(64):
        x = np.ones(64, np.float32)
        x[position] = bad
        assert quantize(kernels, x)[2][0] >= 0x7F800000


@pytest.mark.parametrize("kernels", Q4_0)
def test_code_histogram(kernels):
    blocks, _, _ = quantize(jit_q4_0, battery()["normal"])
    counts = np.ones(16, np.int64)
    kernels.code_histogram(blocks, counts)
    codes = blocks.reshape(-1, 18)[:, 2:]
    expected = [((codes & 15) == code).sum() + ((codes >> 4) == code).sum() + 1 for code in range(16)]
    np.testing.assert_array_equal(counts, expected)
