"""The best scales for Q4_0 blocks, by branch and bound; compiled. Twin of ``numpy/q4_0_exact.py``.

Every code pattern has a best binary16 scale in closed form (see ``q4_0_search.py``), and the best over all patterns is the best
over all binary16 scales. As |d| shrinks from infinity, c = largest magnitude / |d| growing, the code of a weight of magnitude w
goes from k - 1 to k where w / |d| passes k - 1/2: with both signs of d, a block has about 500 patterns. To list and sort them all
takes nearly takes nearly all the time of a direct search. Instead:

1. A and B are computed at a grid of values of c, for 16 blocks at once. The best of these patterns, with its scale rounded to
   binary16, is the incumbent.
2. Between two grid points, in a *cell*, A * A / B has an upper bound in closed form (`_may_hold`). Cells whose bound is below the
   incumbent are dropped; of most blocks about two are left.
3. What is left is halved and bounded again, block by block (`_walk`), until few changes remain, which are gone through one by one.

Bounds are computed in float32 and compared with some slack, so that rounding drops no cell that may win. Incumbents are compared in
float64, as good patterns differ by less than float32 resolves.
"""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32

from qformat.kernels.numba.compiler import F32, Step, inline, kernel
from qformat.kernels.numba.halves import floats_to_halves, half_to_float, halves_to_floats
from qformat.kernels.numba.q4_0_search import (
    ONE,
    SMALLEST,
    ZERO,
    extreme,
    finish,
    for_one_magnitude,
    odd_ones,
    search,
    value_of,
)
from qformat.kernels.numba.simd import (
    greater_equal,
    maximum,
    minimum,
    select_less,
    select_nonzero,
    spread_f32,
    zeros_u32,
)
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32, to_f64, to_i32
from qformat.kernels.numba.simd_lanes import largest, or_lanes, pack_bits, sum_halves, sum_lanes, trailing_zeros
from qformat.kernels.numba.simd_memory import load, load_f32, store

# The values of c. Before the first one all codes are 0. After the last one the least-squares scale is above |d| whatever the
# weights are, and from there on v only falls. With the shared ones no code is 8, so that the sign of d does not matter.
SHARED = (0.500001, 1.3, 2, 2.7, 3.4, 4, 4.6, 5.2, 5.8, 6.3, 6.75, 7.1, 7.4)
GRID = np.array([*SHARED, 7.75, 8, 8.25, 8.5, 8.85, 9.4, 11, 16, 32], np.float32)
POINTS = GRID.size
ONE_SIGN = len(SHARED)
SLACK = np.float32(1 + 2.0**-17)  # more than rounding takes from the bounds
LESS = np.float32(1 - 2.0**-17)
# places in the scratch array of float32
WEIGHTS = 0  # of 16 blocks, over the largest
SUMS = 512  # A and B of 16 blocks at each grid point; twice: from ONE_SIGN on again for d < 0
REACHED = SUMS + 2 * POINTS * 32
SIZES, BEFORE, AFTER = (REACHED + 16 + 32 * i for i in range(3))  # of one block
STACK = AFTER + 32
WORK = STACK + 6 * 16
ACTIVE, RESULTS = 64, 80  # in the scratch array of uint32, after masks of points and cells for both signs
TO_INTEGER_64 = 1.5 * 2.0**52  # added and subtracted again, it rounds to an integer, ties to even
SMALLEST_NORMAL = 2.0**-14
HALF = np.float32(0.5)
# a cell is gone through change by change if B grows by no more than FEW and c by no more than a factor of WIDE, or c by less than
# NARROW
FEW, WIDE, NARROW = np.float32(24), np.float32(1.1), np.float32(1.01)
INFINITY_BITS = 0x7F800000


