"""The bits of floats that planes leave open (spec/codecs.md, "`scm`", `rest`), compiled. Twin of ``numpy/residual.py``.

``t`` are magnitudes padded to whole blocks, ``size`` their number without padding, ``end`` the position that they are at, as in
``planes.py``, and ``widths`` (float64) has shape (2, 9), flat. ``kind`` is 4 for float32, 2 for binary16 and 1 for bfloat16.
``shifts`` (uint8) are the lowest bits left out of each element, or one number for all.

A magnitude leaves a cell of patterns, from the floor of magnitude * width to before that of the next one. What is coded is the
pattern's upper part less that of the cell's first pattern, 64 at most; the bits below are nearly uniform and go into whole bytes
and a string of bits. The upper parts are sorted by class, each a stream with frequencies of its own: the number of patterns of the
cell below 16, else 16 + 3 phase + (bits of that number, up to 7) - 5.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F64, U8, U32, inline, kernel
from qformat.kernels.numba.simd import maximum, zeros_u32
from qformat.kernels.numba.simd_casts import bits
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, load_as, store_as

KEPT = 6  # bits of an upper part
CLASSES = 22
FEW = np.uint32(16)  # below this, each number of patterns is a class
LARGEST = np.uint32(0x7F7FFFFF)
NONE = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
# magnitudes below this have their cells looked up: nearly all are small, and a cell takes two roundings
SMALL = 1 << 13
ONE, SIX, SEVEN, BYTE = np.uint32(1), np.uint32(6), np.uint32(7), np.uint32(255)


@inline
def _floor(value, kind):
    """Return the pattern of the largest finite float not above a float64, which is not negative."""
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
    """Return the first pattern of a cell, shifted; in bits 32 to 39 its class, and above how many bits it leaves open."""
    first, following = np.uint32(cell & NONE) >> shift, np.uint32(cell >> HALF) >> shift
    spread = np.uint32(following - first)
    # the number of bits from the exponent of a float64
    length = np.uint32((bits(np.float64(spread)) >> np.uint64(52)) - np.uint64(1022)) if spread else np.uint32(0)
    class_ = spread
    if spread >= FEW:
        class_ = np.uint32(FEW + np.uint32(3) * np.uint32(row >> np.uint64(1)) + min(length, SEVEN) - np.uint32(5))
    return np.uint64(first) | (np.uint64(class_) << HALF) | (np.uint64(length) << np.uint64(40))


@inline
def _small_cells(t, shifts, end, widths, kind):
    """Return the cells of small magnitudes, already `_shifted` if all elements have the same shift.

    A row for each phase at each of its two depths.
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
    """Return the row of `_small_cells` for a block."""
    phase = block & 1
    return np.uint64(2 * phase + (end % 64 > phase * 32 + ((block >> 1) & 31)))


@inline
def _look_up(t, block, shifts, table, end, widths, kind, cells):
    """Compute the cells of a block, as `_shifted` returns them."""
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
    """Count elements by class (22), and by the number of bits that their cell leaves open (up to 31)."""
    table, cells = _small_cells(t, shifts, end, widths, kind), np.empty(32, np.uint64)
    for block in range((size + 31) // 32):
        _look_up(t, block, shifts, table, end, widths, kind, cells)
        for i in range(min(32, size - 32 * block)):
            classes[_class(cells[i])] += 1
            lengths[np.uint64(_length(cells[i]))] += 1


@inline
def _sort(parts, kinds, upper, classes):
    """Sort parts by class, keeping their order within one, and count the classes."""
    # two halves take turns, or equal neighbours would wait for each other's store
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
    """Cut the patterns of magnitudes, shifted, into parts; return the number of bits between upper parts and whole bytes.

    Parameters
    ----------
    upper, classes
        The upper parts by class, in the order of elements; the size of each class.
    lower, counts
        Whole bytes, bits 0 to 7, 8 to 15, 16 to 23, of shape (3, size + 1), as one byte too many may be written; their numbers.
    middle
        The string of the bits between, up to 7 of each element, with 8 bytes more, as 8 are written at once.
    """
    table, cells = _small_cells(t, shifts, end, widths, kind), np.empty(32, np.uint64)
    parts, kinds = np.empty(size, np.uint8), np.empty(size, np.uint8)
    a, b, c = np.uint64(0), np.uint64(0), np.uint64(0)  # where arrays of whole bytes end
    shared = shifts.size == 1
    # bits that do not make a whole byte yet, their number, and where they go
    word, fill, at = np.uint64(0), np.uint64(0), np.uint64(0)
    for block in range((size + 31) // 32):
        _look_up(t, block, shifts, table, end, widths, kind, cells)
        for i in range(32 * block, min(32 * block + 32, size)):
            cell = cells[i - 32 * block]
            pattern = np.uint32(patterns[i] >> np.uint32(shifts[0 if shared else i]))
            low = np.uint32(max(_length(cell), SIX) - SIX)
            parts[i] = np.uint8((pattern >> low) - (np.uint32(cell & NONE) >> low))
            kinds[i] = np.uint8(_class(cell))
            if kind == 4 or low > SEVEN:  # rare in other dtypes; inside without branches, which could not be predicted
                lower[0, a] = np.uint8(pattern & BYTE)
                lower[1, b] = np.uint8((pattern >> np.uint32(8)) & BYTE)
                lower[2, c] = np.uint8((pattern >> np.uint32(16)) & BYTE)
                a += np.uint64(low >= np.uint32(8))
                b += np.uint64(low >= np.uint32(16))
                c += np.uint64(low >= np.uint32(24))
            between = low & SEVEN
            bits_between = np.uint32(pattern >> np.uint32(low - between)) & np.uint32((ONE << between) - ONE)
            word |= np.uint64(bits_between) << fill
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
    """Put patterns together again from the results of `split`; ``starts`` are the places of each class in ``upper``.

    ``middle`` has 8 bytes and each row of ``lower`` one more than needed. (How many are needed follows from `count`.)
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
            bits_between = word & np.uint32((ONE << between) - ONE)
            pattern |= np.uint32(bits_between << np.uint32(low - between))
            place += np.uint64(between)
            # damaged parts may make more than 32 bits: then a pattern that callers refuse as not finite
            whole = ((high << np.uint64(low)) | np.uint64(pattern)) << np.uint64(shift)
            patterns[i] = np.uint32(min(whole, NONE))
