"""Packed codes of 4 and 5 bits of blocks of 32, compiled; for other kernels to call."""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.simd_casts import to_u8, to_u32
from qformat.kernels.numba.simd_lanes import high_half, join, low_half, pack_bits, unpack_bits
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as


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
    """Add to ``counts`` how often each code of 4 bits occurs; codes fill blocks of ``size`` bytes from byte ``at`` on."""
    for block in range(blocks.size // size):
        for i in range(size * block + at, size * (block + 1)):
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
