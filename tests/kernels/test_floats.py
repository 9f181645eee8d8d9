"""Kernels that convert between float32 and the 16-bit floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qformat.kernels import load
from tests.helpers.kernels import FAMILIES, every_f32, modules

BOTH = [each["floats"] for each in modules("floats")]
every_family = pytest.mark.parametrize("floats", BOTH, ids=FAMILIES)


def test_numba_kernels_are_loaded_for_floats_by_default():
    assert load("floats") is BOTH[0]


@every_family
def test_every_binary16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.f16_to_f32(patterns, values)
    expected = patterns.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(values[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@every_family
def test_every_bfloat16_is_widened_exactly(floats):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(patterns.size, np.float32)
    floats.bf16_to_f32(patterns, values)
    np.testing.assert_array_equal(values.view(np.uint32), patterns.astype(np.uint32) << 16)


@every_family
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


@every_family
def test_rounding_to_bfloat16_agrees_with_torch(floats):
    values = every_f32()
    halves = np.empty(values.size, np.uint16)
    floats.f32_to_bf16(values, halves)
    number = ~np.isnan(values)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(halves[number], expected[number])
    assert ((halves[~number] & 0x7FFF) > 0x7F80).all()
