"""Letters that stand for several symbols each, compiled. Twin of ``plain/letters.py`` (spec/codecs.md, "Streams")."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U8, inline, kernel
from qformat.kernels.numba.simd import load, load_as, store, store_as

EIGHT = np.uint64(0)  # bytes


@inline
def _letter(symbols, at, base, each):
    letter = np.uint32(0)
    for i in range(each - 1, -1, -1):
        letter = letter * np.uint32(base) + symbols[at + np.uint64(i)]
    return letter


@kernel(f"void({U8}, int64, int64, uint8[::1])")
def join(symbols, base, each, letters):
    """Make letters of ``each`` symbols below ``base``, the first counting least; there are as many as the letters need."""
    for j in range(letters.size):
        at = np.uint64(each * j)
        if each == 5:  # a number that the compiler knows makes this several times as fast
            letters[j] = _letter(symbols, at, base, 5)
        elif each == 3:
            letters[j] = _letter(symbols, at, base, 3)
        elif each == 2:
            letters[j] = _letter(symbols, at, base, 2)
        else:
            letters[j] = _letter(symbols, at, base, each)


@kernel(f"void({U8}, {U8}, int64, uint8[::1])")
def split(letters, table, each, symbols):
    """Give the symbols of letters: up to ``each`` of the 8 that ``table`` has for a letter; the last letter may be cut off."""
    safe = max(0, (symbols.size - 8) // each)  # letters after which 8 symbols still fit
    for j in range(min(safe, letters.size)):
        store_as(symbols, np.uint64(each * j), load_as(table, np.uint64(8) * np.uint64(letters[j]), EIGHT))
    for i in range(each * min(safe, letters.size), symbols.size):
        symbols[i] = table[8 * np.int64(letters[i // each]) + i % each]


@kernel(f"void({U8}, {F32}, int64, float32[::1])")
def values(letters, table, each, numbers):
    """Give numbers for letters as `split` gives symbols."""
    safe = max(0, (numbers.size - 8) // each)
    for j in range(min(safe, letters.size)):
        store(numbers, np.uint64(each * j), load(table, np.uint64(8) * np.uint64(letters[j]), 8))
    for i in range(each * min(safe, letters.size), numbers.size):
        numbers[i] = table[8 * np.int64(letters[i // each]) + i % each]
