"""Codebooks of blocks, with the least squared error possible, compiled. Twin of ``numpy/lut_search.py``.

The best codebook cuts the sorted values of a block into cells and takes their means. Dynamic programming (Bruce, 1965) finds the
cells: the first j values in k cells reduce the error most if, for some i, the first i values do so in k - 1 cells, and the others
are the last one. The best i never falls when j or k rises (as Wu, 1991, exploits), so that few have to be tried. All sums are of
values less their mean and over their largest distance from it, so that float32 suffices for the comparison.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F32, inline, kernel
from qformat.kernels.numba.simd import maximum, minimum, select_less, spread_f32, zeros_u32
from qformat.kernels.numba.simd_casts import to_u16
from qformat.kernels.numba.simd_memory import load, store

BATCH = 16  # blocks that are sorted together, each in a lane of its own
STEP = 16  # numbers j that are tried together
IMPOSSIBLE = np.float32(-1.0)  # a possible gain is at least 0
ZERO = np.float32(0.0)


@inline
def _sort(columns, length):
    """Sort 16 columns with Batcher's odd-even merge network (1968), without branches; the length is a power of two."""
    run = 1
    while run < length:
        gap = run
        while gap >= 1:
            for first in range(gap % run, length - gap, 2 * gap):
                for i in range(first, min(first + gap, length - gap)):
                    if i // (2 * run) == (i + gap) // (2 * run):
                        one = load(columns, 16 * i, 16)
                        two = load(columns, 16 * (i + gap), 16)
                        store(columns, 16 * i, minimum(one, two))
                        store(columns, 16 * (i + gap), maximum(one, two))
            gap //= 2
        run *= 2


@inline
def _cells(values, count, size, shares, sums, before, after, choices, borders):
    """Find the best cells: cell k of the sorted values begins at ``borders[k]``; the other arrays are scratch.

    ``shares[STEP + n]`` is 1 / n. The numbers j of values are tried STEP at a time, in lanes, from the highest down.
    """
    width = sums.size
    centre = 0.0
    for i in range(count):
        centre += np.float64(values[i])
    middle = np.float32(centre / count)
    reach = max(abs(values[0] - middle), abs(values[count - 1] - middle))
    if not reach > ZERO:
        reach = np.float32(1.0)
    total = 0.0
    sums[0] = ZERO
    for i in range(count):
        total += np.float64((values[i] - middle) / reach)
        sums[i + 1] = np.float32(total)
    for i in range(count + 1, width):
        sums[i] = sums[count]
    before[0] = IMPOSSIBLE
    for j in range(1, width):
        before[j] = sums[j] * sums[j] * shares[STEP + min(j, count)]
        choices[j] = 0
    last = (count - 1) // STEP
    for k in range(2, size + 1):
        for i in range(k):
            after[i] = IMPOSSIBLE
        highest = count - 1
        for chunk in range(last, last - 1 if k == size else -1, -1):
            j = STEP * chunk + 1
            lowest = max(np.int64(choices[(k - 2) * width + j]), k - 1)
            highest = max(min(highest, j + STEP - 2), lowest)
            here = load(sums, j, STEP)
            best = spread_f32(IMPOSSIBLE, STEP)
            index = zeros_u32(STEP) + (k - 1)
            for i in range(lowest, highest + 1):
                inside = here - sums[i]
                gain = inside * inside * load(shares, STEP + j - i, STEP) + before[i]
                index = select_less(best, gain, zeros_u32(STEP) + i, index)
                best = select_less(best, gain, gain, best)
            store(after, j, best)
            store(choices, (k - 1) * width + j, to_u16(index))
            highest = np.int64(choices[(k - 1) * width + j])
        before, after = after, before
    borders[size] = count
    for k in range(size, 0, -1):
        borders[k - 1] = choices[(k - 1) * width + borders[k]] if k > 1 else 0


@inline
def _distinct(values, count, size, borders):
    """Set borders between different values; return False if there are more than ``size`` of them."""
    cells = 1
    borders[0] = 0
    for i in range(1, count):
        if values[i] != values[i - 1]:
            if cells == size:
                return False
            borders[cells] = i
            cells += 1
    for k in range(cells, size + 1):
        borders[k] = count
    return True


@kernel(f"void({F32}, int64, int64, int64, float32[::1])")
def codebooks(x, cols, block, size, books):
    """Choose ``size`` entries for each block, in ascending order.

    A block with no more different values than that has these as its entries, the last one repeated.

    Parameters
    ----------
    x
        float32: rows of ``cols`` elements, padded to whole runs of 32.
    cols, block
        As for `lut.encode`; blocks of 128 or 256.
    size
        Entries of a codebook.
    books
        The result.
    """
    padded = (cols + 31) // 32 * 32
    in_row = (cols + block - 1) // block
    blocks = x.size // padded * in_row
    width = block + 1 + STEP
    # 1 / n for each number of values; NaN for n <= 0, which loses every comparison
    shares = np.full(2 * STEP + width, np.float32(np.nan), np.float32)
    for n in range(1, STEP + width):
        shares[STEP + n] = np.float32(1.0) / np.float32(n)
    columns = np.empty(16 * block, np.float32)
    values = np.empty(block, np.float32)
    sums = np.empty(width, np.float32)
    before = np.empty(width, np.float32)
    after = np.empty(width, np.float32)
    choices = np.zeros(size * width, np.uint16)
    borders = np.zeros(size + 1, np.int64)
    for batch in range(0, blocks, BATCH):
        members = min(BATCH, blocks - batch)
        for b in range(members):
            start = (batch + b) % in_row * block
            count = min(block, cols - start)
            at = (batch + b) // in_row * padded + start
            for i in range(count):
                columns[16 * i + b] = x[at + i] + ZERO  # so that no zero is negative
            for i in range(count, block):
                columns[16 * i + b] = np.float32(np.inf)
        _sort(columns, block)
        for b in range(members):
            count = min(block, cols - (batch + b) % in_row * block)
            for i in range(block):
                values[i] = columns[16 * i + b]
            if not _distinct(values, count, size, borders):
                _cells(values, count, size, shares, sums, before, after, choices, borders)
            entry = ZERO
            for k in range(size):
                if borders[k] < borders[k + 1]:
                    total = 0.0
                    for i in range(borders[k], borders[k + 1]):
                        total += np.float64(values[i])
                    entry = np.float32(total / np.float64(borders[k + 1] - borders[k]))
                books[(batch + b) * size + k] = entry
