"""Searches for the scales and minima of Q4_1 blocks, compiled. Twin of ``numpy/q4_1_search.py``.

16 blocks are treated at once, each in a lane of its own. A trial takes a line ``code = slope * y + offset`` for the weights y,
rounds to codes, and gets from three sums the least-squares line for these codes and how much of the variance it explains; that line
is the next to try. Neither step can raise the error, but the turns soon end in a local optimum, one of thousands for two unknowns:
what counts are the starts (``tables.py``), and one or two turns from each. Only the best line is then rounded to binary16, with its
error measured, as rounding may matter more than the line where binary16 is coarse for a block.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.halves import floats_to_halves, halves_to_floats
from qformat.kernels.numba.simd import greater_equal, maximum, minimum, select_less, select_nonzero, spread_f32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f32, to_i32, to_u16, to_u32
from qformat.kernels.numba.simd_lanes import or_lanes
from qformat.kernels.numba.simd_memory import load, store, transpose_blocks
from qformat.kernels.tables import FEW, FEW_LEVELS, MORE, MORE_LEVELS

ZERO, HALF, ONE, TOP = (np.float32(value) for value in (0, 0.5, 1, 15))
ROUND = np.float32(2.0**23)  # added and subtracted again, it rounds to an integer, ties to even
PART = np.float32(1 / 32)
TINY = np.float32(2.0**-100)  # a range below it is 0 in binary16
FAR = np.float32(64)  # binary16 is coarse for a minimum further than this many scales from 0
FINE = np.float32(2.0**-16)  # and for a scale below this
INFINITY = np.float32(np.inf)


@inline
def _sums(y, slope, offset):
    """Return the sums of code, code squared and code times y, for codes ``slope * y + offset`` rounded and clamped to 0 to 15."""
    count = spread_f32(ZERO, 16)
    squares, products = count, count
    for i in range(32):
        value = load(y, 16 * i, 16)
        code = (maximum(minimum(value * slope + offset, TOP), ZERO) + ROUND) - ROUND
        count = count + code
        squares = squares + code * code
        products = products + code * value
    return count, squares, products


@inline
def _trial(y, slope, offset, best):
    """Return slope and offset of the least-squares line for the codes of a line, and the better of it and ``best``.

    Lines are (covariance with y, variance of the codes, mean code). The explained variance, covariance² / variance, is compared
    crosswise, without divisions. y has the mean 0.
    """
    count, squares, products = _sums(y, slope, offset)
    mean = count * PART
    variance = squares - count * mean
    products = select_less(spread_f32(ZERO, 16), variance, products, ZERO)
    old_products, old_variance, old_mean = best
    ours = products * products * old_variance
    theirs = old_products * old_products * variance
    chosen = (
        select_less(theirs, ours, products, old_products),
        select_less(theirs, ours, variance, old_variance),
        select_less(theirs, ours, mean, old_mean),
    )
    return variance / products, mean, chosen


@inline
def _error(x, scale, low):
    """Return the squared error of the nearest codes."""
    inverse = select_nonzero(bits(scale), ONE / scale, ZERO)
    total = spread_f32(ZERO, 16)
    for i in range(32):
        value = load(x, 16 * i, 16)
        code = to_f32(to_i32(maximum(minimum((value - low) * inverse + HALF, TOP), ZERO)))
        error = value - (code * scale + low)
        total = total + error * error
    return total


@inline
def _better(x, scale, low, best):
    """Return the better of ``best``, (error, binary16 scale, binary16 minimum), and a scale and a minimum, which it rounds."""
    scale, low = floats_to_halves(scale), floats_to_halves(low)
    error = _error(x, halves_to_floats(scale), halves_to_floats(low))
    old, old_scale, old_low = best
    return (
        select_less(error, old, error, old),
        select_less(error, old, scale, old_scale),
        select_less(error, old, low, old_low),
    )


@inline
def _step(half, by):
    """Return the binary16 that is ``by`` steps up."""
    magnitude = to_i32(half & 0x7FFF)
    order = select_nonzero(half & 0x8000, 0 - magnitude, magnitude) + by
    return to_u32(select_less(order, 0, 0x8000 - order, order))


@inline
def _fixed(x, low, high, levels):
    """Return a good scale for a given minimum: the best of least-squares scales from several starts, refined once more."""
    best_products = spread_f32(ZERO, 16)
    best_squares = best_products + ONE
    for k in range(levels.size + 1):
        inverse = levels[k] / (high - low) if k < levels.size else best_squares / best_products
        products = spread_f32(ZERO, 16)
        squares = products
        for i in range(32):
            value = load(x, 16 * i, 16) - low
            code = (maximum(minimum(value * inverse, TOP), ZERO) + ROUND) - ROUND
            squares = squares + code * code
            products = products + code * value
        products = select_less(spread_f32(ZERO, 16), squares, products, ZERO)
        ours = products * products * best_squares
        theirs = best_products * best_products * squares
        best_products = select_less(theirs, ours, products, best_products)
        best_squares = select_less(theirs, ours, squares, best_squares)
    return maximum(best_products / best_squares, ZERO)


@inline
def _extremes(x):
    """Return the smallest and the largest weight."""
    low = load(x, 0, 16)
    high = low
    for i in range(1, 32):
        value = load(x, 16 * i, 16)
        low = minimum(value, low)
        high = maximum(value, high)
    return low, high


@inline
def _naive(x, low, step):
    """Return the naive choice as `_better` does; if it overflows, with an error of -1, so that it is kept and reported."""
    zeros = spread_f32(ZERO, 16)
    best = _better(x, step, low, (zeros + INFINITY, bits(zeros), bits(zeros)))
    scale, least = floats_to_halves(step), floats_to_halves(low)
    large = greater_equal(maximum(scale & 0x7FFF, least & 0x7FFF), 0x7C00)
    return select_nonzero(large, zeros - ONE, best[0]), scale, least


@inline
def _normalize(x, y, low, extent):
    """Put weights from 0 to 15 less their mean into ``y``; return the mean."""
    zeros = spread_f32(ZERO, 16)
    widen = select_less(extent, TINY, zeros, TOP / extent)
    total = zeros
    for i in range(32):
        value = (load(x, 16 * i, 16) - low) * widen
        store(y, 16 * i, value)
        total = total + value
    middle = total * PART
    for i in range(32):
        store(y, 16 * i, load(y, 16 * i, 16) - middle)
    return middle


@inline
def _tries(y, middle, starts, turns, line):
    """Return the best line found from some starts, or ``line``, after one more turn from it."""
    for k in range(starts.shape[0]):
        slope = spread_f32(starts[k, 0], 16)
        offset = middle * slope + starts[k, 1]
        for _ in range(turns):
            slope, offset, line = _trial(y, slope, offset, line)
    _, _, line = _trial(y, line[1] / line[0], line[2], line)
    return line


@inline
def _settle(x, line, centre, step, high, levels, best):
    """Return the better of ``best`` and a line's scale and minimum, rounded; where binary16 is coarse, of their neighbours, too."""
    zeros = spread_f32(ZERO, 16)
    scale = step * (line[0] / line[1])
    rounded = halves_to_floats(floats_to_halves(scale))
    best = _better(x, rounded, centre - rounded * line[2], best)
    least = centre - scale * line[2]
    ones = (bits(zeros) & 0) + 1
    coarse = select_less(scale * FAR, from_bits(bits(least) & 0x7FFFFFFF), ones, 0) | select_less(scale, FINE, ones, 0)
    coarse = select_less(zeros, best[0], coarse, 0)
    if or_lanes(coarse):
        tried = select_nonzero(coarse, best[0], zeros - ONE), best[1], best[2]
        half_scale, half_least = floats_to_halves(scale), floats_to_halves(least)
        for by in range(-1, 2):
            near = halves_to_floats(_step(half_least, by))
            tried = _better(x, _fixed(x, near, high, levels), near, tried)
            near = maximum(halves_to_floats(_step(half_scale, by)), ZERO)
            tried = _better(x, near, centre - near * line[2], tried)
        best = select_nonzero(coarse, tried[0], best[0]), tried[1], tried[2]
    return best


