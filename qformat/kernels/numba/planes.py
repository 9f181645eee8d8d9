"""Bit planes of magnitudes (spec/codecs.md, "`scm`"), compiled. Twin of ``numpy/planes.py``.

Arrays of elements (values ``x``, magnitudes ``t`` in uint32) are padded to whole blocks of 32; ``size`` is the number without
padding. Block b is in phase b mod 2 and in part b // 2 mod 32. A section is a range of parts of one phase: ``phase, first, stop``.
Bits of elements are packed into words of 32, a block each, so that a plane is a mask of comparisons; the classes of a block are
masks, too, and `bmi2.extract` and `bmi2.deposit` move all bits of a class at once.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.bmi2 import count_ones, deposit, extract
from qformat.kernels.numba.compiler import F32, F64, U8, U32, inline, kernel
from qformat.kernels.numba.simd import count_up, greater_equal, maximum, minimum, select_less, spread_f32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32, to_f64, to_i32, to_u8, to_u32
from qformat.kernels.numba.simd_lanes import high_half, low_half, pack_bits, sum_lanes, unpack_bits
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as

MAGNITUDE = np.uint32(0x7FFFFFFF)
CLASSES = 3  # of magnitudes (0, 1, and more), whose next bits are coded apart
CELLS = 4  # of depth 0, with offsets of their own
DEEPEST = 8
LANES = 16
WORD, LONG = np.uint32(0), np.uint64(0)


@inline
def _blocks(size, phase):
    """Return the number of blocks of a phase."""
    return ((size + 31) // 32 + 1 - phase) // 2


@kernel(f"void({F32}, {F64}, uint32[::1])")
def quantize(x, widths, t):
    """Compute the magnitudes ``floor(|x| / width)``, below 2^31, with the width of the phase."""
    for block in range(x.size // 32):
        value = to_f64(from_bits(bits(load(x, 32 * block, 32)) & MAGNITUDE))
        store(t, 32 * block, to_u32(to_i32(value / widths[block & 1])))


@inline
def _offset(cell, offsets, place):
    """Return the offsets of elements, by their cells of depth 0."""
    at = place * CELLS
    first, second, third = offsets[at], offsets[at + 1], offsets[at + 2]
    last = select_less(cell, np.uint32(3), spread_f32(third, 32), offsets[at + 3])
    return select_less(
        cell, np.uint32(1), spread_f32(first, 32), select_less(cell, np.uint32(2), spread_f32(second, 32), last)
    )


@kernel(f"void({F32}, {U32}, int64, int64, {F32}, {F32}, float32, float64[::1], float64[::1], uint32[::1])")
def measure(x, t, size, deepest, widths, offsets, scale, squares, sums, peaks):
    """Sum up errors for each phase, part and depth from 0 to ``deepest``: results of shape (2, 32, 9, 16 lanes), flat.

    ``t`` are magnitudes at the deepest depth; ``widths`` has shape (2, 9) and ``offsets`` (2, 9, 4), flat. Errors are multiplied by
    ``scale``, a power of 2. The second half of a block's errors, and of their squares, is added to the first one in float32; these
    16 are added to the lanes. ``peaks`` are the bits of the largest errors, not multiplied.
    """
    for block in range(x.size // 32):
        at = 32 * block
        value = from_bits(bits(load(x, at, 32)) & MAGNITUDE)
        magnitude = load(t, at, 32)
        cell_0 = magnitude >> np.uint32(deepest)
        phase = block & 1
        cell = (phase * 32 + ((block >> 1) & 31)) * (DEEPEST + 1)
        there = min(32, size - at)
        for depth in range(deepest + 1):
            place = phase * (DEEPEST + 1) + depth
            parts = to_f32(magnitude >> np.uint32(deepest - depth))
            # values are in the middle of deeper cells
            offset = _offset(cell_0, offsets, place) if depth < 4 else spread_f32(np.float32(0.5), 32)
            error = from_bits(bits(value - (parts + offset) * widths[place]) & MAGNITUDE)
            if there < 32:
                error = select_less(count_up(32), np.uint32(there), error, np.float32(0.0))
            lanes = LANES * (cell + depth)
            pattern = bits(error)
            store(peaks, lanes, maximum(load(peaks, lanes, LANES), maximum(low_half(pattern), high_half(pattern))))
            error = error * scale
            square = error * error
            store(squares, lanes, load(squares, lanes, LANES) + to_f64(low_half(square) + high_half(square)))
            store(sums, lanes, load(sums, lanes, LANES) + to_f64(low_half(error) + high_half(error)))


@kernel(f"int64({U32}, int64, int64, int64, uint8[::1])")
def limited(t, size, phase, limit, chosen):
    """Write the magnitudes of a phase as bytes, ``limit`` at most; return how many of them reach it."""
    over = np.int64(0)
    for number in range(_blocks(size, phase)):
        at = 32 * (2 * number + phase)
        value = minimum(load(t, at, 32), np.uint32(limit))
        store(chosen, 32 * number, to_u8(value))
        over += np.int64(sum_lanes(greater_equal(value, np.uint32(limit))))
    return over


@kernel(f"int64({U32}, int64, int64, int64, int64, int64, uint8[::1])")
def plane(t, size, shift, phase, first, stop, packed):
    """Pack bit ``shift`` of each magnitude of a section, 32 to a word; return the number of words."""
    words = 0
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            at = 32 * (2 * number + phase)
            store_as(packed, 4 * words, pack_bits((load(t, at, 32) >> np.uint32(shift)) & 1))
            words += 1
    return words


@inline
def _class_masks(t, at, size, shift):
    """Return for each class the mask of the elements of a block in it; padding is in none."""
    value = load(t, at, 32) >> np.uint32(shift)
    there = np.uint32(0xFFFFFFFF)
    if size - at < 32:
        there = np.uint32((np.uint64(1) << np.uint64(size - at)) - np.uint64(1))
    above = pack_bits(greater_equal(value, np.uint32(1)))
    last = np.uint32(pack_bits(greater_equal(value, np.uint32(2))) & there)
    return np.uint32(~above & there), np.uint32((above & there) ^ last), last


@kernel(f"void({U32}, int64, int64, int64, int64, int64, int64[::1])")
def count_classes(t, size, shift, phase, first, stop, counts):
    """Count the elements of a section by the classes of their magnitudes, shifted."""
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            zero, one, last = _class_masks(t, 32 * (2 * number + phase), size, shift)
            counts[0] += np.int64(count_ones(zero))
            counts[1] += np.int64(count_ones(one))
            counts[2] += np.int64(count_ones(last))


@inline
def _add_bits(t, at, size, shift, counts, cell):
    """Count the bits of a block at ``shift``, by class of the magnitude above them and by value."""
    zero, one, last = _class_masks(t, at, size, shift + 1)
    value = pack_bits((load(t, at, 32) >> np.uint32(shift)) & 1)
    first, second, third = count_ones(value & zero), count_ones(value & one), count_ones(value & last)
    counts[cell] += np.int64(count_ones(zero)) - np.int64(first)
    counts[cell + 1] += np.int64(first)
    counts[cell + 2] += np.int64(count_ones(one)) - np.int64(second)
    counts[cell + 3] += np.int64(second)
    counts[cell + 4] += np.int64(count_ones(last)) - np.int64(third)
    counts[cell + 5] += np.int64(third)


@kernel(f"void({U32}, int64, int64, int64[::1])")
def count_bits(t, size, deepest, counts):
    """Count bits by depth, phase, part, class of the magnitude above them and value: shape (deepest, 2, 32, 3, 2), flat."""
    for block in range((size + 31) // 32):
        for depth in range(1, deepest + 1):
            cell = (((depth - 1) * 2 + (block & 1)) * 32 + ((block >> 1) & 31)) * 2 * CLASSES
            _add_bits(t, 32 * block, size, deepest - depth, counts, cell)


@kernel(f"void({U32}, int64, int64, int64, int64, int64, int64[::1])")
def count_section(t, size, shift, phase, first, stop, counts):
    """Count the bits of a section by class of the magnitude above them and by value: shape (3, 2), flat."""
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            _add_bits(t, 32 * (2 * number + phase), size, shift, counts, 0)


@inline
def _append(packed, place, value, mask):
    """Append the bits of a block that a mask selects to a string of bits; return the new end."""
    byte = place >> np.uint64(3)
    word = load_as(packed, byte, LONG) | (np.uint64(extract(value, mask)) << (place & np.uint64(7)))
    store_as(packed, byte, word)
    return place + np.uint64(count_ones(mask))


@kernel(f"void({U32}, int64, int64, int64, int64, int64, int64[::1], uint8[::1])")
def split_classes(t, size, shift, phase, first, stop, starts, packed):
    """Pack bit ``shift`` of each magnitude of a section, those of each class from its start on (in bytes).

    ``packed`` is zeroed and has 8 bytes more than needed after each class, as 8 are written at once.
    """
    a, b, c = np.uint64(8 * starts[0]), np.uint64(8 * starts[1]), np.uint64(8 * starts[2])
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            at = 32 * (2 * number + phase)
            zero, one, last = _class_masks(t, at, size, shift + 1)
            value = pack_bits((load(t, at, 32) >> np.uint32(shift)) & 1)
            a, b, c = _append(packed, a, value, zero), _append(packed, b, value, one), _append(packed, c, value, last)


@kernel(f"void({U8}, int64, uint32[::1])")
def spread(chosen, phase, t):
    """Write magnitudes of a phase, padded to whole blocks, to their blocks."""
    for number in range(chosen.size // 32):
        store(t, 32 * (2 * number + phase), to_u32(load(chosen, 32 * number, 32)))


@kernel(f"void({U8}, int64, int64, int64, int64, uint32[::1])")
def refine(packed, size, phase, first, stop, t):
    """Append a bit to each magnitude of a section, from whole words of 32."""
    words = 0
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            at = 32 * (2 * number + phase)
            bit = unpack_bits(load_as(packed, 4 * words, WORD)) & 1
            store(t, at, (load(t, at, 32) << 1) | bit)
            words += 1


@inline
def _take(packed, place, mask):
    """Return the next bits of a string, placed where a mask has ones, and the place after them."""
    word = load_as(packed, place >> np.uint64(3), LONG) >> (place & np.uint64(7))
    return deposit(np.uint32(word), mask), place + np.uint64(count_ones(mask))


@kernel(f"void({U8}, int64[::1], int64, int64, int64, int64, uint32[::1])")
def refine_classes(packed, starts, size, phase, first, stop, t):
    """Do as `refine` with the bits of each class from its start on (in bytes); 8 bytes more than needed have to follow."""
    a, b, c = np.uint64(8 * starts[0]), np.uint64(8 * starts[1]), np.uint64(8 * starts[2])
    for number in range(_blocks(size, phase)):
        if first <= (number & 31) < stop:
            at = 32 * (2 * number + phase)
            zero, one, last = _class_masks(t, at, size, 0)
            first_bits, a = _take(packed, a, zero)
            second_bits, b = _take(packed, b, one)
            third_bits, c = _take(packed, c, last)
            bit = unpack_bits(np.uint32(first_bits | second_bits | third_bits)) & 1
            store(t, at, (load(t, at, 32) << 1) | bit)


@kernel(f"void({F32}, uint32[::1])")
def append_signs(x, t):
    """Append to the magnitude of each element its sign as the lowest bit, 1 if it is negative."""
    for block in range(t.size // 32):
        sign = bits(load(x, 32 * block, 32)) >> 31
        store(t, 32 * block, (load(t, 32 * block, 32) << 1) | sign)


@kernel("void(uint32[::1], uint8[::1])")
def detach_signs(joined, packed):
    """Do the opposite, in place."""
    for block in range(joined.size // 32):
        value = load(joined, 32 * block, 32)
        store_as(packed, 4 * block, pack_bits(value & 1))
        store(joined, 32 * block, value >> np.uint32(1))


@kernel("void(uint32[::1], int64, int64)")
def shallow(t, end, deepest):
    """Reduce magnitudes at the deepest depth to those after ``end`` positions."""
    whole, further = end // 64, end % 64
    for block in range(t.size // 32):
        depth = whole + (further > (block & 1) * 32 + ((block >> 1) & 31))
        store(t, 32 * block, load(t, 32 * block, 32) >> np.uint32(deepest - depth))


@kernel(f"void({U32}, {U8}, int64, {F32}, {F32}, float32[::1])")
def values(t, packed, end, widths, offsets, decoded):
    """Compute the values of magnitudes and signs after ``end`` positions."""
    whole, further = end // 64, end % 64
    for block in range(decoded.size // 32):
        at = 32 * block
        phase = block & 1
        depth = whole + (further > phase * 32 + ((block >> 1) & 31))
        magnitude = load(t, at, 32)
        place = phase * (DEEPEST + 1) + depth
        value = (to_f32(magnitude) + _offset(magnitude >> np.uint32(depth), offsets, place)) * widths[place]
        sign = unpack_bits(load_as(packed, 4 * block, WORD)) << 31
        store(decoded, at, from_bits(bits(value) | sign))
