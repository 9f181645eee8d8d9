"""Symbols that stand for several digits each, in numpy. Twin of ``numba/symbols.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, U8


def join(digits: U8, base: int, each: int, symbols: U8) -> None:
    """Make symbols of ``each`` digits below ``base``, the first counting least; there are as many as the symbols need."""
    powers = np.array([base**i for i in range(each)], np.uint32)
    symbols[:] = digits.reshape(symbols.size, each) @ powers


def split(symbols: U8, table: U8, each: int, digits: U8) -> None:
    """Give the digits of symbols: up to ``each`` of the 8 that ``table`` has for a symbol; the last symbol may be cut off."""
    digits[:] = table.reshape(256, 8)[symbols, :each].reshape(-1)[: digits.size]


def values(symbols: U8, table: F32, each: int, numbers: F32) -> None:
    """Give numbers for symbols as `split` gives digits."""
    numbers[:] = table.reshape(256, 8)[symbols, :each].reshape(-1)[: numbers.size]
