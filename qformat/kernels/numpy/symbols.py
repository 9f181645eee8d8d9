"""Symbols made of several digits each, in numpy. Twin of ``numba/symbols.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, U8


def join(digits: U8, base: int, each: int, symbols: U8) -> None:
    """Join ``each`` digits below ``base`` into every symbol, the least significant first."""
    powers = np.array([base**i for i in range(each)], np.uint32)
    symbols[:] = digits.reshape(symbols.size, each) @ powers


def split(symbols: U8, table: U8, each: int, digits: U8) -> None:
    """Split symbols into ``each`` digits: the first of 8 in each row of ``table``."""
    digits[:] = table.reshape(256, 8)[symbols, :each].reshape(-1)[: digits.size]


def values(symbols: U8, table: F32, each: int, numbers: F32) -> None:
    """Do as `split` with a table of float32."""
    numbers[:] = table.reshape(256, 8)[symbols, :each].reshape(-1)[: numbers.size]
