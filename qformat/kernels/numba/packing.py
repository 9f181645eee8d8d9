"""Codes of 1 to 6 or 8 bits in a string of bits, and rows in runs of 32; compiled. Twin of ``numpy/packing.py``.

Kernels call `unpack_32` and `pack_32`, or `unpack_any` and `pack_any` for codes of rarer widths, too; the width is the same
throughout a loop, so that branching on it costs next to nothing.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import U8, inline, kernel
from qformat.kernels.numba.simd import count_up, select_less
from qformat.kernels.numba.simd_casts import to_u8, to_u32
from qformat.kernels.numba.simd_lanes import (
    even_lanes,
    high_half,
    join,
    lane,
    low_half,
    odd_lanes,
    pack_bits,
    unpack_bits,
)
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as

WORD = np.uint32(0)


@inline
def _unpack_1(packed, at):
    """Return 32 codes of 1 bit."""
    return unpack_bits(load_as(packed, at, WORD))


@inline
def _unpack_2(packed, at):
    """Return 32 codes of 2 bits."""
    shifts = count_up(16) * 2
    return join(load_as(packed, at, WORD) >> shifts, load_as(packed, at + 4, WORD) >> shifts) & 3


@inline
def _unpack_3(packed, at):
    """Return 32 codes of 3 bits: 8 codes in every 3 bytes."""
    shifts = count_up(8) * 3
    first = join(load_as(packed, at, WORD) >> shifts, load_as(packed, at + 3, WORD) >> shifts)
    last = np.uint32(load_as(packed, at + 8, WORD) >> 8)  # not from at + 9, which reads past the end
    return join(first, join(load_as(packed, at + 6, WORD) >> shifts, last >> shifts)) & 7


@inline
def _unpack_4(packed, at):
    """Return 32 codes of 4 bits."""
    shifts = count_up(8) * 4
    first = join(load_as(packed, at, WORD) >> shifts, load_as(packed, at + 4, WORD) >> shifts)
    return join(first, join(load_as(packed, at + 8, WORD) >> shifts, load_as(packed, at + 12, WORD) >> shifts)) & 15


@inline
def _four(word, width):
    """Return the lowest four codes of a word, with their higher neighbours above them."""
    return word >> (count_up(4) * width)


@inline
def _unpack_5(packed, at):
    """Return 32 codes of 5 bits: 4 codes in every 20 bits."""
    first = join(_four(load_as(packed, at, WORD), 5), _four(np.uint32(load_as(packed, at + 2, WORD) >> 4), 5))
    second = join(_four(load_as(packed, at + 5, WORD), 5), _four(np.uint32(load_as(packed, at + 7, WORD) >> 4), 5))
    third = join(_four(load_as(packed, at + 10, WORD), 5), _four(np.uint32(load_as(packed, at + 12, WORD) >> 4), 5))
    last = np.uint32(load_as(packed, at + 16, WORD) >> 12)  # not from at + 17, which reads past the end
    fourth = join(_four(load_as(packed, at + 15, WORD), 5), _four(last, 5))
    return join(join(first, second), join(third, fourth)) & 31


@inline
def _unpack_6(packed, at):
    """Return 32 codes of 6 bits: 4 codes in every 3 bytes."""
    first = join(_four(load_as(packed, at, WORD), 6), _four(load_as(packed, at + 3, WORD), 6))
    second = join(_four(load_as(packed, at + 6, WORD), 6), _four(load_as(packed, at + 9, WORD), 6))
    third = join(_four(load_as(packed, at + 12, WORD), 6), _four(load_as(packed, at + 15, WORD), 6))
    last = np.uint32(load_as(packed, at + 20, WORD) >> 8)  # not from at + 21, which reads past the end
    fourth = join(_four(load_as(packed, at + 18, WORD), 6), _four(last, 6))
    return join(join(first, second), join(third, fourth)) & 63


@inline
def _unpack_8(packed, at):
    """Return 32 codes of 8 bits."""
    return to_u32(load(packed, at, 32))


@inline
def _join_lanes(codes, width):
    """Return each pair of neighbours as one lane."""
    return even_lanes(codes) | (odd_lanes(codes) << width)


@inline
def _pack_1(codes, packed, at):
    """Store 32 codes of 1 bit."""
    store_as(packed, at, pack_bits(codes))


@inline
def _pack_2(codes, packed, at):
    """Store 32 codes of 2 bits."""
    store(packed, at, to_u8(_join_lanes(_join_lanes(codes, 2), 4)))


@inline
def _pack_3(codes, packed, at):
    """Store 32 codes of 3 bits."""
    triples = _join_lanes(_join_lanes(_join_lanes(codes, 3), 6), 12)  # of bytes
    first, second, third, fourth = lane(triples, 0), lane(triples, 1), lane(triples, 2), lane(triples, 3)
    store_as(packed, at, np.uint32(first | (second << 24)))
    store_as(packed, at + 4, np.uint32((second >> 8) | (third << 16)))
    store_as(packed, at + 8, np.uint32((third >> 16) | (fourth << 8)))


@inline
def _pack_4(codes, packed, at):
    """Store 32 codes of 4 bits."""
    store(packed, at, to_u8(_join_lanes(codes, 4)))


@inline
def _pack_5(codes, packed, at):
    """Store 32 codes of 5 bits."""
    fours = _join_lanes(_join_lanes(codes, 5), 10)  # of 20 bits
    for half in range(2):
        part = low_half(fours) if half == 0 else high_half(fours)
        low = np.uint64(lane(part, 0)) | np.uint64(lane(part, 1)) << np.uint64(20)
        high = np.uint64(lane(part, 2)) | np.uint64(lane(part, 3)) << np.uint64(20)
        store_as(packed, at + 10 * half, np.uint64(low | high << np.uint64(40)))
        store_as(packed, at + 10 * half + 8, np.uint16(high >> np.uint64(24)))


@inline
def _pack_6(codes, packed, at):
    """Store 32 codes of 6 bits."""
    fours = _join_lanes(_join_lanes(codes, 6), 12)  # of 24 bits
    for half in range(2):
        part = low_half(fours) if half == 0 else high_half(fours)
        first, second, third, fourth = lane(part, 0), lane(part, 1), lane(part, 2), lane(part, 3)
        store_as(packed, at + 12 * half, np.uint32(first | (second << 24)))
        store_as(packed, at + 12 * half + 4, np.uint32((second >> 8) | (third << 16)))
        store_as(packed, at + 12 * half + 8, np.uint32((third >> 16) | (fourth << 8)))


@inline
def _pack_8(codes, packed, at):
    """Store 32 codes of 8 bits."""
    store(packed, at, to_u8(codes))


@inline
def unpack_32(packed, number, width):
    """Return 32 codes of ``width`` bits (2, 3, 4 or 8) from byte ``4 * width * number`` on, as a vector of uint32."""
    if width == 4:
        return _unpack_4(packed, 16 * number)
    if width == 3:
        return _unpack_3(packed, 12 * number)
    if width == 2:
        return _unpack_2(packed, 8 * number)
    return _unpack_8(packed, 32 * number)


@inline
def pack_32(codes, packed, number, width):
    """Store 32 codes below 2^width (a vector of uint32) where `unpack_32` finds them."""
    if width == 4:
        _pack_4(codes, packed, 16 * number)
    elif width == 3:
        _pack_3(codes, packed, 12 * number)
    elif width == 2:
        _pack_2(codes, packed, 8 * number)
    else:
        _pack_8(codes, packed, 32 * number)


@inline
def unpack_any(packed, number, width):
    """Do as `unpack_32`, also for codes of 1, 5 or 6 bits."""
    if width == 1:
        return _unpack_1(packed, 4 * number)
    if width == 5:
        return _unpack_5(packed, 20 * number)
    if width == 6:
        return _unpack_6(packed, 24 * number)
    return unpack_32(packed, number, width)


@inline
def pack_any(codes, packed, number, width):
    """Do as `pack_32`, also for codes of 1, 5 or 6 bits."""
    if width == 1:
        _pack_1(codes, packed, 4 * number)
    elif width == 5:
        _pack_5(codes, packed, 20 * number)
    elif width == 6:
        _pack_6(codes, packed, 24 * number)
    else:
        pack_32(codes, packed, number, width)


@kernel(f"void({U8}, uint8[::1], int64)")
def unpack(packed, codes, width):
    """Unpack codes of ``width`` bits, a multiple of 32 of them, into bytes."""
    for number in range(codes.size // 32):
        store(codes, 32 * number, to_u8(unpack_any(packed, number, width)))


@kernel(f"void({U8}, uint8[::1], int64)")
def pack(codes, packed, width):
    """Do the opposite of `unpack`; codes are below 2^width."""
    for number in range(codes.size // 32):
        pack_any(to_u32(load(codes, 32 * number, 32)), packed, number, width)


@inline
def crop(values, count):
    """Return the first ``count`` of 32 floats, and zeros."""
    return select_less(count_up(32), count, values, np.float32(0.0))
