"""Choose the headers of `nlm` blocks, compiled. Twin of ``numpy/nlm_search.py``.

16 runs of 32 weights are treated at once, each in a lane of its own; the 2 or 4 runs of a longer block combine their sums. A weight
is described by its position y in its block, with the extremes at -1 and 1 (unless these are very close together), and a header by a
line ``a + b * level``.

Headers are so coarse (5 bits of mantissa for the range, 6 for the minimum) that rounding them costs more than an imperfect line. So
each mapping is tried with one line, two more are tried for the best mapping, and the winner is refitted by least squares; then the
stored ranges on both sides of it, each with the minimum that suits it best, are compared by the error they lead to, which follows
from the fit's sums without another pass over the weights.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.blocks import ONE, ZERO
from qformat.kernels.numba.compiler import F32, inline, kernel
from qformat.kernels.numba.halves import REBIAS, halves_to_floats
from qformat.kernels.numba.nlm import HALF, LEVELS, MIDDLES, SIGN, TWO
from qformat.kernels.numba.simd import maximum as larger
from qformat.kernels.numba.simd import minimum as smaller
from qformat.kernels.numba.simd import select_less, select_nonzero, spread_f32, zeros_u32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_u32
from qformat.kernels.numba.simd_lanes import or_lanes, swap_1, swap_2
from qformat.kernels.numba.simd_memory import load, store, transpose_blocks

START = np.float32(0.98)  # b of the first lines
SHIFT = np.float32(0.025)  # a of the second ones, in both directions
FEWEST = np.float32(0.5)  # below this spread of the levels no line is fitted
CLOSE = np.float32(0.25)  # extremes are close together if they differ by less than this part of the block's middle
FINEST = np.float32(2.0**-14)  # where binary16 becomes subnormal
LOST = np.float32(3e38)  # a loss worse than that of any line
INFINITE = 992  # range: infinity
HUGE = np.float32(2.0**17)  # half of a range that overflows in any case
FIRST = np.array([0.94, 0.97, 1.0, 1.03], np.float32)  # b of the first lines for the least maximum


@inline
def _add(values, block):
    """Return the sums over the runs of each block."""
    if block > 32:
        values = values + swap_1(values)
    return values + swap_2(values) if block > 64 else values


@inline
def _greatest(values, block):
    if block > 32:
        values = larger(values, swap_1(values))
    return larger(values, swap_2(values)) if block > 64 else values


@inline
def _of_mapping(table, place, mapping):
    high = select_less(mapping, 3, spread_f32(table[16 + place], 16), spread_f32(table[24 + place], 16))
    low = select_less(mapping, 1, spread_f32(table[place], 16), spread_f32(table[8 + place], 16))
    return select_less(mapping, 2, low, high)


@inline
def _tables(mapping):
    """Return the upper levels of each lane's mapping, and the middles between them."""
    return (
        _of_mapping(LEVELS, 0, mapping),
        _of_mapping(LEVELS, 1, mapping),
        _of_mapping(LEVELS, 2, mapping),
        _of_mapping(LEVELS, 3, mapping),
        _of_mapping(LEVELS, 4, mapping),
        _of_mapping(LEVELS, 5, mapping),
        _of_mapping(LEVELS, 6, mapping),
        _of_mapping(LEVELS, 7, mapping),
        _of_mapping(MIDDLES, 0, mapping),
        _of_mapping(MIDDLES, 1, mapping),
        _of_mapping(MIDDLES, 2, mapping),
        _of_mapping(MIDDLES, 3, mapping),
        _of_mapping(MIDDLES, 4, mapping),
        _of_mapping(MIDDLES, 5, mapping),
        _of_mapping(MIDDLES, 6, mapping),
    )


@inline
def _level(position, tables):
    """Return the level nearest to a position."""
    size = from_bits(bits(position) & 0x7FFFFFFF)
    level = tables[7]
    level = select_less(size, tables[14], tables[6], level)
    level = select_less(size, tables[13], tables[5], level)
    level = select_less(size, tables[12], tables[4], level)
    level = select_less(size, tables[11], tables[3], level)
    level = select_less(size, tables[10], tables[2], level)
    level = select_less(size, tables[9], tables[1], level)
    level = select_less(size, tables[8], tables[0], level)
    return from_bits(bits(level) | (bits(position) & SIGN))


@inline
def _inverse(b):
    """Return 1 / b, or 0 where b is 0."""
    return select_less(b * ZERO, b, ONE / b, ZERO)


@inline
def _fit(y, total, mapping, a, b, block):
    """Find the nearest levels of all weights on a line, and fit the least-squares line for these levels.

    ``total`` is the sum of y. Returns (mean of the levels, their summed squared deviation from it, b of the fitted line, by how
    much its squared error is below that of the best constant).
    """
    tables = _tables(mapping)
    inverse = _inverse(b)
    levels, squares, products = a * ZERO, a * ZERO, a * ZERO
    for i in range(32):
        value = load(y, 16 * i, 16)
        level = _level((value - a) * inverse, tables)
        levels = levels + level
        squares = squares + level * level
        products = products + value * level
    levels, squares, products = _add(levels, block), _add(squares, block), _add(products, block)
    mean = levels * (ONE / np.float32(block))
    spread = squares - levels * mean
    common = products - total * mean
    best = larger(select_less(spread, FEWEST, a * ZERO, common / spread), ZERO)
    return mean, spread, best, best * common


