"""The 5-bit codes of blocks one to a byte, and back, compiled. Twin of ``numpy/codes_5.py``."""

from __future__ import annotations

from qformat.kernels.numba.codes import load_codes_5, store_codes_5
from qformat.kernels.numba.compiler import U8, kernel
from qformat.kernels.numba.simd_casts import to_u8, to_u32
from qformat.kernels.numba.simd_memory import load, store


@kernel(f"void({U8}, int64, int64, uint8[::1])")
def unpack(blocks, size, at, codes):
    """Write the codes that begin at byte ``at`` of each block of ``size`` bytes."""
    for block in range(codes.size // 32):
        store(codes, 32 * block, to_u8(load_codes_5(blocks, size * block + at)))


@kernel(f"void({U8}, uint8[::1], int64, int64)")
def pack(codes, blocks, size, at):
    """Do the opposite of `unpack`, for codes below 32."""
    for block in range(codes.size // 32):
        store_codes_5(blocks, size * block + at, to_u32(load(codes, 32 * block, 32)))
