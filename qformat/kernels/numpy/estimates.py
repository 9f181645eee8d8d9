"""Estimates of the sizes of streams, in numpy. Twin of ``numba/estimates.py``, which documents it."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F64, I64

TABLE_BITS, COST_BITS = 15, 16
EMPTY, RAW, CONSTANT, CODED = 4, 5, 6, 12
LOSS = 8


def _log2(numbers: I64, logarithms: I64) -> I64:
    shifts = np.maximum(0, np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - TABLE_BITS)
    found: I64 = logarithms[numbers >> shifts] + (shifts << COST_BITS)
    return found


def _streams(counts: I64, ones: I64, logarithms: I64) -> I64:
    """Return the bytes of streams of ``counts`` bits of which ``ones`` are 1."""
    zeros = counts - ones
    every = np.stack([counts, ones, zeros])
    all_logarithms, one_logarithms, zero_logarithms = every * _log2(every, logarithms)
    ideal_bits = all_logarithms - one_logarithms - zero_logarithms
    lanes = np.where(counts < 8 << 12, 4, 16)
    coded = CODED + 2 * lanes + ((ideal_bits + (ideal_bits >> LOSS)) >> (COST_BITS + 3))
    coded = np.maximum(coded, CODED + 4 * lanes)  # no less than the states
    taken = np.where((ones == 0) | (zeros == 0), CONSTANT, np.minimum(RAW + (counts + 7) // 8, coded))
    return np.where(counts > 0, taken, EMPTY)


def _sections(counts: I64, logarithms: I64) -> tuple[I64, I64]:
    """Return the bytes of sections: with a stream for each class, and with one for all."""
    every = np.concatenate([counts, counts.sum(axis=-2, keepdims=True)], axis=-2)  # all classes as one more
    streams = _streams(every.sum(axis=-1), every[..., 1], logarithms)
    return streams[..., :-1].sum(axis=-1), streams[..., -1]


def section(counts: I64, logarithms: I64) -> tuple[int, int]:
    """Estimate the bytes of a section: with a stream for each class, and with one for all."""
    by_class, together = _sections(counts, logarithms)
    return int(by_class), int(together)


def section_of_chunks(before: I64, plane: int, first: int, stop: int, logarithms: I64) -> int:
    """Estimate the bytes of a section in all chunks together."""
    counts = before[:, plane, stop] - before[:, plane, first]
    taken = 1 + np.minimum(*_sections(counts, logarithms))
    return int(taken[counts.any(axis=(1, 2))].sum())


def ideal(counts: I64, logarithms: I64) -> int:
    """Return the size of ideally coded symbols with these counts, in units of 2^-16 bits."""
    total = _log2(np.maximum(1, counts.sum(keepdims=True)), logarithms)
    return int((counts * (total - _log2(counts, logarithms))).sum())


def below(
    low: F64,
    high: F64,
    counts: I64,
    means: F64,
    before: F64,
    sums_before: F64,
    width: float,
    found: F64,
    found_sums: F64,
) -> None:
    """Compute how many magnitudes are below each multiple of ``width``, and their sum."""
    borders = np.arange(found.size, dtype=np.float64) * width
    number = np.searchsorted(low, borders, side="right") - 1
    inside = np.maximum(number, 0)
    spread = (high - low)[inside]
    part = np.floor(np.clip((borders - low[inside]) / spread, 0.0, 1.0) * counts[inside])
    mean = means[inside] - (1 - part / counts[inside]) * spread / 2
    found[:] = np.where(number < 0, 0.0, before[inside] + part)
    found_sums[:] = np.where(number < 0, 0.0, sums_before[inside] + part * mean)
