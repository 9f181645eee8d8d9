"""Letters that stand for several symbols each, in numpy. Twin of ``jit/letters.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def join(symbols: U8, base: int, each: int, letters: U8) -> None:
    """Make letters of ``each`` symbols below ``base``, the first counting least; there are as many as the letters need."""
    powers = np.array([base**i for i in range(each)], np.uint32)
    letters[:] = symbols.reshape(letters.size, each) @ powers


def split(letters: U8, table: U8, each: int, symbols: U8) -> None:
    """Give the symbols of letters: up to ``each`` of the 8 that ``table`` has for a letter; the last letter may be cut off."""
    symbols[:] = table.reshape(256, 8)[letters, :each].reshape(-1)[: symbols.size]


def values(letters: U8, table: F32, each: int, numbers: F32) -> None:
    """Give numbers for letters as `split` gives symbols."""
    numbers[:] = table.reshape(256, 8)[letters, :each].reshape(-1)[: numbers.size]