@inline
def _extremes(y, mapping, a, b, block):
    """Return the largest and the smallest signed error of weights with their nearest levels on a line."""
    tables = _tables(mapping)
    inverse = _inverse(b)
    high, low = a * ZERO - LOST, a * ZERO + LOST
    for i in range(32):
        offset = load(y, 16 * i, 16) - a
        error = offset - _level(offset * inverse, tables) * b
        high, low = larger(error, high), smaller(error, low)
    return _greatest(high, block) + ZERO, ZERO - _greatest(low * -ONE, block)


@inline
def _loss_of_squares(total, y, mapping, a, b, block):
    """Return the squared error of a line with the nearest levels, less that of the best constant."""
    mean, spread, best, gain = _fit(y, total, mapping, a, b, block)
    return _loss(a, b, total * (ONE / np.float32(block)), (mean, spread, best, gain), block)


@inline
def _loss(a, b, centre, fit, block):
    mean, spread, best, gain = fit
    offset = a + b * mean - centre
    off = b - best
    return (offset * offset * np.float32(block) + off * off * spread) - gain


@inline
def _loss_of_maximum(y, mapping, a, b, block):
    """Return the largest absolute error of a line with the nearest levels."""
    high, low = _extremes(y, mapping, a, b, block)
    loss = larger(high, low * -ONE)
    return select_less(loss, ZERO, loss * ZERO + LOST, loss)  # a line that is not finite has none


@inline
def _minimum(value):
    """Return the 12-bit number nearest to a float (ties to even), in the lower bits of each lane."""
    pattern = bits(value)
    magnitude = pattern & 0x7FFFFFFF
    normal = (magnitude + 0xFFFF + ((magnitude >> 17) & 1) - REBIAS) >> 17
    subnormal = bits(from_bits(magnitude) + np.float32(8.0)) - 0x41000000
    nearest = select_less(from_bits(magnitude), FINEST, subnormal, normal)
    return smaller(nearest, 0x7C0) | ((pattern >> 20) & 0x800)


@inline
def _range_below(value):
    """Return the largest 10-bit number that does not exceed a float that is not negative."""
    small = to_u32(smaller(value, FINEST) * np.float32(2.0**19))
    return smaller(select_less(value, FINEST, small, (bits(value) - REBIAS) >> 18), INFINITE)


@inline
def _line(least, width, base, half):
    """Return (a, b) of a header's numbers."""
    size = halves_to_floats(width << 5) * HALF
    inverse = ONE / half
    return ((halves_to_floats(least << 4) - base) + size) * inverse, size * inverse


@inline
def _header(least, width, mapping):
    return width | (least << 10) | (mapping << 22)


@inline
def _rounded(width, a, base, half):
    """Return (least, a, b) for a stored range, with the stored minimum whose line is nearest to ``a``."""
    least = _minimum((base + a * half) - halves_to_floats(width << 5) * HALF)
    a, b = _line(least, width, base, half)
    return least, a, b


@inline
def _round_fit(fit, centre, mapping, base, half, block):
    """Return (header, loss) for the better of the ranges below and above that of a fitted line."""
    mean, _, best, _ = fit
    header, loss = (mapping & 0) + INFINITE, centre * ZERO + LOST
    below = _range_below(best * half * TWO)
    for step in range(2):
        width = smaller(below + step, INFINITE)
        wanted = centre - halves_to_floats(width << 5) * HALF / half * mean
        least, a, b = _rounded(width, wanted, base, half)
        new = _loss(a, b, centre, fit, block)
        header = select_less(new, loss, _header(least, width, mapping), header)
        loss = select_less(new, loss, new, loss)
    return header, loss


@inline
def _positions(y, block):
    """Replace weights, one run in each lane, by their positions; return six numbers for each lane.

    These are the weight at position 0 and the distance to the one at 1; the extremes; the sum of the positions; and 1 for blocks
    whose extremes are close together, so that rounding the minimum may move a line by more than its own steps.
    """
    high = load(y, 0, 16)
    low = high
    for i in range(1, 32):
        value = load(y, 16 * i, 16)
        high, low = larger(value, high), smaller(value, low)
    high, low = _greatest(high, block) + ZERO, ZERO - _greatest(low * -ONE, block)  # no -0, whichever zero came first
    half = high * HALF - low * HALF
    base = low + half
    size = from_bits(bits(base) & 0x7FFFFFFF)
    close = select_less(half, larger(size, size * ZERO + FINEST) * (CLOSE * HALF), zeros_u32(16) + 1, 0)
    half = larger(half, larger(size * np.float32(2.0**-9), size * ZERO + np.float32(2.0**-30)))
    inverse = ONE / half
    total = base * ZERO
    for i in range(32):
        value = (load(y, 16 * i, 16) - base) * inverse
        store(y, 16 * i, value)
        total = total + value
    return base, half, low, high, _add(total, block), close


