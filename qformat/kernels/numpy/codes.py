"""Packed codes of 4 and 5 bits of blocks of 32, in numpy. Twin of ``numba/codes.py``, which documents the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import I64, U8


def store_codes(packed: U8, codes: NDArray[Any]) -> None:
    """Fill 16 bytes of each row with 32 codes of 4 bits."""
    packed[:] = codes[:, :16] | (codes[:, 16:] << 4)


def load_codes(packed: U8) -> U8:
    """Return the codes of 4 bits of each row, the lower halves of the bytes first."""
    return np.hstack([packed & 15, packed >> 4])


def store_codes_5(packed: U8, codes: NDArray[Any]) -> None:
    """Fill 20 bytes of each row with 32 codes of 5 bits."""
    packed[:, :4] = np.packbits(codes >> 4, axis=1, bitorder="little")
    store_codes(packed[:, 4:], codes & 15)


def load_codes_5(packed: U8) -> U8:
    """Return the 32 codes of 5 bits of each row of 20 bytes."""
    codes: U8 = load_codes(packed[:, 4:]) | (np.unpackbits(packed[:, :4], axis=1, bitorder="little") << np.uint8(4))
    return codes


def count_codes(codes: U8, counts: I64) -> None:
    """Add to ``counts`` how often each code occurs."""
    counts += np.bincount(codes.ravel(), minlength=counts.size)
