"""The 5-bit codes of blocks one to a byte, and back, in numpy. Twin of ``numba/codes_5.py``."""

from __future__ import annotations

from qformat.kernels.arrays import U8
from qformat.kernels.numpy.codes import load_codes_5, store_codes_5


def unpack(blocks: U8, size: int, at: int, codes: U8) -> None:
    """Write the codes that begin at byte ``at`` of each block of ``size`` bytes."""
    codes.reshape(-1, 32)[:] = load_codes_5(blocks.reshape(-1, size)[:, at:])


def pack(codes: U8, blocks: U8, size: int, at: int) -> None:
    """Do the opposite of `unpack`, for codes below 32."""
    store_codes_5(blocks.reshape(-1, size)[:, at:], codes.reshape(-1, 32))
