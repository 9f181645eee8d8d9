"""Good scales for Q4_0 blocks: the best of a few, refined by least squares; compiled. Twin of ``numpy/q4_0_table.py``."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, Step, kernel
from qformat.kernels.numba.halves import floats_to_halves, halves_to_floats
from qformat.kernels.numba.q4_0_search import ONE, ZERO, extreme, finish, for_one_magnitude, odd_ones, search, value_of
from qformat.kernels.numba.simd import maximum, minimum, select_less, select_nonzero, spread_f32, zeros_u32
from qformat.kernels.numba.simd_lanes import or_lanes
from qformat.kernels.numba.simd_memory import load
from qformat.kernels.tables import DIVISORS

TO_INTEGER = np.float32(1.5 * 2**23)  # added and subtracted again, it rounds to an integer, ties to even


@Step
def _table_16(x, start, t, scratch):  # noqa: ARG001
    first = extreme(t)
    inverse = np.float32(-1.0) / first
    zero = spread_f32(ZERO, 16)
    best, refined, most = zeros_u32(16), zero, zero - np.float32(np.inf)
    for number in range(DIVISORS.size + 1):
        factor = inverse * DIVISORS[number] if number < DIVISORS.size else ONE / refined
        a, b = zero, zero
        for i in range(32):
            value = load(t, 16 * i, 16)
            k = (maximum(minimum(value * factor, np.float32(7)), np.float32(-8)) + TO_INTEGER) - TO_INTEGER
            a = a + value * k
            b = b + k * k
        ratio = a / b
        half = floats_to_halves(ratio)
        value = value_of(a, b, halves_to_floats(half))
        best = select_less(most, value, half, best)
        refined = select_less(most, value, ratio, refined)
        most = maximum(value, most)
    sizes, signs = odd_ones(t, first)
    if or_lanes(select_nonzero(sizes, zeros_u32(16), 1)):
        best = select_nonzero(sizes, best, for_one_magnitude(first, signs))
    return finish(first, best)


@kernel(f"void({F32}, uint16[::1])")
def choose(x, scales):
    """Choose for each block the best of the scales in `DIVISORS`, each refined by least squares and the best one once more.

    Parameters
    ----------
    x
        float32, a multiple of 32 elements.
    scales
        uint16, one for each block: the binary16 scales. The signs are such that the codes are those nearest to x / d in -8 to 7.
    """
    search(x, scales, _table_16, None)
