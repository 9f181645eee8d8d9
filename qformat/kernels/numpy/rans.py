"""Interleaved rANS in numpy: all lanes take a step together. Twin of ``numba/rans.py``, which documents it."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import I64, U8, U16, U32


def histogram(symbols: U8, counts: I64) -> None:
    """Add how often each symbol occurs to 256 counts."""
    counts += np.bincount(symbols, minlength=256)


def encode(symbols: U8, frequencies: U32, precision: int, lanes: int, coded: U8) -> int:
    """Write states and words to the end of ``coded``; return where they begin.

    ``coded`` has 2 bytes for each symbol and 4 for each lane. Symbols that occur have a frequency above 0; the sum is 2^precision.
    """
    wide = frequencies.astype(np.uint64)
    starts = np.cumsum(wide) - wide
    limits = wide << np.uint64(32 - precision)
    states = np.full(lanes, 1 << 16, np.uint64)
    words: list[U16] = []
    for begin in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        row = symbols[begin : begin + lanes]
        x = states[: row.size]
        full = x >= limits[row]
        words.append(x[full].astype(np.uint16))
        x[full] >>= np.uint64(16)
        x[:] = (x // wide[row] << np.uint64(precision)) + x % wide[row] + starts[row]
    tail = np.concatenate([states.astype("<u4").view("<u2"), *words[::-1]]).astype("<u2").view(np.uint8)
    coded[coded.size - tail.size :] = tail
    return coded.size - tail.size


def decode(coded: U8, frequencies: U32, precision: int, lanes: int, symbols: U8) -> int:
    """Read states and words, and fill ``symbols``; return 0, or 1 if no encoder can have written these bytes."""
    if coded.size % 2:
        return 1
    wide = frequencies.astype(np.uint64)
    starts = np.cumsum(wide) - wide
    slots = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
    states = coded[: 4 * lanes].view("<u4").astype(np.uint64)
    words = coded[4 * lanes :].view("<u2")
    at = 0
    for begin in range(0, symbols.size, lanes):
        row = symbols[begin : begin + lanes]
        x = states[: row.size]
        y = x & np.uint64((1 << precision) - 1)
        row[:] = slots[y]
        x[:] = wide[row] * (x >> np.uint64(precision)) + y - starts[row]
        short = np.flatnonzero(x < 1 << 16)
        if at + short.size > words.size:
            return 1
        x[short] = (x[short] << np.uint64(16)) | words[at : at + short.size]
        at += short.size
    return int(at != words.size or bool((states != 1 << 16).any()))
