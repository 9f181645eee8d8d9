"""Codes of 1 to 6 or 8 bits in a string of bits, and rows in runs of 32, in numpy. Twin of the documented ``numba/packing.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import I64, U8

_CHUNK = 1 << 15  # codes at a time, so that temporary arrays stay in cache


def unpack(packed: U8, codes: U8, width: int) -> None:
    """Unpack codes of `width` bits, a multiple of 32 of them, into bytes."""
    if width == 4:
        codes[0::2] = packed & 15
        codes[1::2] = packed >> 4
        return
    weights = (1 << np.arange(width)).astype(np.uint8)
    for start in range(0, codes.size, _CHUNK):
        part = packed[start * width // 8 : (start + _CHUNK) * width // 8]
        digits = np.unpackbits(part, bitorder="little").reshape(-1, width)
        codes[start : start + _CHUNK] = (digits * weights).sum(axis=1, dtype=np.uint8)


def pack(codes: U8, packed: U8, width: int) -> None:
    """Do the opposite of `unpack`."""
    if width == 4:
        packed[:] = codes[0::2] | (codes[1::2] << 4)
        return
    for start in range(0, codes.size, _CHUNK):
        part = codes[start : start + _CHUNK]
        digits = np.unpackbits(part[:, None], axis=1, count=width, bitorder="little")
        packed[start * width // 8 : (start + _CHUNK) * width // 8] = np.packbits(digits.reshape(-1), bitorder="little")


def groups_of_runs(padded: int, group: int, rows: int) -> I64:
    """Return the number of the group of each run of 32 elements, for rows of `padded` elements."""
    in_row = np.arange(0, padded, 32) // group
    count = -(-padded // group)
    return (np.arange(rows)[:, None] * count + in_row).ravel()


def valid_in_runs(padded: int, cols: int, rows: int) -> I64:
    """Return how many elements of each run of 32 are no padding."""
    return np.tile(np.minimum(cols - np.arange(0, padded, 32), 32), rows)
