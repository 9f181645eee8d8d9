"""Shared parts of the searches for the scales of Q4_0 blocks, in numpy. Twin of ``numba/q4_0_search.py``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F32, U16, U32, Bools
from qformat.kernels.numpy.blocks import first_largest

SMALLEST = 0x33000000
HALF_INFINITY = 0x7C00


@np.errstate(all="ignore")
def search(x: F32, scales: U16, choose: Callable[[F32, F32], U32], chunk: int) -> None:
    """Choose the scales of blocks, `chunk` at a time, by `choose(values, first largest weights)`; then handle special blocks."""
    blocks = x.reshape(-1, 32)
    for start in range(0, len(blocks), chunk):
        values = blocks[start : start + chunk]
        first = first_largest(values)[:, 0]
        best = choose(values, first)
        alone, one_sign = _one_magnitude(values, first)
        if alone.any():
            best[alone] = _for_one_magnitude(first, one_sign)[alone]
        naive = half_bits(first * np.float32(-0.125)) & 0x7FFF
        best = np.where(naive >= HALF_INFINITY, naive, best)
        scales[start : start + chunk] = np.where(np.abs(first).view(np.uint32) > SMALLEST, best, 0)


def _one_magnitude(values: F32, first: F32) -> tuple[Bools, Bools]:
    """Return where all weights that are not zero have one magnitude, and where they have one sign."""
    zero = np.abs(values) == 0
    same = np.abs(values).view(np.uint32) == np.abs(first).view(np.uint32)[:, None]
    same_sign = values.view(np.uint32) == first.view(np.uint32)[:, None]
    return (zero | same).all(axis=1), (zero | same_sign).all(axis=1)


def _for_one_magnitude(first: F32, one_sign: Bools) -> U32:
    size = np.abs(first)
    negative = ((first.view(np.uint32) >> 16) & 0x8000) ^ 0x8000
    best = half_bits(size)
    least = np.abs(size - from_half_bits(best))
    for k in range(2, 9):
        nearest = half_bits(size / np.float32(k))
        for step in range(3):
            half = np.maximum(nearest + 2 - step, 1) - 1
            error = np.abs(size - from_half_bits(half) * np.float32(k))
            if k == 8:
                half = half | negative
                error = np.where(one_sign, error, size)
            best = np.where(error < least, half, best)
            least = np.where(error < least, error, least)
    return best


def half_bits(x: NDArray[np.floating]) -> U32:
    """Return floats rounded to binary16 as patterns."""
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def from_half_bits(half: U32) -> F32:
    """Return the values of binary16 patterns."""
    return half.astype(np.uint16).view(np.float16).astype(np.float32)
