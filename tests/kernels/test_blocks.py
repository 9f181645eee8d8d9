"""Kernels of GGUF's block formats, quantizing as naively as gguf does; the gguf package is the judge."""

from __future__ import annotations

from types import ModuleType

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.kernels import load
from tests.helpers.kernels import FAMILIES, battery, modules, rows

# Bytes of a block, of its scale and minimum, and the code of zero
FORMATS = {"q4_0": (18, 2, 8), "q5_0": (22, 2, 16), "q8_0": (34, 2, 0), "q4_1": (20, 4, 0), "q5_1": (24, 4, 0)}
BOTH = [NUMBA, _] = modules(*FORMATS)
every_format = pytest.mark.parametrize("name", FORMATS)
every_family = pytest.mark.parametrize("kernels", BOTH, ids=FAMILIES)
Found = tuple[np.ndarray, np.ndarray, tuple[int, ...]]


def gguf_blocks(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x.reshape(-1, 32), gguf.GGMLQuantizationType[name.upper()])


def gguf_values(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]).reshape(-1)


def quantize(module: ModuleType, x: np.ndarray) -> Found:
    """Return the blocks, partial sums of squared errors, and (peak, largest error, overflowed, zeroed)."""
    size = FORMATS[module.__name__.rpartition(".")[2]][0]
    blocks, lanes = np.zeros((x.size // 32, size), np.uint8), np.zeros(load("blocks").LANES)
    found = module.quantize(x.reshape(-1), blocks.reshape(-1), lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def header(name: str, blocks: np.ndarray) -> np.ndarray:
    """Return the scale, and the minimum if there is one, of each block."""
    return np.ascontiguousarray(blocks[:, : FORMATS[name][1]]).view(np.float16).astype(np.float32)


def certain(name: str, x: np.ndarray) -> np.ndarray:
    """Return which blocks have one smallest value, if the format stores it.

    Where it is a zero, and there are zeros of both signs, numpy's minimum may be either (it depends on its vector code).
    """
    values = x.reshape(-1, 32)
    zero, minus = values == 0, np.signbit(values)
    unclear = (values.min(axis=1) == 0) & (zero & minus).any(axis=1) & (zero & ~minus).any(axis=1)
    return ~(unclear & (FORMATS[name][1] == 4))


@every_format
def test_numba_kernels_are_loaded_by_default(name):
    assert load(name) is NUMBA[name]


@every_format
@given(x=rows)
def test_naive_blocks_are_those_of_gguf(name, x):
    blocks, _, _ = quantize(NUMBA[name], x)
    sure = certain(name, x)
    np.testing.assert_array_equal(blocks[sure], gguf_blocks(name, x)[sure])


@every_format
@pytest.mark.parametrize("case", battery())
@every_family
def test_naive_blocks_of_awkward_weights_are_those_of_gguf(kernels, case, name, reference):
    x = battery()[case]
    blocks, lanes, (peak, largest, overflowed, zeroed) = quantize(kernels[name], x)
    sure = certain(name, x)
    np.testing.assert_array_equal(blocks[sure], gguf_blocks(name, x)[sure])
    if name == "q4_0":
        assert blocks.tobytes() == reference.quantize_q4_0(x)
    assert peak == np.abs(x).view(np.uint32).max()
    numbers = header(name, blocks)
    assert overflowed == np.isinf(numbers).any(axis=1).sum()
    assert zeroed == ((numbers == 0).all(axis=1) & (x != 0).any(axis=1)).sum()
    if not overflowed:
        decoded = np.empty(x.size, np.float32)
        kernels[name].dequantize(blocks.reshape(-1), decoded)
        np.testing.assert_array_equal(decoded, gguf_values(name, blocks))
        error = x.reshape(-1) - decoded
        np.testing.assert_allclose(lanes.sum(), (error.astype(np.float64) ** 2).sum(), rtol=1e-6, atol=1e-40)
        assert np.uint32(largest).view(np.float32) == np.abs(error).max()


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
@every_family
@pytest.mark.parametrize("signs", [(0.0, -0.0), (-0.0, 0.0)])
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_the_first_of_several_zeros_is_the_minimum_of_a_block(kernels, name, signs, others):
    x = np.full(32, others, np.float32)
    x[[7, 20]] = signs
    x[:7] = np.abs(others) or signs[0]
    blocks, _, _ = quantize(kernels[name], x)
    assert blocks[0, 3] == (0x80 if np.signbit(np.float32(signs[0])) else 0)
    assert blocks[0, 1] & 0x80 == 0


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
def test_random_blocks_decode_as_in_gguf(name, data):
    blocks = data.draw(hnp.arrays(np.uint8, (4, FORMATS[name][0])))
    blocks[:, 1 : FORMATS[name][1] : 2] &= 0xBF  # keep the scale and the minimum finite
    expected = gguf_values(name, blocks)
    for kernels in BOTH:
        values = np.empty(128, np.float32)
        kernels[name].dequantize(blocks.reshape(-1), values)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@every_format
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
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
    NUMBA[name].dequantize(blocks.reshape(-1), np.empty(64, np.float32))


@pytest.mark.parametrize(("name", "size"), [("q4_0", 16), ("q5_0", 32), ("q4_1", 16), ("q5_1", 32)])
def test_block_histograms_count_each_code(name, size):
    blocks, _, _ = quantize(NUMBA[name], battery()["normal"])
    numbers = header(name, blocks)
    minima = numbers[:, 1:] if numbers.shape[1] == 2 else 0
    codes = (
        np.rint((gguf_values(name, blocks).reshape(-1, 32) - minima) / numbers[:, :1]).astype(int) + FORMATS[name][2]
    )
    expected = np.bincount(codes.ravel(), minlength=size) + 1
    for kernels in BOTH:
        counts = np.ones(size, np.int64)
        kernels[name].code_histogram(blocks.reshape(-1), counts)
        np.testing.assert_array_equal(counts, expected)