@inline
def _choose(x, y, thorough):
    """Return the binary16 scales and minima of 16 blocks ``x``; ``y`` is scratch of the same size."""
    low, high = _extremes(x)
    extent = high - low
    step = extent / TOP
    best = _naive(x, low, step)
    middle = _normalize(x, y, low, extent)
    centre = low + step * middle
    zeros = spread_f32(ZERO, 16)
    line = _tries(y, middle, FEW, 1, (zeros, zeros + ONE, zeros))
    best = _settle(x, line, centre, step, high, FEW_LEVELS, best)
    if thorough:
        line = _tries(y, middle, MORE, 2, line)
        best = _settle(x, line, centre, step, high, MORE_LEVELS, best)
    return best[1], best[2]


@inline
def search(x, scales, minima, thorough):
    """Choose scales and minima for blocks of 32; see ``q4_1_als.py`` and ``q4_1_best.py``."""
    work, scratch, last = np.empty(512, np.float32), np.empty(512, np.float32), np.zeros(512, np.float32)
    chosen = np.empty((2, 16), np.uint16)
    whole = x.size // 512 * 16
    for block in range(0, whole, 16):
        transpose_blocks(x, 32 * block, work)
        scale, least = _choose(work, scratch, thorough)
        store(scales, block, to_u16(scale))
        store(minima, block, to_u16(least))
    remaining = x.size // 32 - whole
    if remaining:
        last[: 32 * remaining] = x[32 * whole : 32 * (whole + remaining)]
        transpose_blocks(last, 0, work)
        scale, least = _choose(work, scratch, thorough)
        store(chosen[0], 0, to_u16(scale))
        store(chosen[1], 0, to_u16(least))
        scales[whole:], minima[whole:] = chosen[0, :remaining], chosen[1, :remaining]
