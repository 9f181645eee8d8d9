"""Scales and zeros of least squared error, compiled. Twin of ``numpy/affine_search.py``.

A scale and a zero give levels u (the codes less the zero), and levels give a least-squares scale, Σxu / Σuu, which reduces the
squared error from Σxx by (Σxu)² / Σuu. Neither step of such a turn can raise the error, but turns end in local optima: hence
several starts, ranked by that gain, of which the best takes more turns. At last the scale is rounded to its stored dtype, and the
measured error decides between it, its neighbour and the naive choice, from the smallest and the largest value alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import uint16, uint32

from qformat.kernels.numba.affine import ZERO, nearest
from qformat.kernels.numba.blocks import reciprocal
from qformat.kernels.numba.compiler import F32, inline, kernel
from qformat.kernels.numba.halves import float_to_half, half_to_float
from qformat.kernels.numba.packing import crop
from qformat.kernels.numba.simd import count_up, maximum, minimum, select_less, spread_f32
from qformat.kernels.numba.simd_casts import bits, from_bits
from qformat.kernels.numba.simd_lanes import high_half, lane, low_half, sum_halves
from qformat.kernels.numba.simd_memory import load

F16, BF16 = 0, 1  # anything else is float32
ROUNDS = 3


@inline
def _sums(x, at, width, inverse, low, high):
    """Return Σxu and Σuu of a group."""
    xu = spread_f32(ZERO, 32)
    uu = spread_f32(ZERO, 32)
    whole = width // 32 * 32
    for i in range(at, at + whole, 32):
        values = load(x, i, 32)
        levels = nearest(values, inverse, low, high)
        xu = xu + values * levels
        uu = uu + levels * levels
    if whole < width:
        values = load(x, at + whole, 32)
        levels = crop(nearest(values, inverse, low, high), width - whole)
        xu = xu + values * levels
        uu = uu + levels * levels
    return np.float64(sum_halves(xu)), np.float64(sum_halves(uu))


@inline
def _distance(x, at, width, scale, low, high):
    """Return the squared error of a group."""
    inverse = reciprocal(scale)
    total = spread_f32(ZERO, 32)
    whole = width // 32 * 32
    for i in range(at, at + whole, 32):
        values = load(x, i, 32)
        error = values - nearest(values, inverse, low, high) * scale
        total = total + error * error
    if whole < width:
        values = load(x, at + whole, 32)
        error = crop(values - nearest(values, inverse, low, high) * scale, width - whole)
        total = total + error * error
    return sum_halves(total)


@inline
def _ends(x, at, width):
    """Return the smallest and the largest value of a group."""
    first = spread_f32(x[at], 32)
    smallest = first
    largest = first
    whole = width // 32 * 32
    for i in range(at, at + whole, 32):
        smallest = minimum(load(x, i, 32), smallest)
        largest = maximum(load(x, i, 32), largest)
    if whole < width:
        values = select_less(count_up(32), width - whole, load(x, at + whole, 32), first)
        smallest = minimum(values, smallest)
        largest = maximum(values, largest)
    return _least(smallest), -_least(spread_f32(ZERO, 32) - largest)


@inline
def _least(vector):
    vector = minimum(high_half(vector), low_half(vector))
    vector = minimum(high_half(vector), low_half(vector))
    vector = minimum(high_half(vector), low_half(vector))
    vector = minimum(high_half(vector), low_half(vector))
    return min(lane(vector, 0), lane(vector, 1))


@inline
def _rounded(scale, kind):
    """Return a scale as it can be stored."""
    if kind == F16:
        return half_to_float(float_to_half(scale))
    if kind == BF16:
        pattern = np.int64(bits(scale))
        return from_bits(uint32((pattern + 0x7FFF + ((pattern >> 16) & 1)) & 0xFFFF0000))
    return scale


@inline
def _other(scale, rounded, kind):
    """Return the storable number on the other side of a scale."""
    step = -1 if abs(rounded) > abs(scale) else 1
    if kind == F16:
        return half_to_float(uint16(np.int64(float_to_half(rounded)) + step))
    if kind == BF16:
        return from_bits(uint32((np.int64(bits(rounded)) + 0x10000 * step) & 0xFFFF0000))
    return rounded


@inline
def _final(x, at, width, naive, naive_zero, scale, zero, top, kind):
    """Return the error, scale and zero of the best of the naive choice and the found scale or its neighbour, all rounded."""
    chosen = _rounded(naive, kind)
    chosen_zero = naive_zero
    least = _distance(x, at, width, chosen, np.float32(-naive_zero), np.float32(top - naive_zero))
    low = np.float32(-zero)
    high = np.float32(top - zero)
    near = _rounded(scale, kind)
    error = _distance(x, at, width, near, low, high)
    if error < least:
        least, chosen, chosen_zero = error, near, zero
    if kind in (F16, BF16):
        near = _other(scale, near, kind)
        error = _distance(x, at, width, near, low, high)
        if error < least:
            least, chosen, chosen_zero = error, near, zero
    return least, chosen, chosen_zero


@kernel(f"void({F32}, int64, int64, int64, int64, {F32}, float32[::1])")
def symmetric(x, cols, group, width, kind, choices, scales):
    """Choose the scales of groups with codes of ``width`` bits and the zero in the middle.

    Parameters
    ----------
    x
        float32: rows of ``cols`` elements, padded with zeros to whole runs of 32.
    cols, group, width
        As for `affine.encode`.
    kind
        The scales' dtype: `F16`, `BF16` or float32.
    choices
        The starts: levels, before rounding, to put the value of largest magnitude at; may be negative.
    scales
        The result, rounded to the dtype; infinite if the naive choice is.
    """
    padded = (cols + 31) // 32 * 32
    middle = np.int64(1 << (width - 1))
    top = np.int64((1 << width) - 1)
    low = np.float32(-middle)
    high = np.float32(middle - 1)
    number = 0
    for row in range(x.size // padded):
        for start in range(0, cols, group):
            at = row * padded + start
            count = min(group, cols - start)
            smallest, largest = _ends(x, at, count)
            extreme = smallest if -smallest > largest else largest
            if extreme == ZERO:
                scales[number] = ZERO
                number += 1
                continue
            best = 0.0
            scale = ZERO
            for choice in choices:
                xu, uu = _sums(x, at, count, choice / extreme, low, high)
                if uu > 0.0 and xu * xu / uu > best:
                    best = xu * xu / uu
                    scale = np.float32(xu / uu)
            for _ in range(ROUNDS):
                xu, uu = _sums(x, at, count, reciprocal(scale), low, high)
                if not (uu > 0.0 and xu * xu / uu > best):
                    break
                best = xu * xu / uu
                scale = np.float32(xu / uu)
            least, chosen, _zero = _final(x, at, count, extreme / low, middle, scale, middle, top, kind)
            absolute = _rounded(extreme / high, kind)
            if _distance(x, at, count, absolute, low, high) < least:
                chosen = absolute
            scales[number] = chosen
            number += 1


@inline
def _clamp(zero):
    """Return the nearest zero that can be stored; 0 for a NaN."""
    if not zero > 0.0:
        return np.int64(0)
    if zero >= 255.0:
        return np.int64(255)
    return np.int64(math.floor(zero + 0.5))


@inline
def _better_zero(x, at, count, inverse, centre, top, best, scale, zero):
    """Try a zero and its neighbours; return the best gain so far, with its scale and zero."""
    for candidate in range(max(0, centre - 1), min(255, centre + 1) + 1):
        xu, uu = _sums(x, at, count, inverse, np.float32(-candidate), np.float32(top - candidate))
        if uu > 0.0 and xu * xu / uu > best:
            best = xu * xu / uu
            scale = np.float32(xu / uu)
            zero = candidate
    return best, scale, zero


@kernel(f"void({F32}, int64, int64, int64, int64, {F32}, float32[::1], uint8[::1])")
def asymmetric(x, cols, group, width, kind, choices, scales, zeros):
    """Choose scales and zeros; as `symmetric`, but ``choices`` are numbers of steps to divide the range of values into.

    A group of positive values would need a negative zero, which cannot be stored; its scale is negative instead.
    """
    padded = (cols + 31) // 32 * 32
    top = np.int64((1 << width) - 1)
    number = 0
    for row in range(x.size // padded):
        for start in range(0, cols, group):
            at = row * padded + start
            count = min(group, cols - start)
            smallest, largest = _ends(x, at, count)
            span = largest - smallest
            if not span > ZERO:
                scales[number] = _rounded(largest + ZERO, kind)  # all codes are 1; + 0 makes a negative zero positive
                zeros[number] = 0
                number += 1
                continue
            turned = smallest > ZERO
            naive = (-span if turned else span) / np.float32(top)
            end = largest if turned else smallest
            naive_zero = _clamp(-np.float64(end) / np.float64(naive)) if naive != ZERO else np.int64(0)
            centre = (np.float64(smallest) + np.float64(largest)) * 0.5
            best = 0.0
            scale = ZERO
            zero = np.int64(0)
            for choice in choices:
                inverse = (-choice if turned else choice) / span
                near = _clamp(np.float64(top) * 0.5 - centre * np.float64(inverse))
                best, scale, zero = _better_zero(x, at, count, inverse, near, top, best, scale, zero)
            for _ in range(ROUNDS):
                before = best
                best, scale, zero = _better_zero(x, at, count, reciprocal(scale), zero, top, best, scale, zero)
                if not best > before:
                    break
            _least_error, chosen, chosen_zero = _final(x, at, count, naive, naive_zero, scale, zero, top, kind)
            scales[number] = chosen
            zeros[number] = chosen_zero
            number += 1