@inline
def _double_to_half(x):
    """Return a positive float64 rounded to binary16 (ties to even), the largest finite one at most, as an integer."""
    if x >= 65504.0:
        return np.int64(0x7BFF)
    if x < SMALLEST_NORMAL:
        return np.int64(x * 2.0**24 + TO_INTEGER_64 - TO_INTEGER_64)
    pattern = bits(x)
    return np.int64((pattern + 0x1FFFFFFFFFF + ((pattern >> 42) & 1)) >> 42) - (1008 << 10)


@Step
def _exact_16(x, start, t, scratch):
    work, events, ints = scratch
    first = extreme(t)
    top = from_bits(bits(first) & 0x7FFFFFFF)
    usual = greater_equal(bits(top), SMALLEST + 1) - greater_equal(bits(top), INFINITY_BITS)
    if sum_lanes(usual) < 16:  # converting a NaN or an infinity to an integer code is undefined
        for i in range(32):
            store(t, 16 * i, from_bits(bits(load(t, 16 * i, 16)) * usual))
        top = from_bits(select_nonzero(usual, bits(top), bits(ONE)))
    sizes, signs = odd_ones(t, first)
    if or_lanes(select_nonzero(sizes, zeros_u32(16), 1)):
        store(ints, RESULTS, for_one_magnitude(first, signs))
    inverse = ONE / top
    for i in range(32):
        value = load(t, 16 * i, 16)
        store(work, WEIGHTS + 16 * i, from_bits(bits(value) & 0x7FFFFFFF) * inverse)
    zero = spread_f32(ZERO, 16)
    best_a, best_b, most = zero, zero + ONE, zero
    for j in range(POINTS):
        a, b, a_minus, b_minus = zero, zero, zero, zero
        if j < ONE_SIGN:
            for i in range(32):
                w = load(work, WEIGHTS + 16 * i, 16)
                k = to_f32(to_i32(w * GRID[j] + HALF))
                a = a + w * k
                b = b + k * k
        else:
            for i in range(32):
                w = load(work, WEIGHTS + 16 * i, 16)
                most_code = 7 + to_i32(bits(load(t, 16 * i, 16)) >> 31)  # 8 for negative weights, if d > 0
                k = to_i32(w * GRID[j] + HALF)
                plus = to_f32(minimum(k, most_code))
                minus = to_f32(minimum(k, 15 - most_code))
                a = a + w * plus
                b = b + plus * plus
                a_minus = a_minus + w * minus
                b_minus = b_minus + minus * minus
            store(work, SUMS + 32 * (j + POINTS), a_minus)
            store(work, SUMS + 32 * (j + POINTS) + 16, b_minus)
            v = a_minus * a_minus / b_minus
            best_a = select_less(most, v, a_minus, best_a)
            best_b = select_less(most, v, b_minus, best_b)
            most = maximum(v, most)
        store(work, SUMS + 32 * j, a)
        store(work, SUMS + 32 * j + 16, b)
        v = a * a / b
        best_a = select_less(most, v, a, best_a)
        best_b = select_less(most, v, b, best_b)
        most = maximum(v, most)
    # the incumbent: v with a binary16 scale. A pattern can only win if A * A / B, its v with the best real scale, reaches that.
    scale = halves_to_floats(floats_to_halves(best_a / best_b * top)) * inverse
    reached = value_of(best_a, best_b, scale)
    for sign in range(2):
        points, cells = zeros_u32(16), zeros_u32(16)
        other = POINTS if sign else 0
        for j in range(ONE_SIGN - 1 if sign else 0, POINTS):
            if not sign or j >= ONE_SIGN:
                points = points | (_reaches(work, j + other, reached) << np.uint32(j))
            if j < POINTS - 1:
                cells = cells | (_may_hold(work, j, other, reached) << np.uint32(j))
        store(ints, 32 * sign, points)
        store(ints, 32 * sign + 16, cells)
    store(work, REACHED, reached)
    store(ints, ACTIVE, select_nonzero(usual, sizes, 0))
    for lane in range(16):
        if ints[ACTIVE + lane]:
            ints[RESULTS + lane] = _walk(x, start + 32 * lane, lane, ints, work, events)
    return finish(first, load(ints, RESULTS, 16))


