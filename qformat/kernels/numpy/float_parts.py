"""Floats in parts (spec/codecs.md, "`lossless`"), in numpy. Twin of ``numba/float_parts.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import I64, U8, U16, U32

ELSEWHERE = 255


def split_upper(upper: U16, base: int, heads: U8, low: U8, high: U8) -> int:
    """Split the upper 16 bits into parts; return how many heads do not fit."""
    bits = upper.astype(np.int64)
    heads[:] = np.minimum(((bits >> 5) - base) & 1023, ELSEWHERE)
    _pack(bits & 15, low, 2)
    _pack(((bits >> 14) & 2) | ((bits >> 4) & 1), high, 4)
    return int((heads == ELSEWHERE).sum())


def join_upper(heads: U8, low: U8, high: U8, base: int, elsewhere: U16, upper: U16) -> None:
    """Do the opposite; ``elsewhere`` has exponent and two bits of mantissa, below 1024, for each head of 255."""
    value = (heads.astype(np.int64) + base) & 1023
    if elsewhere.size:
        value[heads == ELSEWHERE] = elsewhere
    both = _unpack(high, 4, upper.size)
    upper[:] = (value << 5) | _unpack(low, 2, upper.size) | ((both & 1) << 4) | ((both >> 1) << 15)


def _pack(digits: I64, symbols: U8, each: int) -> None:
    shifts = 8 // each * np.arange(each)
    padded = np.pad(digits, (0, symbols.size * each - digits.size)).reshape(-1, each)
    symbols[:] = (padded << shifts).sum(axis=1)


def _unpack(symbols: U8, each: int, count: int) -> I64:
    shifts = 8 // each * np.arange(each)
    return ((symbols[:, None].astype(np.int64) >> shifts) & ((1 << 8 // each) - 1)).reshape(-1)[:count]


def split_32(patterns: U32, upper: U16, second: U8, first: U8) -> None:
    """Split patterns of 32 bits: the upper 16, bits 8 to 15, bits 0 to 7."""
    upper[:], second[:], first[:] = patterns >> 16, patterns >> 8 & 255, patterns & 255


def join_32(upper: U16, second: U8, first: U8, patterns: U32) -> None:
    """Do the opposite of `split_32`."""
    patterns[:] = (upper.astype(np.uint32) << 16) | (second.astype(np.uint32) << 8) | first


def split_16(patterns: U16, second: U8, first: U8) -> None:
    """Split patterns of 16 bits: the upper and the lower byte."""
    second[:], first[:] = patterns >> 8, patterns & 255


def join_16(second: U8, first: U8, patterns: U16) -> None:
    """Do the opposite of `split_16`."""
    patterns[:] = (second.astype(np.uint16) << 8) | first


def row_sums(upper: U16, cols: int, shift: int, mask: int, sums: I64) -> None:
    """Sum ``(element >> shift) & mask`` over each row of ``cols`` elements."""
    sums[:] = ((upper >> shift) & mask).reshape(-1, cols).sum(axis=1, dtype=np.int64)


def count_rows(upper: U16, cols: int, groups: U8, shift: int, mask: int, counts: I64) -> None:
    """Count ``(element >> shift) & mask``, with 1024 counts for each group of rows; ``groups`` has the group of each row."""
    keys = np.repeat(groups.astype(np.int64) << 10, cols) + ((upper >> shift) & mask)
    counts += np.bincount(keys, minlength=counts.size)


def row_bits(patterns: U32, cols: int, used: U32) -> None:
    """Compute for each row of ``cols`` elements the bits set in any of them."""
    used[:] = np.bitwise_or.reduce(patterns.reshape(-1, cols), axis=1)
