"""The 5-bit codes of blocks one to a byte, and back, in numpy. Twin of ``numba/codes_5.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


def unpack(blocks: U8, size: int, at: int, codes: U8) -> None:
    """Write the codes that begin at byte ``at`` of each block of ``size`` bytes."""
    packed = blocks.reshape(-1, size)[:, at:]
    fifth = np.unpackbits(packed[:, :4], axis=1, bitorder="little")
    codes.reshape(-1, 32)[:] = np.hstack([packed[:, 4:] & 15, packed[:, 4:] >> 4]) | (fifth << 4)


def pack(codes: U8, blocks: U8, size: int, at: int) -> None:
    """Do the opposite of `unpack`, for codes below 32."""
    rows, packed = codes.reshape(-1, 32), blocks.reshape(-1, size)[:, at:]
    packed[:, :4] = np.packbits(rows >> 4, axis=1, bitorder="little")
    packed[:, 4:] = (rows[:, :16] & 15) | ((rows[:, 16:] & 15) << 4)
