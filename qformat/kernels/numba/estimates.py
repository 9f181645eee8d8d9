"""Estimates of the sizes of streams, compiled. Twin of ``numpy/estimates.py`` (spec/codecs.md, encoders of "`scm`").

``logarithms`` is the table `entropy.frequencies.logarithms`, in units of 2^-16 bits. All arithmetic is on integers, or rounds once
per operation: the bytes of files depend on choices made with it.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba.compiler import F64, inline, kernel

TABLE_BITS, COST_BITS = 15, 16
CLASSES = 3
# bytes of a stream of bits besides the bits: its length, its mode, and if it is coded its table
EMPTY, RAW, CONSTANT, CODED = 4, 5, 6, 12
LOSS = 8  # coding takes more than the ideal by one part in 2^8
I64 = "Array(int64, 1, 'C', readonly=True)"


@inline
def _log2(number, logarithms):
    shift = 0
    while number >> shift >= 1 << TABLE_BITS:
        shift += 1
    return logarithms[number >> shift] + (shift << COST_BITS)


@inline
def _stream(count, ones, logarithms):
    """Return the bytes of a stream of ``count`` bits of which ``ones`` are 1."""
    if count == 0:
        return EMPTY
    zeros = count - ones
    if ones == 0 or zeros == 0:
        return CONSTANT
    ideal = count * _log2(count, logarithms) - ones * _log2(ones, logarithms) - zeros * _log2(zeros, logarithms)
    lanes = 4 if count < 8 << 12 else 16
    coded = CODED + 2 * lanes + ((ideal + (ideal >> LOSS)) >> (COST_BITS + 3))
    return min(RAW + (count + 7) // 8, max(coded, CODED + 4 * lanes))  # no less than the states


@inline
def _section(zero_one, logarithms):
    """Return the bytes of a section's bits: as a stream for each class, and as one stream."""
    by_class, count, ones = 0, 0, 0
    for class_ in range(CLASSES):
        here = zero_one[class_, 0] + zero_one[class_, 1]
        by_class += _stream(here, zero_one[class_, 1], logarithms)
        count += here
        ones += zero_one[class_, 1]
    return by_class, _stream(count, ones, logarithms)


@kernel(f"UniTuple(int64, 2)(int64[:, ::1], {I64})")
def section(counts, logarithms):
    """Estimate the bytes of a section: with a stream for each class, and with one for all.

    ``counts`` has shape (3, 2): how many bits are 0 and 1 in each class.
    """
    return _section(counts, logarithms)


@kernel(f"int64(int64[:, :, :, :, ::1], int64, int64, int64, {I64})")
def section_of_chunks(before, plane, first, stop, logarithms):
    """Estimate the bytes of a section in all chunks together.

    ``before`` has shape (chunks, planes, 33, 3, 2): the counts of `section` in all parts before each one, and in all.
    """
    total = 0
    for chunk in range(len(before)):
        counts = before[chunk, plane, stop] - before[chunk, plane, first]
        if counts.sum():
            by_class, together = _section(counts, logarithms)
            total += 1 + min(by_class, together)
    return total


@kernel(f"int64({I64}, {I64})")
def ideal(counts, logarithms):
    """Return the size of ideally coded symbols with these counts, in units of 2^-16 bits."""
    total = _log2(max(1, counts.sum()), logarithms)
    cost = 0
    for count in counts:
        cost += count * (total - _log2(count, logarithms))
    return cost


@kernel(f"void({F64}, {F64}, {I64}, {F64}, {F64}, {F64}, float64, float64[::1], float64[::1])")
def below(low, high, counts, means, before, sums_before, width, found, found_sums):
    """Compute how many magnitudes are below each multiple of ``width`` (0, 1, 2 ... times), and their sum.

    Bins from ``low`` to ``high``, ascending, hold ``counts`` magnitudes of certain ``means``; ``before`` and ``sums_before`` are
    the numbers and sums in all bins before. Within a bin magnitudes are taken to be spread evenly.
    """
    after = np.int64(0)  # number of bins that begin no later than a border
    for border in range(found.size):
        at = border * width
        while after < low.size and low[after] <= at:
            after += 1
        if after == 0:
            found[border] = found_sums[border] = 0.0
            continue
        inside = after - 1
        spread = high[inside] - low[inside]
        share = min(max((at - low[inside]) / spread, 0.0), 1.0)
        part = np.floor(share * counts[inside])
        # the mean of the lower part of an even spread about the mean of the bin
        mean = means[inside] - (1 - part / counts[inside]) * spread / 2
        found[border] = before[inside] + part
        found_sums[border] = sums_before[inside] + part * mean
