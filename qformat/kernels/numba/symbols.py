"""Symbols made of several digits each, compiled. Twin of ``numpy/symbols.py`` (spec/codecs.md, "Streams")."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U8, inline, kernel
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as

EIGHT = np.uint64(0)  # bytes


@inline
def _symbol(digits, at, base, each):
    symbol = np.uint32(0)
    for i in range(each - 1, -1, -1):
        symbol = symbol * np.uint32(base) + digits[at + np.uint64(i)]
    return symbol


@kernel(f"void({U8}, int64, int64, uint8[::1])")
def join(digits, base, each, symbols):
    """Join ``each`` digits below ``base`` into every symbol, the least significant first; ``digits`` has each * symbols.size."""
    for j in range(symbols.size):
        at = np.uint64(each * j)
        if each == 5:  # a constant lets the compiler unroll the loop, which makes it several times as fast
            symbols[j] = _symbol(digits, at, base, 5)
        elif each == 3:
            symbols[j] = _symbol(digits, at, base, 3)
        elif each == 2:
            symbols[j] = _symbol(digits, at, base, 2)
        else:
            symbols[j] = _symbol(digits, at, base, each)


@kernel(f"void({U8}, {U8}, int64, uint8[::1])")
def split(symbols, table, each, digits):
    """Split symbols into ``each`` digits: the first of 8 in each row of ``table``, which has shape (256, 8), flat.

    All 8 are stored at once, and the next symbol overwrites those too many. ``digits`` may end within the last symbol.
    """
    safe = max(0, (digits.size - 8) // each)  # this many symbols leave room for all 8
    for j in range(min(safe, symbols.size)):
        store_as(digits, np.uint64(each * j), load_as(table, np.uint64(8) * np.uint64(symbols[j]), EIGHT))
    for i in range(each * min(safe, symbols.size), digits.size):
        digits[i] = table[8 * np.int64(symbols[i // each]) + i % each]


@kernel(f"void({U8}, {F32}, int64, float32[::1])")
def values(symbols, table, each, numbers):
    """Do as `split` with a table of float32."""
    safe = max(0, (numbers.size - 8) // each)
    for j in range(min(safe, symbols.size)):
        store(numbers, np.uint64(each * j), load(table, np.uint64(8) * np.uint64(symbols[j]), 8))
    for i in range(each * min(safe, symbols.size), numbers.size):
        numbers[i] = table[8 * np.int64(symbols[i // each]) + i % each]
