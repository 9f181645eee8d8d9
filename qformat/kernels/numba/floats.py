"""Conversions between float formats, largest magnitudes and errors, compiled. Twin of ``numpy/floats.py``.

Largest magnitudes are those of the bit patterns without the sign, which order floats as their values do and place infinities and
NaNs above: integer maxima are exact, need no case for a NaN and do not depend on the order of comparisons.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, U16, kernel
from qformat.kernels.numba.halves import float_to_half, floats_to_halves, half_to_float, halves_to_floats
from qformat.kernels.numba.simd import greater_equal, maximum, select_nonzero
from qformat.kernels.numba.simd_casts import bits, from_bits, to_f64, to_u16, to_u32
from qformat.kernels.numba.simd_lanes import largest
from qformat.kernels.numba.simd_memory import load, store

LANES = 32


@kernel(f"void({U16}, float32[::1])")
def bf16_to_f32(source, target):
    """Widen bfloat16."""
    whole = source.size // 32 * 32
    for i in range(0, whole, 32):
        store(target, i, from_bits(to_u32(load(source, i, 32)) << 16))
    for i in range(whole, source.size):
        target[i] = from_bits(np.uint32(np.uint32(source[i]) << np.uint32(16)))


@kernel(f"void({U16}, float32[::1])")
def f16_to_f32(source, target):
    """Widen binary16."""
    whole = source.size // 32 * 32
    for i in range(0, whole, 32):
        store(target, i, halves_to_floats(to_u32(load(source, i, 32))))
    for i in range(whole, source.size):
        target[i] = half_to_float(source[i])


@kernel(f"void({F32}, uint16[::1])")
def f32_to_bf16(source, target):
    """Round to bfloat16, ties to even; a NaN stays one."""
    whole = source.size // 32 * 32
    for i in range(0, whole, 32):
        pattern = bits(load(source, i, 32))
        rounded = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        nan = greater_equal(pattern & 0x7FFFFFFF, 0x7F800001)
        store(target, i, to_u16(select_nonzero(nan, (pattern >> 16) | 0x40, rounded)))
    for i in range(whole, source.size):
        one = np.int64(bits(source[i]))
        if (one & 0x7FFFFFFF) > 0x7F800000:
            target[i] = np.uint16((one >> 16) | 0x40)
        else:
            target[i] = np.uint16((one + 0x7FFF + ((one >> 16) & 1)) >> 16)


@kernel(f"void({F32}, uint16[::1])")
def f32_to_f16(source, target):
    """Round to binary16, ties to even; values from 65520 on become infinite."""
    whole = source.size // 32 * 32
    for i in range(0, whole, 32):
        store(target, i, to_u16(floats_to_halves(load(source, i, 32))))
    for i in range(whole, source.size):
        target[i] = float_to_half(source[i])


@kernel(f"uint32({F32})")
def peak_f32(x):
    """Return the bit pattern of the largest magnitude; a NaN or infinity counts as larger than any number."""
    whole = x.size // 32 * 32
    top = np.uint32(0)
    if whole:
        worst = bits(load(x, 0, 32)) & 0x7FFFFFFF
        for i in range(32, whole, 32):
            worst = maximum(worst, bits(load(x, i, 32)) & 0x7FFFFFFF)
        top = largest(worst)
    for i in range(whole, x.size):
        top = max(top, np.uint32(bits(x[i]) & np.uint32(0x7FFFFFFF)))
    return top


@kernel(f"uint16({U16})")
def peak_16(x):
    """Do as `peak_f32` for binary16 or bfloat16 patterns."""
    whole = x.size // 32 * 32
    top = np.uint16(0)
    if whole:
        worst = load(x, 0, 32) & 0x7FFF
        for i in range(32, whole, 32):
            worst = maximum(worst, load(x, i, 32) & 0x7FFF)
        top = largest(worst)
    for i in range(whole, x.size):
        top = max(top, np.uint16(x[i] & np.uint16(0x7FFF)))
    return top


@kernel(f"uint32({F32}, {F32}, float64[::1])")
def difference(x, y, lanes):
    """Add the squares of ``x - y`` to 32 lanes, element i to lane i mod 32; return the bits of the largest ``|x - y|``."""
    whole = x.size // 32 * 32
    top = np.uint32(0)
    if whole:
        total = load(lanes, 0, 32)
        worst = bits(load(x, 0, 32)) & 0
        for i in range(0, whole, 32):
            error = load(x, i, 32) - load(y, i, 32)
            wide = to_f64(error)
            total = total + wide * wide
            worst = maximum(worst, bits(error) & 0x7FFFFFFF)
        store(lanes, 0, total)
        top = largest(worst)
    for i in range(whole, x.size):
        one = x[i] - y[i]
        lanes[i - whole] += np.float64(one) * np.float64(one)
        top = max(top, np.uint32(bits(one) & np.uint32(0x7FFFFFFF)))
    return top


@kernel(f"void({F32}, {F32}, int64[::1])")
def error_histogram(x, y, counts):
    """Count ``|x - y|`` in 2^19 buckets by the upper bits of the float32 pattern."""
    for i in range(x.size):
        counts[(bits(x[i] - y[i]) & np.uint32(0x7FFFFFFF)) >> 12] += 1
