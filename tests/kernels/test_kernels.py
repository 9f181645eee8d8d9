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
from tests.helpers.kernels import FAMILIES, battery, every_f32, modules, rows

FLOATS = [each["floats"] for each in modules("floats")]
every_floats = pytest.mark.parametrize("floats", FLOATS, ids=FAMILIES)
# Bytes of a block, and gguf's name
FORMATS = {
    "q4_0": (18, gguf.GGMLQuantizationType.Q4_0),
    "q5_0": (22, gguf.GGMLQuantizationType.Q5_0),
    "q8_0": (34, gguf.GGMLQuantizationType.Q8_0),
}
BOTH = [NUMBA, NUMPY] = modules(*FORMATS)
every_family = pytest.mark.parametrize("kernels", BOTH, ids=FAMILIES)
every_format = pytest.mark.parametrize("name", FORMATS)


def gguf_blocks(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x.reshape(-1, 32), FORMATS[name][1]).reshape(-1)


def gguf_values(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.reshape(-1, FORMATS[name][0]), FORMATS[name][1]).reshape(-1)


def quantize(kernels: ModuleType, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    size = FORMATS[kernels.__name__.rpartition(".")[2]][0]
    blocks = np.zeros(x.size // 32 * size, np.uint8)
    lanes = np.zeros(load("blocks").LANES)
    found = kernels.quantize(x.reshape(-1), blocks, lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def test_numba_kernels_are_loaded_by_default():
    assert load("q4_0") is NUMBA["q4_0"]
    assert load("floats") is FLOATS[0]


@every_floats
def test_every_binary16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.f16_to_f32(patterns, values)
    expected = patterns.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(values[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@every_floats
def test_every_bfloat16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.bf16_to_f32(patterns, values)
    np.testing.assert_array_equal(values.view(np.uint32), patterns.astype(np.uint32) << 16)


@every_floats
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


@every_floats
def test_rounding_to_bfloat16_agrees_with_torch(floats):
    values = every_f32()
    halves = np.empty(values.size, np.uint16)
    floats.f32_to_bf16(values, halves)
    number = ~np.isnan(values)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(halves[number], expected[number])
    assert ((halves[~number] & 0x7FFF) > 0x7F80).all()


@every_format
@given(x=rows)
def test_blocks_without_minima_are_those_of_gguf(name, x):
    blocks, lanes, found = quantize(NUMBA[name], x)
    np.testing.assert_array_equal(blocks, gguf_blocks(name, x))
    numpy_blocks, numpy_lanes, numpy_found = quantize(NUMPY[name], x)
    np.testing.assert_array_equal(blocks, numpy_blocks)
    assert found == numpy_found
    if not found[2]:
        assert lanes.tobytes() == numpy_lanes.tobytes()


@every_format
@pytest.mark.parametrize("case", battery())
@every_family
def test_awkward_blocks_without_minima_are_those_of_gguf(kernels, case, name, reference):
    x = battery()[case].astype(np.float32)
    blocks, lanes, (peak, largest, overflowed, zeroed) = quantize(kernels[name], x)
    np.testing.assert_array_equal(blocks, gguf_blocks(name, x))
    if name == "q4_0":
        assert blocks.tobytes() == reference.quantize_q4_0(x)
    assert peak == np.abs(x).view(np.uint32).max()
    scales = blocks.reshape(-1, FORMATS[name][0])[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
    assert overflowed == np.isinf(scales).sum()
    assert zeroed == ((scales == 0) & (x != 0).any(axis=1)).sum()
    if not overflowed:
        decoded = np.empty(x.size, np.float32)
        kernels[name].dequantize(blocks, decoded)
        np.testing.assert_array_equal(decoded, gguf_values(name, blocks))
        error = (x.reshape(-1) - decoded).astype(np.float64)
        np.testing.assert_allclose(lanes.sum(), (error**2).sum(), rtol=1e-6, atol=1e-40)
        assert np.uint32(largest).view(np.float32) == np.abs(error).max()


@every_format
@given(patterns=hnp.arrays(np.uint16, 64, elements=st.integers(0, 0xFFFF).filter(lambda p: p & 0x7F80 != 0x7F80)))
def test_blocks_of_bfloat16_are_those_of_the_same_float32_values(name, patterns):
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
def test_blocks_without_minima_decode_as_in_gguf(name, data):
    blocks = data.draw(hnp.arrays(np.uint8, (4, FORMATS[name][0])))
    blocks[:, 1] &= 0xBF  # keep the scale finite
    expected = gguf_values(name, blocks)
    for kernels in BOTH:
        values = np.empty(128, np.float32)
        kernels[name].dequantize(blocks.reshape(-1), values)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_family
def test_quantizing_reports_nan_and_infinity_at_any_position(kernels, bad, name):
    for position in range(64):
        x = np.ones(64, np.float32)
        x[position] = bad
        assert quantize(kernels[name], x)[2][0] >= 0x7F800000


@every_format
def test_block_kernels_take_read_only_arrays(name):
    x = np.ones(64, np.float32)
    blocks, _, _ = quantize(NUMBA[name], x)
    x.flags.writeable = blocks.flags.writeable = False
    np.testing.assert_array_equal(quantize(NUMBA[name], x)[0], blocks)
    NUMBA[name].dequantize(blocks, np.empty(64, np.float32))


@pytest.mark.parametrize(("name", "zero"), [("q4_0", 8), ("q5_0", 16)])
def test_block_histograms_count_each_code(name, zero):
    blocks, _, _ = quantize(NUMBA[name], battery()["normal"])
    scales = blocks.reshape(-1, FORMATS[name][0])[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.rint(gguf_values(name, blocks).reshape(-1, 32) / scales).astype(int) + zero
    expected = np.bincount(codes.ravel(), minlength=2 * zero) + 1
    for kernels in BOTH:
        counts = np.ones(2 * zero, np.int64)
        kernels[name].code_histogram(blocks, counts)
        np.testing.assert_array_equal(counts, expected)