@inline
def _reaches(work, point, reached):
    """Return 1 for the lanes where the codes at a grid point give a v of at least ``reached``."""
    a, b = load(work, SUMS + 32 * point, 16), load(work, SUMS + 32 * point + 16, 16)
    return select_less(a * a * SLACK, reached * b, zeros_u32(16), 1)


@inline
def _may_hold(work, j, other, reached):
    """Return 1 for the lanes where a pattern strictly between two grid points may give a v of at least ``reached``.

    Where a code goes from k - 1 to k, at the scale s = w / (k - 1/2), A grows by w and B by 2 k - 1: dA = s dB / 2. As s falls from
    one end of the cell to the other, A as a function of B stays below two straight lines: through the first end with the slope of
    its s / 2, and through the second end with its own. A * A / B is convex along a line, hence largest at the ends of its
    reachable part: one change (dB of at least 1) from either grid point, and where the lines meet.
    """
    low = SUMS + 32 * (j + (other if j >= ONE_SIGN else 0))
    high = SUMS + 32 * (j + 1 + other)
    a0, b0 = load(work, low, 16), load(work, low + 16, 16)
    a1, b1 = load(work, high, 16), load(work, high + 16, 16)
    slope0, slope1 = HALF / GRID[j], HALF / GRID[j + 1]
    b = (a1 - a0 + b0 * slope0 - b1 * slope1) / (slope0 - slope1)
    a = a0 + (b - b0) * slope0
    a0, a1 = a0 + slope0, a1 - slope1
    b0, b1 = b0 + ONE, b1 - ONE
    v = maximum(maximum(a0 * a0 / b0, a1 * a1 / b1), a * a / b)
    within = select_less(v * SLACK, reached, zeros_u32(16), 1)
    return select_less(b1, b0, zeros_u32(16), within)


@inline
def _may_be_more(c0, a0, b0, c1, a1, b1, reached):
    """Do as `_may_hold` for one block, without divisions by B."""
    slope0, slope1 = HALF / c0, HALF / c1
    b = (a1 - a0 + b0 * slope0 - b1 * slope1) / (slope0 - slope1)
    a = a0 + (b - b0) * slope0
    next0, next1 = a0 + slope0, a1 - slope1
    reachable = next0 * next0 >= reached * (b0 + ONE) or next1 * next1 >= reached * (b1 - ONE) or a * a >= reached * b
    return b1 - b0 >= ONE + ONE and reachable


@inline
def _codes(w, c, limit):
    """Return the magnitudes of the codes for a scale of largest magnitude / c; ``limit`` is 7 or 8 by the signs."""
    return minimum(to_i32(w * c + HALF), limit)


