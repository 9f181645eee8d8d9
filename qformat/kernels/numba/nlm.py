"""Blocks with a choice of four mappings, compiled. Twin of ``numpy/nlm.py``."""

from __future__ import annotations

import numpy as np
from numba import int64, uint8, uint16, uint32

from qformat.kernels.numba.blocks import LANES, ONE, ZERO, add_squares, keep_largest, prefetch_block, too_large
from qformat.kernels.numba.codes import count_codes
from qformat.kernels.numba.compiler import F32, U8, U32, inline, kernel
from qformat.kernels.numba.halves import half_to_float
from qformat.kernels.numba.simd import select_less, select_nonzero, spread_f32, zeros_u32
from qformat.kernels.numba.simd_casts import bits, from_bits, to_u8, to_u32
from qformat.kernels.numba.simd_lanes import high_half, largest, low_half, or_lanes
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as, take
from qformat.kernels.tables import NLM_UPPER

# All are exact in float32: T / 16384; the upper levels on a scale with 0 in the middle and 1 at the end; the points halfway
# between.
STEPS = np.array([[16384 - t for t in upper[::-1]] + list(upper) for upper in NLM_UPPER], np.float32).ravel() / 16384
LEVELS = np.array(NLM_UPPER, np.float32).ravel() / 8192 - 1
MIDDLES = (LEVELS + np.append(LEVELS[1:], np.float32(1))) / 2  # the last of each eight is unused
# levels with their codes in the lowest bits of the mantissa, so that one selection finds both
CODED = (LEVELS.view(np.uint32) | np.tile(np.arange(8, 16, dtype=np.uint32), 4)).view(np.float32)

HALF = np.float32(0.5)
TWO = np.float32(2.0)
SIGN = 0x80000000


@inline
def _nearest(position, mapping):
    """Return (levels, codes) nearest to positions from -1 to 1: of two that are as near, the outer one."""
    size = from_bits(bits(position) & 0x7FFFFFFF)
    both = spread_f32(CODED[8 * mapping + 7], 32)
    for j in range(6, -1, -1):
        both = select_less(size, MIDDLES[8 * mapping + j], spread_f32(CODED[8 * mapping + j], 32), both)
    sign = bits(position) & SIGN
    code = bits(both) & 15
    return from_bits((bits(both) - code) | sign), select_nonzero(sign, 15 - code, code)


@inline
def _pack(blocks, at, run, runs, codes):
    """Store the codes of one of a block's runs of 32 weights; the first half of a block fills the lower halves of its bytes."""
    packed = to_u8(codes)
    if runs == 1:
        store(blocks, at, low_half(packed) | (high_half(packed) << 4))
    elif run < runs // 2:
        store(blocks, at + 32 * run, packed)
    else:
        place = at + 32 * (run - runs // 2)
        store(blocks, place, load(blocks, place, 32) | (packed << 4))


@kernel(f"UniTuple(int64, 4)({F32}, {U32}, uint8[::1], float64[::1], int64)")
def encode(x, headers, blocks, lanes, block):
    """Write blocks with headers of 24 bits that a search has chosen, and the nearest codes.

    ``x`` is float32, whole blocks of ``block`` (32, 64 or 128) weights; ``blocks`` has 3 + block // 2 bytes for each. The error is
    measured and returned as by `blocks.quantize_blocks`, over runs of 32 weights. A block overflows if its range or minimum is not
    finite, and is zeroed if all its weights decode to zero and not all are zero.
    """
    overflowed = np.int64(0)
    zeroed = np.int64(0)
    total = load(lanes, 0, LANES)
    peaks = zeros_u32(32)
    worst = zeros_u32(32)
    runs = block // 32
    for number in range(x.size // block):
        header = headers[number]
        width = half_to_float(uint16((header & 1023) << 5))
        least = half_to_float(uint16(((header >> 10) & 4095) << 4))
        mapping = int64((header >> 22) & 3)
        at = number * (3 + block // 2)
        store_as(blocks, at, uint16(header & 0xFFFF))
        blocks[at + 2] = uint8(header >> 16)
        inverse = TWO / width if width > ZERO else ZERO
        source, decoded = zeros_u32(32), zeros_u32(32)
        for run in range(runs):
            values = load(x, number * block + 32 * run, 32)
            levels, codes = _nearest((values - least) * inverse - ONE, mapping)
            _pack(blocks, at + 3, run, runs, codes)
            approximations = (levels * HALF + HALF) * width + least
            error = values - approximations
            total = add_squares(total, error)
            worst = keep_largest(worst, error)
            source = source | bits(values)
            decoded = decoded | bits(approximations)
            peaks = keep_largest(peaks, values)
        overflowed += too_large(header << 5) or too_large(header >> 6)
        if or_lanes(decoded) & 0x7FFFFFFF == 0:
            zeroed += or_lanes(source) & 0x7FFFFFFF != 0
    store(lanes, 0, total)
    return np.int64(largest(peaks)), np.int64(largest(worst)), overflowed, zeroed


@kernel(f"void({U8}, float32[::1], int64)")
def dequantize(blocks, x, block):
    """Decode blocks of ``3 + block // 2`` bytes to ``block`` float32 each."""
    for number in range(x.size // block):
        at = number * (3 + block // 2)
        header = uint32(load_as(blocks, at, np.uint16(0))) | (uint32(blocks[at + 2]) << 16)
        width = half_to_float(uint16((header & 1023) << 5))
        least = half_to_float(uint16(((header >> 10) & 4095) << 4))
        row = 16 * (header >> 22)
        for i in range(0, block // 2, 16):
            prefetch_block(x, number * block // 32 + i // 16)
            packed = load(blocks, at + 3 + i, 16)
            low = take(STEPS, to_u32(packed & 15) + row)
            high = take(STEPS, to_u32(packed >> 4) + row)
            store(x, number * block + i, low * width + least)
            store(x, number * block + i + block // 2, high * width + least)


@kernel(f"void({U8}, int64[::1], int64)")
def code_histogram(blocks, counts, block):
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(blocks, 3 + block // 2, 3, counts)


@kernel(f"void({U8}, int64[::1], int64)")
def mapping_histogram(blocks, counts, block):
    """Add to ``counts`` how often each of the four mappings occurs."""
    size = 3 + block // 2
    for number in range(blocks.size // size):
        counts[blocks[number * size + 2] >> 6] += 1
