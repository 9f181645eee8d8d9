"""Codebooks of blocks, in numpy. Twin of ``numba/lut_search.py``, which documents the functions."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, I64

STEP = 16
IMPOSSIBLE = np.float32(-1.0)
_BLOCKS = 1 << 8  # at a time, so that temporary arrays stay small


@np.errstate(all="ignore")
def codebooks(x: F32, cols: int, block: int, size: int, books: F32) -> None:
    """Choose `size` entries for each block, in ascending order."""
    padded = -(-cols // 32) * 32
    rows = x.reshape(-1, padded)[:, :cols]
    in_row = -(-cols // block)
    whole = np.full((len(rows), in_row * block), np.inf, np.float32)
    whole[:, :cols] = rows + np.float32(0)
    values = np.sort(whole.reshape(-1, block), axis=1)
    counts = np.tile(np.minimum(block, cols - np.arange(0, cols, block)), len(rows))
    entries = books.reshape(-1, size)
    for count in np.unique(counts):
        members = np.flatnonzero(counts == count)
        for start in range(0, members.size, _BLOCKS):
            part = members[start : start + _BLOCKS]
            entries[part] = _entries(values[part, :count], size)


def _entries(values: F32, size: int) -> F32:
    """Return the entries for sorted blocks of the same length."""
    blocks, count = values.shape
    new = values[:, 1:] != values[:, :-1]
    few = new.sum(axis=1) < size
    # the cell of each value
    cells = np.zeros(values.shape, np.int64)
    cells[:, 1:] = np.cumsum(new, axis=1)
    if not few.all():
        borders = _borders(values[~few], size)
        cells[~few] = (np.arange(count)[:, None] >= borders[:, None, 1:size]).sum(axis=2)
    # summed one after the other
    places = (np.arange(blocks)[:, None] * size + cells).ravel()
    sums = np.bincount(places, values.ravel().astype(np.float64), minlength=blocks * size)
    sizes = np.bincount(places, minlength=blocks * size)
    means = (sums / np.maximum(sizes, 1)).astype(np.float32).reshape(blocks, size)
    last_used = np.maximum.accumulate(np.where(sizes.reshape(blocks, size) > 0, np.arange(size), 0), axis=1)
    entries: F32 = np.take_along_axis(means, last_used, axis=1)
    return entries


def _borders(values: F32, size: int) -> I64:
    """Return where the best cells begin, and the end."""
    blocks, count = values.shape
    width = count + 1 + STEP
    middle = (np.cumsum(values, axis=1, dtype=np.float64)[:, -1] / count).astype(np.float32)[:, None]
    reach = np.maximum(np.abs(values[:, :1] - middle), np.abs(values[:, -1:] - middle))
    reach = np.where(reach > 0, reach, np.float32(1))
    sums = np.zeros((blocks, width), np.float32)
    sums[:, 1 : count + 1] = np.cumsum((values - middle) / reach, axis=1, dtype=np.float64)
    sums[:, count + 1 :] = sums[:, count : count + 1]
    numbers = np.minimum(np.arange(1, width), count).astype(np.float32)
    before = np.full((blocks, width), IMPOSSIBLE)
    before[:, 1:] = sums[:, 1:] * sums[:, 1:] * (np.float32(1) / numbers)
    choices = np.zeros((size + 1, blocks, width), np.int64)
    for k in range(2, size + 1):
        after = np.full((blocks, width), IMPOSSIBLE)
        highest = np.full(blocks, count - 1)
        last = (count - 1) // STEP
        for chunk in range(last, last - 1 if k == size else -1, -1):
            j = STEP * chunk + 1
            lowest = np.maximum(choices[k - 1, :, j], k - 1)
            highest = np.maximum(np.minimum(highest, j + STEP - 2), lowest)
            here = slice(j, j + STEP)
            after[:, here], choices[k, :, here] = _step(sums, before, j, lowest, highest, k - 1)
            highest = choices[k, :, j]
        before = after
    borders = np.zeros((blocks, size + 1), np.int64)
    borders[:, size] = count
    for k in range(size, 1, -1):
        borders[:, k - 1] = choices[k, np.arange(blocks), borders[:, k]]
    return borders


def _step(sums: F32, before: F32, j: int, lowest: I64, highest: I64, otherwise: int) -> tuple[F32, I64]:
    """Return the best result for each j of a chunk, and the i that gives it."""
    candidates = np.arange(lowest.min(), highest.max() + 1)
    length = np.arange(j, j + STEP) - candidates[:, None]
    shares = np.where(length > 0, np.float32(1) / np.maximum(length, 1).astype(np.float32), np.float32(np.nan))
    inside = sums[:, None, j : j + STEP] - sums[:, candidates, None]
    gain = inside * inside * shares + before[:, candidates, None]
    tried = (candidates >= lowest[:, None]) & (candidates <= highest[:, None])
    gain = np.where(tried[:, :, None] & (gain > IMPOSSIBLE), gain, np.float32(-np.inf))
    first = gain.argmax(axis=1)
    best = np.take_along_axis(gain, first[:, None], axis=1)[:, 0]
    possible = best > IMPOSSIBLE
    return np.where(possible, best, IMPOSSIBLE), np.where(possible, candidates[first], otherwise)
