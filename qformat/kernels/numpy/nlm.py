"""Blocks with a choice of four mappings, in numpy. Twin of ``numba/nlm.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8, U32
from qformat.kernels.numpy.blocks import add_error
from qformat.kernels.numpy.codes import count_codes, load_codes
from qformat.kernels.numpy.floats import peak_f32
from qformat.kernels.tables import NLM_UPPER

STEPS = (np.hstack([16384 - NLM_UPPER[:, ::-1], NLM_UPPER]) / 16384).astype(np.float32)
LEVELS = (NLM_UPPER / 8192 - 1).astype(np.float32)
MIDDLES = (LEVELS[:, :-1] + LEVELS[:, 1:]) / np.float32(2)
_CHUNK = 1 << 15  # elements at a time, so that temporary arrays stay in cache


def outer(position: F32, mapping: I64 | U32) -> I64:
    """Return the number, from 0 in the middle to 7, of the level of a mapping nearest to each position; they are broadcast."""
    size = np.abs(position)
    count = np.zeros(size.shape, np.int64)
    for middle in MIDDLES.T:
        count += ~(size < middle[mapping])
    return count


def numbers(headers: U32) -> tuple[F32, F32, I64]:
    """Return (range, minimum, number of the mapping) of each header."""
    width = ((headers & 1023) << 5).astype(np.uint16).view(np.float16).astype(np.float32)
    least = ((headers >> 10 & 4095) << 4).astype(np.uint16).view(np.float16).astype(np.float32)
    return width, least, (headers >> 22 & 3).astype(np.int64)


@np.errstate(all="ignore")
def encode(x: F32, headers: U32, blocks: U8, lanes: F64, block: int) -> tuple[int, int, int, int]:
    """Write blocks with chosen headers and the nearest codes, and measure the error."""
    peak = largest = overflowed = zeroed = 0
    packed = blocks.reshape(-1, 3 + block // 2)
    step = max(1, _CHUNK // block)
    for start in range(0, x.size // block, step):
        here = slice(start, start + step)
        values = x.reshape(-1, block)[here]
        width, least, mapping = numbers(headers[here])
        inverse = np.where(width > 0, np.float32(2) / width, np.float32(0))
        position = (values - least[:, None]) * inverse[:, None] - np.float32(1)
        upper = outer(position, mapping[:, None])
        codes = np.where(np.signbit(position), 7 - upper, 8 + upper)
        packed[here, :3] = headers[here].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        packed[here, 3:] = codes[:, : block // 2] | (codes[:, block // 2 :] << 4)
        decoded = STEPS[mapping[:, None], codes] * width[:, None] + least[:, None]
        peak = max(peak, peak_f32(values.reshape(-1)))
        largest = max(largest, add_error(values - decoded, lanes))
        overflowed += int((~(np.isfinite(width) & np.isfinite(least))).sum())
        zeroed += int((values.any(axis=1) & ~decoded.any(axis=1)).sum())
    return peak, largest, overflowed, zeroed


@np.errstate(all="ignore")
def dequantize(blocks: U8, x: F32, block: int) -> None:
    """Decode blocks of ``3 + block // 2`` bytes to ``block`` float32 each."""
    packed = blocks.reshape(-1, 3 + block // 2)
    headers = np.zeros((len(packed), 4), np.uint8)
    headers[:, :3] = packed[:, :3]
    width, least, mapping = numbers(headers.view("<u4")[:, 0])
    codes = load_codes(packed[:, 3:])
    x.reshape(-1, block)[:] = STEPS[mapping[:, None], codes] * width[:, None] + least[:, None]


def code_histogram(blocks: U8, counts: I64, block: int) -> None:
    """Add to ``counts`` how often each of the 16 codes occurs."""
    count_codes(load_codes(blocks.reshape(-1, 3 + block // 2)[:, 3:]), counts)


def mapping_histogram(blocks: U8, counts: I64, block: int) -> None:
    """Add to ``counts`` how often each of the four mappings occurs."""
    counts += np.bincount(blocks.reshape(-1, 3 + block // 2)[:, 2] >> 6, minlength=4)
