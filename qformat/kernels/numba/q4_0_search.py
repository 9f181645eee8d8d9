"""Shared parts of the searches for the scales of Q4_0 blocks, compiled. Twin of ``numpy/q4_0_search.py``.

For codes k (from -8 to 7) the squared error of a block is sum(x * x) - v with v = 2 d A - d d B, A = sum(x k), B = sum(k k). That
is a parabola in d: the best d is A / B, where v = A * A / B, and the best binary16 one is the nearest to it. What is left to find
are the codes. Searches treat 16 blocks at once, one in each lane: ``t`` holds element i of the block in lane b at [16 * i + b].
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.halves import floats_to_halves, halves_to_floats
from qformat.kernels.numba.simd import greater_equal, maximum, minimum, select_less, select_nonzero, zeros_u32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_u16
from qformat.kernels.numba.simd_memory import load, store, transpose_blocks

SMALLEST = 0x33000000  # 2^-25: for weights up to this, half the smallest binary16, every scale rounds to 0
HALF_INFINITY = 0x7C00
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@inline
def extreme(t):
    """Return the first value of largest magnitude in each lane."""
    first = load(t, 0, 16)
    top = bits(first) & 0x7FFFFFFF
    for i in range(1, 32):
        value = load(t, 16 * i, 16)
        size = bits(value) & 0x7FFFFFFF
        first = select_less(top, size, value, first)
        top = maximum(top, size)
    return first


@inline
def value_of(a, b, d):
    """Return v of a scale."""
    return (d + d) * a - d * d * b


@inline
def odd_ones(t, first):
    """Return two numbers for each lane: 0 if its weights that are not zero have one magnitude, and 0 if they have one sign, too."""
    top = bits(first) & 0x7FFFFFFF
    sizes = zeros_u32(16)
    signs = zeros_u32(16)
    for i in range(32):
        pattern = bits(load(t, 16 * i, 16))
        size = pattern & 0x7FFFFFFF
        sizes = select_nonzero(size, sizes | (size - top), sizes)
        signs = select_nonzero(size, signs | (pattern - bits(first)), signs)
    return sizes, signs


@inline
def for_one_magnitude(first, signs):
    """Return the scales, as binary16, of which a multiple up to 8 comes nearest to a lane's only magnitude; the largest of equals.

    Such blocks (ternary weights, say) may be exact, with a multiple that no least-squares step finds.
    """
    size = from_bits(bits(first) & 0x7FFFFFFF)
    negative = (bits(first) >> 16 & 0x8000) ^ 0x8000  # the code -8 has to give the magnitude its sign
    best = floats_to_halves(size)
    least = from_bits(bits(size - halves_to_floats(best)) & 0x7FFFFFFF)
    for k in range(2, 9):
        nearest = floats_to_halves(size / np.float32(k))
        for step in range(3):  # the quotient was rounded before, so that a neighbour may be nearer
            half = maximum(nearest + 2 - step, 1) - 1
            error = from_bits(bits(size - halves_to_floats(half) * np.float32(k)) & 0x7FFFFFFF)
            if k == 8:
                half = half | negative
                error = select_nonzero(signs, size, error)
            best = select_less(error, least, half, best)
            least = minimum(error, least)
    return best


@inline
def finish(first, best):
    """Return the scales as uint16: infinity for blocks that are too large for binary16, zero for those that are too small."""
    naive = floats_to_halves(first * np.float32(-0.125)) & 0x7FFF
    top = bits(first) & 0x7FFFFFFF
    best = select_nonzero(greater_equal(naive, HALF_INFINITY), naive, best)
    return to_u16(select_nonzero(greater_equal(top, SMALLEST + 1), best, best & 0))


@inline
def search(x, scales, search_16, scratch):
    """Choose the scales of all blocks, 16 at a time, by a `Step` ``search_16(x, start, t, scratch)``."""
    t = np.empty(512, np.float32)
    tail = np.zeros(512, np.float32)
    few = np.empty(16, np.uint16)
    count = x.size // 32
    for block in range(0, count - count % 16, 16):
        transpose_blocks(x, 32 * block, t)
        store(scales, block, search_16(x, 32 * block, t, scratch))
    if count % 16:
        start = count - count % 16
        tail[: x.size - 32 * start] = x[32 * start :]
        transpose_blocks(tail, 0, t)
        store(few, 0, search_16(tail, 0, t, scratch))
        scales[start:] = few[: count - start]