@inline
def _anchored(y, place, header, loss, squares, block):
    """Improve the headers of blocks whose extremes are close: a minimum below both, with the best of some ranges."""
    base, half, low, high, total, close = place
    if or_lanes(close) == 0:
        return header
    size = from_bits(bits(low) & 0x7FFFFFFF)
    least = _minimum(low - larger(size * np.float32(2.0**-7), size * ZERO + np.float32(2.0**-21)))
    below = _range_below(larger(high - halves_to_floats(least << 4), ZERO))
    for number in range(4):
        mapping = zeros_u32(16) + number
        for step in range(4):
            width = smaller(below + step, INFINITE)
            a, b = _line(least, width, base, half)
            line = (y, mapping, a, b, block)
            new = _loss_of_squares(total, *line) if squares else _loss_of_maximum(*line)
            new = select_nonzero(close, new, LOST)
            header = select_less(new, loss, _header(least, width, mapping), header)
            loss = select_less(new, loss, new, loss)
    return header


@inline
def _better(fit, new):
    """Return the fit with the larger gain."""
    return (
        select_less(fit[3], new[3], new[0], fit[0]),
        select_less(fit[3], new[3], new[1], fit[1]),
        select_less(fit[3], new[3], new[2], fit[2]),
        select_less(fit[3], new[3], new[3], fit[3]),
    )


@inline
def _best_squares(y, place, block):
    """Return the headers of least squared error: the best of some lines, fitted again and rounded."""
    base, half, _, _, total, _ = place
    centre = total * (ONE / np.float32(block))
    zero = spread_f32(ZERO, 16)
    a, b = zero, zero + START
    mapping = zeros_u32(16)
    fit = (zero, zero, zero, zero - LOST)
    for number in range(4):
        other = zeros_u32(16) + number
        new = _fit(y, total, other, a, b, block)
        mapping = select_less(fit[3], new[3], other, mapping)
        fit = _better(fit, new)
    for number in range(2):
        fit = _better(fit, _fit(y, total, mapping, zero + (SHIFT if number else -SHIFT), b, block))
    header, loss = _round_fit(fit, centre, mapping, base, half, block)
    return _anchored(y, place, header, loss, True, block)


@inline
def _best_maximum(y, place, block):
    """Return the headers of least maximum error: of some lines and neighbouring ranges, moved so that both signs balance."""
    base, half, _, _, _, _ = place
    zero = spread_f32(ZERO, 16)
    loss, a, b, mapping = zero + LOST, zero, zero + ONE, zeros_u32(16)
    for number in range(4):
        for start in range(FIRST.size):
            new_b = zero + FIRST[start]
            high, low = _extremes(y, zeros_u32(16) + number, zero, new_b, block)
            new = (high - low) * HALF
            a, b = select_less(new, loss, (high + low) * HALF, a), select_less(new, loss, new_b, b)
            mapping = select_less(new, loss, zeros_u32(16) + number, mapping)
            loss = select_less(new, loss, new, loss)
    header, loss, best_a = mapping * 0 + INFINITE, zero + LOST, a
    near = _range_below(b * half * TWO)
    below = select_less(near, INFINITE, larger(near, 1) - 1, near)  # too large a range must overflow
    for step in range(4):
        width = smaller(below + step, INFINITE)
        for _ in range(2):
            high, low = _extremes(y, mapping, a, halves_to_floats(width << 5) * HALF / half, block)
            least, a, b = _rounded(width, a + (high + low) * HALF, base, half)
            new = _loss_of_maximum(y, mapping, a, b, block)
            header = select_less(new, loss, _header(least, width, mapping), header)
            best_a = select_less(new, loss, a, best_a)
            loss = select_less(new, loss, new, loss)
        a = best_a
    return _anchored(y, place, header, loss, False, block)


@kernel(f"void({F32}, uint32[::1], int64, boolean)")
def _search(x, headers, block, squares):
    y, tail = np.empty(512, np.float32), np.zeros(512, np.float32)
    found = np.empty(16, np.uint32)
    runs, parts = x.size // 32, block // 32
    for first in range(0, runs, 16):
        if runs - first >= 16:
            transpose_blocks(x, 32 * first, y)
        else:
            tail[: x.size - 32 * first] = x[32 * first :]
            transpose_blocks(tail, 0, y)
        place = _positions(y, block)
        header = _best_squares(y, place, block) if squares else _best_maximum(y, place, block)
        store(found, 0, select_less(place[1], HUGE, header, INFINITE))
        for lane in range(0, min(16, runs - first), parts):
            headers[(first + lane) // parts] = found[lane]


def rmse(x, headers, block):
    """Choose headers for the least squared error."""
    _search(x, headers, block, True)


def maximum(x, headers, block):
    """Choose headers for the least maximum of the absolute error within each block."""
    _search(x, headers, block, False)
