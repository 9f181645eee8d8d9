"""Few levels, with a scale for each group of columns of a row or none; compiled. Twin of ``numpy/levels.py``.

Arrays are whole rows of ``cols`` elements. A row has groups of ``group`` columns, of which the last may be shorter; arrays with a
number for each group are ordered row by row. Sums over a group are in float64: element i of the group is added to sum i mod 32, and
of these the upper half to the lower one until one is left, so that all kernels and processors agree.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U8, inline, kernel
from qformat.kernels.numba.simd import maximum, select_less, spread_f32, zeros_u32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f64, to_u8, to_u32
from qformat.kernels.numba.simd_lanes import largest, sum_halves
from qformat.kernels.numba.simd_memory import load, store, take

MAGNITUDE = np.uint32(0x7FFFFFFF)


@inline
def _group(number, cols, group):
    """Return where a group begins, where its last whole run of 32 elements ends, and where the group ends."""
    each = (cols + group - 1) // group
    row = number // each * cols
    start = row + number % each * group
    stop = min(start + group, row + cols)
    return start, start + (stop - start) // 32 * 32, stop


@inline
def _fold(lanes):
    return sum_halves(load(lanes, 0, 32))


@kernel(f"void({F32}, int64, int64, float64[::1], uint32[::1])")
def measure(x, cols, group, squares, magnitudes):
    """Compute the sum of squares of each group, and the bits of its magnitude if all but zeros have the same one, else 0."""
    lanes = np.empty(32)
    for number in range(squares.size):
        start, whole, stop = _group(number, cols, group)
        lanes[:] = 0.0
        total = load(lanes, 0, 32)
        most = zeros_u32(32)
        complement = zeros_u32(32)  # the largest of 2^31 - 1 - magnitude, zeros apart: the smallest magnitude
        for at in range(start, whole, 32):
            values = load(x, at, 32)
            wide = to_f64(values)
            total = total + wide * wide
            magnitude = bits(values) & MAGNITUDE
            most = maximum(most, magnitude)
            complement = maximum(complement, select_less(zeros_u32(32), magnitude, MAGNITUDE - magnitude, np.uint32(0)))
        store(lanes, 0, total)
        top, low = largest(most), largest(complement)
        for at in range(whole, stop):
            lanes[at - whole] += np.float64(x[at]) * np.float64(x[at])
            one = np.uint32(bits(x[at]) & MAGNITUDE)
            top = max(top, one)
            if one:
                low = max(low, np.uint32(MAGNITUDE - one))
        squares[number] = _fold(lanes)
        magnitudes[number] = top if top and top == MAGNITUDE - low else np.uint32(0)


@kernel(f"void({F32}, int64, int64, {F32}, {F32}, float32[::1])")
def unscale(x, cols, group, scales, least, y):
    """Divide by the scale of the group; values of a magnitude below ``least`` of their group become 0."""
    for number in range(scales.size):
        start, whole, stop = _group(number, cols, group)
        scale, limit = scales[number], bits(least[number])
        for at in range(start, whole, 32):
            values = load(x, at, 32)
            kept = select_less(bits(values) & MAGNITUDE, limit, zeros_u32(32), bits(values))
            store(y, at, from_bits(kept) / scale)
        for at in range(whole, stop):
            y[at] = x[at] / scale if np.uint32(bits(x[at]) & MAGNITUDE) >= limit else np.float32(0.0)


@kernel(f"void({F32}, {F32}, uint8[::1])")
def classify(y, thresholds, codes):
    """Count the thresholds strictly below each value."""
    whole = y.size // 32 * 32
    for at in range(0, whole, 32):
        values = load(y, at, 32)
        chosen = zeros_u32(32)
        for i in range(thresholds.size):
            chosen = select_less(spread_f32(thresholds[i], 32), values, chosen + 1, chosen)
        store(codes, at, to_u8(chosen))
    for at in range(whole, y.size):
        codes[at] = 0
        for i in range(thresholds.size):
            codes[at] += thresholds[i] < y[at]


@kernel(f"void({F32}, {U8}, {F32}, int64, int64, float64[::1], float64[::1])")
def products(x, codes, entries, cols, group, common, squares):
    """Compute for each group the sum of values times the entries of their codes, and of the squares of these entries."""
    upper, lower = np.empty(32), np.empty(32)
    for number in range(common.size):
        start, whole, stop = _group(number, cols, group)
        upper[:] = 0.0
        lower[:] = 0.0
        above, below = load(upper, 0, 32), load(lower, 0, 32)
        for at in range(start, whole, 32):
            entry = to_f64(take(entries, to_u32(load(codes, at, 32))))
            above = above + to_f64(load(x, at, 32)) * entry
            below = below + entry * entry
        store(upper, 0, above)
        store(lower, 0, below)
        for at in range(whole, stop):
            entry = np.float64(entries[codes[at]])
            upper[at - whole] += np.float64(x[at]) * entry
            lower[at - whole] += entry * entry
        common[number], squares[number] = _fold(upper), _fold(lower)


@kernel(f"void(float32[::1], int64, int64, {F32})")
def rescale(values, cols, group, scales):
    """Multiply by the scale of the group."""
    for number in range(scales.size):
        start, whole, stop = _group(number, cols, group)
        scale = scales[number]
        for at in range(start, whole, 32):
            store(values, at, load(values, at, 32) * scale)
        for at in range(whole, stop):
            values[at] *= scale
