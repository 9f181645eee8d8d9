"""What bit planes leave of a float's pattern (spec/codecs.md, "`scm`", `rest`), compiled. Twin of ``plain/rest.py``.

``t`` are magnitudes, ``end`` tells the depth of each block as in ``planes.py``. ``kind`` is the number of bytes of the dtype, 4 for
float32, 2 for binary16, and 1 for bfloat16. ``shifts`` are how many of the lowest bits are left out of each element. Elements
are in a class by the number of patterns that their cells have: itself below 16, else 16 + 3 g + (bits of the number, up to 7) - 5.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.compiler import F64, U8, U32, inline, kernel
from qformat.kernels.jit.simd import bits, load_as, store_as

KEPT = 6  # bits of the upper part
CLASSES = 22
FEW = np.uint32(16)  # patterns, of which each number is a class
LARGEST = np.uint32(0x7F7FFFFF)
NONE = np.uint64(0xFFFFFFFF)
SMALL = 1024  # magnitudes whose cells are looked up
ONE, SIX, SEVEN, BYTE = np.uint32(1), np.uint32(6), np.uint32(7), np.uint32(255)


@inline
def _floor(value, kind):
    """Return the pattern of the largest finite float that is not above a float64, which is not negative."""
    single = np.float32(value)
    pattern = bits(single)
    if np.float64(single) > value:
        pattern = np.uint32(pattern - ONE)
    pattern = min(pattern, LARGEST)
    if kind == 4:
        return pattern
    if kind == 1:
        return np.uint32(pattern >> np.uint32(16))
    if pattern < np.uint32(0x38800000):  # below 2^-14
        return np.uint32(value * 16777216.0)
    return min(np.uint32((pattern >> np.uint32(13)) - np.uint32(0x1C000)), np.uint32(0x7BFF))


@inline
def _cells(end, widths, kind):
    """Return the first pattern of the cell of each small magnitude, and in the upper half that of the next cell.

    There is a row for each phase at each of its two depths.
    """
    table = np.empty((4, SMALL), np.uint64)
    for row in range(4):
        width = widths[row // 2 * 9 + min(end // 64 + row % 2, 8)]
        for magnitude in range(SMALL):
            first, following = _floor(magnitude * width, kind), _floor((magnitude + 1) * width, kind)
            table[row, magnitude] = np.uint64(first) | (np.uint64(following) << np.uint64(32))
    return table


@inline
def _row(block, end):
    """Return the row of `_cells` for a block."""
    phase = block & 1
    return np.uint64(2 * phase + (end % 64 > phase * 32 + ((block >> 1) & 31)))


@inline
def _look_up(magnitude, shift, row, table, end, widths, kind):
    """Return the first pattern of a cell, without the lowest bits, the bits of the number of those after it, and its class."""
    if magnitude < SMALL:
        entry = table[row, np.uint64(magnitude)]
        first, following = np.uint32(entry & np.uint64(0xFFFFFFFF)), np.uint32(entry >> np.uint64(32))
    else:
        width = widths[np.int64(row) // 2 * 9 + end // 64 + np.int64(row) % 2]
        first, following = _floor(magnitude * width, kind), _floor((np.float64(magnitude) + 1.0) * width, kind)
    first = np.uint32(first >> shift)
    spread = np.uint32((following >> shift) - first)
    # the exponent of a float64 tells how many bits a number has
    length = np.uint32((bits(np.float64(spread)) >> np.uint64(52)) - np.uint64(1022)) if spread else np.uint32(0)
    class_ = spread
    if spread >= FEW:
        class_ = np.uint32(FEW + np.uint32(3) * np.uint32(row >> np.uint64(1)) + min(length, SEVEN) - np.uint32(5))
    return first, length, np.uint64(class_)


@kernel(f"void({U32}, {U8}, int64, int64, {F64}, int64, int64[::1], int64[::1])")
def count(t, shifts, size, end, widths, kind, classes, lengths):
    """Count elements by class, and by the number of bits that their cell leaves open, up to 31."""
    table = _cells(end, widths, kind)
    for block in range((size + 31) // 32):
        row = _row(block, end)
        for i in range(32 * block, min(32 * block + 32, size)):
            _, length, class_ = _look_up(t[i], np.uint32(shifts[i]), row, table, end, widths, kind)
            classes[class_] += 1
            lengths[np.uint64(length)] += 1


@kernel(
    f"int64({U32}, {U32}, {U8}, int64, int64, {F64}, int64, uint8[::1], int64[::1], uint8[:, ::1], int64[::1], uint8[::1])"
)
def split(patterns, t, shifts, size, end, widths, kind, upper, classes, lower, counts, middle):
    """Cut the patterns of magnitudes, without their lowest bits, in parts; return how many bits there are between.

    Parameters
    ----------
    upper, classes
        The upper parts, those of class 0 first, in the order of elements; and how many there are of each class.
    lower, counts
        Three arrays of whole bytes, with room for one more than there are elements, and how many there are in each.
    middle
        The string of the bits between, which are 0 at first; there are 8 bytes more than for 7 bits of each element.
    """
    table = _cells(end, widths, kind)
    parts, kinds = np.empty(size, np.uint8), np.empty(size, np.uint8)
    place, ends = np.uint64(0), np.zeros(3, np.uint64)
    for block in range((size + 31) // 32):
        row = _row(block, end)
        for i in range(32 * block, min(32 * block + 32, size)):
            shift = np.uint32(shifts[i])
            first, length, class_ = _look_up(t[i], shift, row, table, end, widths, kind)
            pattern = np.uint32(patterns[i] >> shift)
            low = np.uint32(max(length, SIX) - SIX)
            parts[i] = np.uint8((pattern >> low) - (first >> low))
            kinds[i] = np.uint8(class_)
            classes[class_] += 1
            if kind == 4 or low > SEVEN:  # of others few; without branches, which could not be predicted
                lower[0, ends[0]] = np.uint8(pattern & BYTE)
                lower[1, ends[1]] = np.uint8((pattern >> np.uint32(8)) & BYTE)
                lower[2, ends[2]] = np.uint8((pattern >> np.uint32(16)) & BYTE)
                ends[0] += np.uint64(low >= np.uint32(8))
                ends[1] += np.uint64(low >= np.uint32(16))
                ends[2] += np.uint64(low >= np.uint32(24))
            between = low & SEVEN
            rest = np.uint32(pattern >> np.uint32(low - between)) & np.uint32((ONE << between) - ONE)
            word = load_as(middle, place >> np.uint64(3), ONE) | np.uint32(rest << np.uint32(place & np.uint64(7)))
            store_as(middle, place >> np.uint64(3), np.uint32(word))
            place += np.uint64(between)
    for byte in range(3):
        counts[byte] = ends[byte]
    places = np.zeros(CLASSES, np.uint64)
    for class_ in range(1, CLASSES):
        places[class_] = places[class_ - 1] + np.uint64(classes[class_ - 1])
    for i in range(size):
        class_ = np.uint64(kinds[i])
        upper[places[class_]] = parts[i]
        places[class_] += np.uint64(1)
    return np.int64(place)


@kernel(
    f"void({U32}, {U8}, int64, int64, {F64}, int64, int64[::1], {U8}, Array(uint8, 2, 'C', readonly=True), {U8}, uint32[::1])"
)
def join(t, shifts, size, end, widths, kind, starts, upper, lower, middle, patterns):
    """Put the patterns of magnitudes together from what `split` made of them.

    There have to be 8 bytes more in ``middle`` than are needed, and one more in each array of ``lower``.
    """
    table = _cells(end, widths, kind)
    place, ends = np.uint64(0), np.zeros(3, np.uint64)
    for block in range((size + 31) // 32):
        row = _row(block, end)
        for i in range(32 * block, min(32 * block + 32, size)):
            shift = np.uint32(shifts[i])
            first, length, class_ = _look_up(t[i], shift, row, table, end, widths, kind)
            low = np.uint32(max(length, SIX) - SIX)
            high = np.uint64((first >> low) + np.uint32(upper[np.uint64(starts[class_])]))
            starts[class_] += 1
            pattern = np.uint32(0)
            if kind == 4 or low > SEVEN:
                more = low >= np.uint32(8), low >= np.uint32(16), low >= np.uint32(24)
                for byte in range(3):
                    value = np.uint32(lower[byte, ends[byte]]) & (np.uint32(0) - np.uint32(more[byte]))
                    pattern |= np.uint32(value << np.uint32(8 * byte))
                    ends[byte] += np.uint64(more[byte])
            between = low & SEVEN
            word = np.uint32(load_as(middle, place >> np.uint64(3), ONE) >> np.uint32(place & np.uint64(7)))
            rest = word & np.uint32((ONE << between) - ONE)
            pattern |= np.uint32(rest << np.uint32(low - between))
            place += np.uint64(between)
            # damaged parts may make more than 32 bits, which are no number either
            whole = ((high << np.uint64(low)) | np.uint64(pattern)) << np.uint64(shift)
            patterns[i] = np.uint32(min(whole, NONE))
