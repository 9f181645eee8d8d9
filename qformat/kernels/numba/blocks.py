"""What the compiled kernels of block formats share."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, inline, kernel
from qformat.kernels.numba.simd import maximum, zeros_u32
from qformat.kernels.numba.simd_casts import bits, to_f64, to_u8, to_u32
from qformat.kernels.numba.simd_lanes import high_half, join, largest, low_half, pack_bits, unpack_bits
from qformat.kernels.numba.simd_memory import load, load_as, load_f32, prefetch, store, store_as

LANES = 16
AHEAD = 1024  # elements
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
INFINITY_BITS = 0x7F800000


@inline
def quantize_blocks(x, blocks, lanes, encode_block, chosen):
    """Encode blocks of 32 one after the other, and measure the error.

    Parameters
    ----------
    x
        float32, or bfloat16 patterns as uint16; a multiple of 32 elements.
    blocks
        uint8: the result.
    lanes
        float64, `LANES` elements: the squared errors of elements i and i + 16 of each block, added as float32, are added to lane i.
    encode_block
        Compiled function of (x, number of the block, its values as a vector, ``blocks``, ``chosen``), which fills in the bytes of
        the block and returns (decoded values, whether a scale overflows, whether all that is stored vanishes). numba compiles this
        loop anew for each.
    chosen
        What a search chose for the blocks, for `encode_block`.

    Returns
    -------
    tuple of int
        Bits of the largest magnitude of ``x`` (at least those of infinity if ``x`` is not finite) and of the largest error;
        number of blocks whose scale overflows binary16; number of blocks, not all zero, whose scale vanishes in binary16.
    """
    overflowed = np.int64(0)
    zeroed = np.int64(0)
    total = load(lanes, 0, LANES)
    peaks = zeros_u32(32)
    worst = zeros_u32(32)
    for block in range(x.size // 32):
        prefetch_block(x, block)
        values = load_f32(x, 32 * block, 32)
        decoded, too_large, too_small = encode_block(x, block, values, blocks, chosen)
        error = values - decoded
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
        peaks = keep_largest(peaks, values)
        overflowed += too_large
        if too_small:
            zeroed += largest(bits(values) & 0x7FFFFFFF) != 0
    store(lanes, 0, total)
    return np.int64(largest(peaks)), np.int64(largest(worst)), overflowed, zeroed


@inline
def prefetch_block(x, block):
    """Ask for the cache lines of a block that will be read or written soon; the hardware's own prefetcher stops at each page."""
    prefetch(x, 32 * block + AHEAD)
    prefetch(x, 32 * block + AHEAD + 16)


@inline
def store_codes(blocks, at, codes):
    """Put 32 codes of 4 bits at byte ``at``: i in the lower half of byte i, i + 16 in the upper one."""
    packed = to_u8(codes)
    store(blocks, at, low_half(packed) | (high_half(packed) << 4))


@inline
def load_codes(blocks, at):
    """Return 32 codes of 4 bits as unsigned bytes."""
    packed = load(blocks, at, 16)
    return join(packed & 15, packed >> 4)


@inline
def store_codes_5(blocks, at, codes):
    """Put 32 codes of 5 bits: their highest bits in 4 bytes, then the others as `store_codes` does."""
    store_as(blocks, at, pack_bits(codes & 16))
    store_codes(blocks, at + 4, codes & 15)


@inline
def load_codes_5(blocks, at):
    """Return 32 codes of 5 bits as uint32."""
    fifth = unpack_bits(load_as(blocks, at, np.uint32(0))) << 4
    return to_u32(load_codes(blocks, at + 4)) | fifth


@inline
def count_codes(blocks, size, at, counts):
    """Add to ``counts`` how often each code of 4 bits occurs; codes begin at byte ``at`` of each block of ``size`` bytes."""
    for block in range(blocks.size // size):
        for i in range(size * block + at, size * block + at + 16):
            counts[blocks[i] & 15] += 1
            counts[blocks[i] >> 4] += 1


@inline
def count_codes_5(blocks, size, at, counts):
    """Do as `count_codes` for codes of 5 bits."""
    for block in range(blocks.size // size):
        fifth = load_as(blocks, size * block + at, np.uint32(0))
        for i in range(16):
            both = blocks[size * block + at + 4 + i]
            counts[(both & 15) | ((fifth >> i) & 1) << 4] += 1
            counts[(both >> 4) | ((fifth >> (i + 16)) & 1) << 4] += 1


@inline
def too_large(half):
    """Return whether a binary16 is infinite or a NaN."""
    return (half & 0x7FFF) >= 0x7C00


@inline
def too_small(half):
    """Return whether a binary16 is a zero."""
    return (half & 0x7FFF) == 0


@inline
def reciprocal(scale):
    """Return 1 / scale, or 0 for a scale of 0."""
    return ONE / scale if scale != ZERO else ZERO


@inline
def usable(inverse, mask):
    """Return the mask for codes: none may be used where 1 / scale overflowed, as it does for subnormal scales."""
    return mask if (bits(inverse) & 0x7FFFFFFF) < INFINITY_BITS else 0


@inline
def add_squares(total, error):
    """Add squared errors of 32 elements to 16 sums: i and i + 16 together, first in float32."""
    squares = error * error
    return total + to_f64(low_half(squares) + high_half(squares))


@inline
def keep_largest(worst, error):
    """Return the larger magnitudes, as bit patterns."""
    return maximum(worst, bits(error) & 0x7FFFFFFF)


@kernel(f"int64({F32}, {F32}, float64[::1])")
def measure(x, decoded, lanes):
    """Add the squared errors of whole blocks to ``lanes`` as `quantize_blocks` does; return the bits of the largest error."""
    total = load(lanes, 0, LANES)
    worst = zeros_u32(32)
    for i in range(0, x.size // 32 * 32, 32):
        error = load(x, i, 32) - load(decoded, i, 32)
        total = add_squares(total, error)
        worst = keep_largest(worst, error)
    store(lanes, 0, total)
    return np.int64(largest(worst))
