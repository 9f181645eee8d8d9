"""Floats in parts (spec/codecs.md, "`lossless`"), compiled. Twin of ``numpy/float_parts.py``.

The upper 16 bits of a float32, or a bfloat16, are sign, exponent and 7 bits of mantissa. Exponent and two bits of mantissa, less a
base, are its *head*, 255 if that does not fit; *low* has the lowest 4 bits, two to a symbol; *high* has sign and bit 4, four to a
symbol. In ``join`` functions all arrays but the last are inputs, in ``split`` functions all but the first are results; sizes agree.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import U8, U16, U32, kernel
from qformat.kernels.numba.packing import pack_32, unpack_32
from qformat.kernels.numba.simd import minimum, zeros_u32
from qformat.kernels.numba.simd_casts import to_u8, to_u16, to_u32
from qformat.kernels.numba.simd_lanes import or_lanes, sum_lanes
from qformat.kernels.numba.simd_memory import load, store

ELSEWHERE = 255


@kernel(f"int64({U16}, int64, uint8[::1], uint8[::1], uint8[::1])")
def split_upper(upper, base, heads, low, high):
    """Split the upper 16 bits into parts, ``low`` and ``high`` being zeroed; return how many heads do not fit."""
    whole = upper.size // 32 * 32
    elsewhere = 0
    for i in range(0, whole, 32):
        bits = to_u32(load(upper, i, 32))
        head = minimum(((bits >> 5) - base) & 1023, ELSEWHERE)
        elsewhere += np.int64(sum_lanes((head + 1) >> 8))
        store(heads, i, to_u8(head))
        pack_32(bits & 15, low, i // 32, 4)
        pack_32(((bits >> 14) & 2) | ((bits >> 4) & 1), high, i // 32, 2)
    for i in range(whole, upper.size):
        one = np.int64(upper[i])
        head = min(((one >> 5) - base) & 1023, ELSEWHERE)
        elsewhere += head == ELSEWHERE
        heads[i] = head
        low[i // 2] |= (one & 15) << (4 * (i % 2))
        high[i // 4] |= (((one >> 14) & 2) | ((one >> 4) & 1)) << (2 * (i % 4))
    return elsewhere


@kernel(f"void({U8}, {U8}, {U8}, int64, {U16}, uint16[::1])")
def join_upper(heads, low, high, base, elsewhere, upper):
    """Do the opposite; ``elsewhere`` has exponent and two bits of mantissa, below 1024, for each head of 255."""
    whole = upper.size // 32 * 32
    for i in range(0, whole, 32):
        value = (to_u32(load(heads, i, 32)) + base) & 1023
        both = unpack_32(high, i // 32, 2)
        bits = (value << 5) | unpack_32(low, i // 32, 4) | ((both & 1) << 4) | ((both >> 1) << 15)
        store(upper, i, to_u16(bits))
    for i in range(whole, upper.size):
        value = (np.int64(heads[i]) + base) & 1023
        both = (np.int64(high[i // 4]) >> (2 * (i % 4))) & 3
        fourth = (np.int64(low[i // 2]) >> (4 * (i % 2))) & 15
        upper[i] = (value << 5) | fourth | ((both & 1) << 4) | ((both >> 1) << 15)
    if elsewhere.size:
        number = 0
        for i in range(upper.size):
            if heads[i] == ELSEWHERE:
                upper[i] = (upper[i] & 0x801F) | (elsewhere[number] << 5)
                number += 1


@kernel(f"void({U32}, uint16[::1], uint8[::1], uint8[::1])")
def split_32(patterns, upper, second, first):
    """Split patterns of 32 bits: the upper 16, bits 8 to 15, bits 0 to 7."""
    whole = patterns.size // 32 * 32
    for i in range(0, whole, 32):
        bits = load(patterns, i, 32)
        store(upper, i, to_u16(bits >> 16))
        store(second, i, to_u8(bits >> 8))
        store(first, i, to_u8(bits))
    for i in range(whole, patterns.size):
        one = np.int64(patterns[i])
        upper[i], second[i], first[i] = one >> 16, (one >> 8) & 255, one & 255


@kernel(f"void({U16}, {U8}, {U8}, uint32[::1])")
def join_32(upper, second, first, patterns):
    """Do the opposite of `split_32`."""
    whole = patterns.size // 32 * 32
    for i in range(0, whole, 32):
        low = (to_u32(load(second, i, 32)) << 8) | to_u32(load(first, i, 32))
        store(patterns, i, (to_u32(load(upper, i, 32)) << 16) | low)
    for i in range(whole, patterns.size):
        patterns[i] = (np.int64(upper[i]) << 16) | (np.int64(second[i]) << 8) | np.int64(first[i])


@kernel(f"void({U16}, uint8[::1], uint8[::1])")
def split_16(patterns, second, first):
    """Split patterns of 16 bits: the upper and the lower byte."""
    whole = patterns.size // 32 * 32
    for i in range(0, whole, 32):
        bits = load(patterns, i, 32)
        store(second, i, to_u8(bits >> 8))
        store(first, i, to_u8(bits))
    for i in range(whole, patterns.size):
        second[i], first[i] = np.int64(patterns[i]) >> 8, np.int64(patterns[i]) & 255


@kernel(f"void({U8}, {U8}, uint16[::1])")
def join_16(second, first, patterns):
    """Do the opposite of `split_16`."""
    whole = patterns.size // 32 * 32
    for i in range(0, whole, 32):
        store(patterns, i, (to_u16(load(second, i, 32)) << 8) | to_u16(load(first, i, 32)))
    for i in range(whole, patterns.size):
        patterns[i] = (np.int64(second[i]) << 8) | np.int64(first[i])


@kernel(f"void({U16}, int64, int64, int64, int64[::1])")
def row_sums(upper, cols, shift, mask, sums):
    """Sum ``(element >> shift) & mask``, below 2^10, over each row of ``cols`` elements, 2^22 at most."""
    for row in range(sums.size):
        start = row * cols
        whole = start + cols // 32 * 32
        lanes = zeros_u32(32)
        for i in range(start, whole, 32):
            lanes = lanes + ((to_u32(load(upper, i, 32)) >> np.uint32(shift)) & np.uint32(mask))
        total = np.int64(sum_lanes(lanes))
        for i in range(whole, start + cols):
            total += (np.int64(upper[i]) >> shift) & mask
        sums[row] = total


@kernel(f"void({U16}, int64, {U8}, int64, int64, int64[::1])")
def count_rows(upper, cols, groups, shift, mask, counts):
    """Count ``(element >> shift) & mask``, with 1024 counts for each group of rows; ``groups`` has the group of each row."""
    for row in range(groups.size):
        first = np.uint64(groups[row]) << np.uint64(10)
        for i in range(row * cols, (row + 1) * cols):
            counts[first + np.uint64((upper[i] >> np.uint32(shift)) & np.uint32(mask))] += 1


@kernel(f"void({U32}, int64, uint32[::1])")
def row_bits(patterns, cols, used):
    """Compute for each row of ``cols`` elements the bits set in any of them."""
    for row in range(used.size):
        start = row * cols
        whole = start + cols // 32 * 32
        lanes = zeros_u32(32)
        for i in range(start, whole, 32):
            lanes = lanes | load(patterns, i, 32)
        total = or_lanes(lanes)
        for i in range(whole, start + cols):
            total |= patterns[i]
        used[row] = total
