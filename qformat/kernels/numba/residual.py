"""What bit planes leave of a float's pattern (spec/codecs.md, "`scm`", `rest`), compiled. Twin of ``numpy/residual.py``.

``t`` are magnitudes, ``end`` tells the depth of each block as in ``planes.py``. ``kind`` is the number of bytes of the dtype, 4 for
float32, 2 for binary16, and 1 for bfloat16. ``shifts`` are how many of the lowest bits are left out of each element, or one number
for all of them. Elements are in a class by the number of patterns that their cells have: itself below 16, else 16 + 3 g + (bits of
the number, up to 7) - 5.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F64, U8, U32, inline, kernel
from qformat.kernels.numba.simd import maximum, zeros_u32
from qformat.kernels.numba.simd_casts import bits
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, load_as, store_as

KEPT = 6  # bits of the upper part
CLASSES = 22
FEW = np.uint32(16)  # patterns, of which each number is a class
LARGEST = np.uint32(0x7F7FFFFF)
NONE = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
SMALL = 1 << 13  # magnitudes whose cells are looked up
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
def _cell(magnitude, width, kind):
    """Return the first pattern of a cell, and in the upper half that of the next cell."""
    first, following = _floor(magnitude * width, kind), _floor((np.float64(magnitude) + 1.0) * width, kind)
    return np.uint64(first) | (np.uint64(following) << HALF)


@inline
def _shifted(cell, shift, row):
    """Return the first pattern of a cell, without the lowest bits; above it its class and the bits of the number of the others."""
    first, following = np.uint32(cell & NONE) >> shift, np.uint32(cell >> HALF) >> shift
    spread = np.uint32(following - first)
    # the exponent of a float64 tells how many bits a number has
    length = np.uint32((bits(np.float64(spread)) >> np.uint64(52)) - np.uint64(1022)) if spread else np.uint32(0)
    class_ = spread
    if spread >= FEW:
        class_ = np.uint32(FEW + np.uint32(3) * np.uint32(row >> np.uint64(1)) + min(length, SEVEN) - np.uint32(5))
    return np.uint64(first) | (np.uint64(class_) << HALF) | (np.uint64(length) << np.uint64(40))


@inline
def _small_cells(t, shifts, end, widths, kind):
    """Return the cell of each small magnitude, as `_shifted` gives it if all elements have the same shift.

    There is a row for each phase at each of its two depths.
    """
    peaks = zeros_u32(32)
    for block in range(t.size // 32):
        peaks = maximum(peaks, load(t, 32 * block, 32))
    table = np.empty((4, min(np.int64(largest(peaks)) + 1, SMALL)), np.uint64)
    for row in range(4):
        width = widths[row // 2 * 9 + min(end // 64 + row % 2, 8)]
        for magnitude in range(table.shape[1]):
            cell = _cell(magnitude, width, kind)
            table[row, magnitude] = _shifted(cell, np.uint32(shifts[0]), np.uint64(row)) if shifts.size == 1 else cell
    return table


@inline
def _row(block, end):
    """Return the row of `_cells` for a block."""
    phase = block & 1
    return np.uint64(2 * phase + (end % 64 > phase * 32 + ((block >> 1) & 31)))


@inline
def _look_up(t, block, shifts, table, end, widths, kind, cells):
    """Give the cells of a block as `_shifted` does."""
    row, at, shared = _row(block, end), 32 * block, shifts.size == 1
    if shared and np.int64(largest(load(t, at, 32))) < table.shape[1]:
        for i in range(32):
            cells[i] = table[row, np.uint64(t[at + i])]
        return
    width = widths[np.int64(row) // 2 * 9 + end // 64 + np.int64(row) % 2]
    for i in range(32):
        magnitude, shift = t[at + i], np.uint32(shifts[0 if shared else min(at + i, shifts.size - 1)])
        if not shared and np.int64(magnitude) < table.shape[1]:
            cells[i] = _shifted(table[row, np.uint64(magnitude)], shift, row)
        else:
            cells[i] = _shifted(_cell(magnitude, width, kind), shift, row)


@inline
def _class(cell):
    return (cell >> HALF) & np.uint64(255)


@inline
def _length(cell):
    return np.uint32(cell >> np.uint64(40))


@kernel(f"void({U32}, {U8}, int64, int64, {F64}, int64, int64[::1], int64[::1])")
def count(t, shifts, size, end, widths, kind, classes, lengths):
    """Count elements by class, and by the number of bits that their cell leaves open, up to 31."""
    table, cells = _small_cells(t, shifts, end, widths, kind), np.empty(32, np.uint64)
    for block in range((size + 31) // 32):
        _look_up(t, block, shifts, table, end, widths, kind, cells)
        for i in range(min(32, size - 32 * block)):
            classes[_class(cells[i])] += 1
            lengths[np.uint64(_length(cells[i]))] += 1


@inline
def _sort(parts, kinds, upper, classes):
    """Put parts in the order of classes, and count these."""
    # two halves take turns, as equal neighbours would else wait for each other's store
    half = kinds.size // 2
    places = np.zeros((2, CLASSES), np.uint64)
    for i in range(half):
        places[0, kinds[i]] += np.uint64(1)
        places[1, kinds[half + i]] += np.uint64(1)
    if kinds.size % 2:
        places[1, kinds[2 * half]] += np.uint64(1)
    start = np.uint64(0)
    for class_ in range(CLASSES):
        first, second = places[0, class_], places[1, class_]
        classes[class_] = first + second
        places[0, class_], places[1, class_] = start, start + first
        start += first + second
    for i in range(half):
        first, second = kinds[i], kinds[half + i]
        upper[places[0, first]] = parts[i]
        upper[places[1, second]] = parts[half + i]
        places[0, first] += np.uint64(1)
        places[1, second] += np.uint64(1)
    if kinds.size % 2:
        upper[places[1, kinds[2 * half]]] = parts[2 * half]


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
        The string of the bits between; there are 8 bytes more than for 7 bits of each element.
    """
    table, cells = _small_cells(t, shifts, end, widths, kind), np.empty(32, np.uint64)
    parts, kinds = np.empty(size, np.uint8), np.empty(size, np.uint8)
    a, b, c = np.uint64(0), np.uint64(0), np.uint64(0)  # where arrays of whole bytes end
    shared = shifts.size == 1
    # bits between that do not make a byte yet, and where they go
    word, fill, at = np.uint64(0), np.uint64(0), np.uint64(0)
    for block in range((size + 31) // 32):
        _look_up(t, block, shifts, table, end, widths, kind, cells)
        for i in range(32 * block, min(32 * block + 32, size)):
            cell = cells[i - 32 * block]
            pattern = np.uint32(patterns[i] >> np.uint32(shifts[0 if shared else i]))
            low = np.uint32(max(_length(cell), SIX) - SIX)
            parts[i] = np.uint8((pattern >> low) - (np.uint32(cell & NONE) >> low))
            kinds[i] = np.uint8(_class(cell))
            if kind == 4 or low > SEVEN:  # of others few; without branches, which could not be predicted
                lower[0, a] = np.uint8(pattern & BYTE)
                lower[1, b] = np.uint8((pattern >> np.uint32(8)) & BYTE)
                lower[2, c] = np.uint8((pattern >> np.uint32(16)) & BYTE)
                a += np.uint64(low >= np.uint32(8))
                b += np.uint64(low >= np.uint32(16))
                c += np.uint64(low >= np.uint32(24))
            between = low & SEVEN
            rest = np.uint32(pattern >> np.uint32(low - between)) & np.uint32((ONE << between) - ONE)
            word |= np.uint64(rest) << fill
            store_as(middle, at, word)
            fill += np.uint64(between)
            at += fill >> np.uint64(3)
            word >>= fill & np.uint64(8)
            fill &= np.uint64(7)
    counts[0], counts[1], counts[2] = a, b, c
    _sort(parts, kinds, upper, classes)
    return np.int64(np.uint64(8) * at + fill)


@kernel(
    f"void({U32}, {U8}, int64, int64, {F64}, int64, int64[::1], {U8}, Array(uint8, 2, 'C', readonly=True), {U8}, uint32[::1])"
)
def join(t, shifts, size, end, widths, kind, starts, upper, lower, middle, patterns):
    """Put the patterns of magnitudes together from what `split` made of them.

    There have to be 8 bytes more in ``middle`` than are needed, and one more in each array of ``lower``.
    """
    table, cells, shared = _small_cells(t, shifts, end, widths, kind), np.empty(32, np.uint64), shifts.size == 1
    place, ends = np.uint64(0), np.zeros(3, np.uint64)
    for block in range((size + 31) // 32):
        _look_up(t, block, shifts, table, end, widths, kind, cells)
        for i in range(32 * block, min(32 * block + 32, size)):
            cell = cells[i - 32 * block]
            shift, class_ = np.uint32(shifts[0 if shared else i]), _class(cell)
            low = np.uint32(max(_length(cell), SIX) - SIX)
            high = np.uint64((np.uint32(cell & NONE) >> low) + np.uint32(upper[np.uint64(starts[class_])]))
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