@inline
def _walk(x, start, lane, ints, work, events):
    """Return the best binary16 scale of a block, of all patterns at the grid points and in the cells that its masks name.

    A stack of parts of cells, six numbers each: c, A and B of both ends. Each improvement of the incumbent drops more of them.
    """
    values = load_f32(x, start, 32)
    size = from_bits(bits(values) & 0x7FFFFFFF)
    top = from_bits(largest(bits(size)))
    w = size * (ONE / top)
    negative = to_i32(bits(values) >> 31)
    store(work, SIZES, size)
    reached = work[REACHED + lane] * LESS
    square = np.float64(top) * np.float64(top)
    most = 0.0
    best = np.int64(0)
    for sign in range(2):
        points, cells = np.int64(ints[32 * sign + lane]), np.int64(ints[32 * sign + 16 + lane])
        limit = (8 - negative) if sign else (7 + negative)
        other = POINTS if sign else 0
        while points:
            j = trailing_zeros(points)
            points &= points - 1
            most, best = _better(size, _codes(w, GRID[j], limit), sign, most, best)
        while cells:
            j = trailing_zeros(cells)
            cells &= cells - 1
            low = SUMS + 32 * (j + (other if j >= ONE_SIGN else 0)) + lane
            high = SUMS + 32 * (j + 1 + other) + lane
            place = STACK
            work[place] = GRID[j]
            work[place + 1] = work[low]
            work[place + 2] = work[low + 16]
            work[place + 3] = GRID[j + 1]
            work[place + 4] = work[high]
            work[place + 5] = work[high + 16]
            while place >= STACK:
                c0, a0, b0 = work[place], work[place + 1], work[place + 2]
                c1, a1, b1 = work[place + 3], work[place + 4], work[place + 5]
                if not _may_be_more(c0, a0, b0, c1, a1, b1, reached):
                    place -= 6
                    continue
                if (b1 - b0 > FEW or c1 > c0 * WIDE) and c1 > c0 * NARROW:
                    c = (c0 + c1) * HALF
                    codes = _codes(w, c, limit)
                    k = to_f32(codes)
                    a = sum_halves(w * k)
                    b = sum_halves(k * k)
                    if a * a >= reached * b:
                        most, best = _better(size, codes, sign, most, best)
                        reached = max(reached, np.float32(most / square) * LESS)
                    work[place] = c
                    work[place + 1] = a
                    work[place + 2] = b
                    place += 6
                    work[place] = c0
                    work[place + 1] = a0
                    work[place + 2] = b0
                    work[place + 3] = c
                    work[place + 4] = a
                    work[place + 5] = b
                    continue
                place -= 6
                before = _codes(w, c0, limit)
                count = _changes(before, _codes(w, c1, limit), work, events)
                a64 = sum_halves(to_f64(size) * to_f64(before))
                b64 = np.float64(b0)
                threshold = np.float64(reached) * square
                for n in range(count - 1):
                    a64 += events[1, n]
                    b64 += events[2, n]
                    if a64 * a64 >= threshold * b64:
                        most, best = _keep_better(a64, b64, sign, most, best)
                reached = max(reached, np.float32(most / square) * LESS)
    return uint32(best)


@inline
def _better(size, codes, sign, most, best):
    """Do as `_keep_better` for the sums of some codes."""
    a = sum_halves(to_f64(size) * to_f64(codes))
    return _keep_better(a, np.float64(sum_lanes(codes * codes)), sign, most, best)


@inline
def _keep_better(a, b, sign, most, best):
    """Return the larger of the incumbent's v and that of the best scale for codes with the sums ``a`` and ``b``, with its scale."""
    half = _double_to_half(a / b)
    d = np.float64(half_to_float(uint16(half)))
    v = 2 * d * a - d * d * b
    if v > most or (v == most and half > (best & 0x7FFF)):
        return v, half | (sign << 15)
    return most, best


@inline
def _changes(before, after, work, events):
    """List the changes from some codes to others in ``events``, rows of the scale, dA and dB, from large scales to small ones."""
    store(work, BEFORE, to_f32(before))
    store(work, AFTER, to_f32(after))
    mask = pack_bits(after - before)
    count = 0
    while mask:
        i = trailing_zeros(mask)
        mask &= mask - uint32(1)
        a = np.float64(work[SIZES + i])
        code = np.float64(work[BEFORE + i])
        while code < work[AFTER + i]:
            code += 1
            at = a / (code - 0.5)
            place = count
            while place and events[0, place - 1] < at:
                events[0, place] = events[0, place - 1]
                events[1, place] = events[1, place - 1]
                events[2, place] = events[2, place - 1]
                place -= 1
            events[0, place] = at
            events[1, place] = a
            events[2, place] = 2 * code - 1
            count += 1
    return count


@kernel(f"void({F32}, uint16[::1])")
def choose(x, scales):
    """Do as `q4_0_table.choose`, for the binary16 scale of least squared error; of equals the largest, and the positive one."""
    search(x, scales, _exact_16, (np.empty(WORK, np.float32), np.empty((3, 256)), np.zeros(96, np.uint32)))
