"""Estimates of the sizes of streams are those of the specification, with the kernels of both families."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat.codecs.codebooks import running
from qformat.entropy.frequencies import log2, logarithms
from tests.helpers.kernels import FAMILIES, modules

NUMBA, NUMPY = (each["estimates"] for each in modules("estimates"))
every_family = pytest.mark.parametrize("kernels", [NUMBA, NUMPY], ids=FAMILIES)
numbers = st.one_of(st.integers(0, 3), st.integers(0, 1 << 20))
sections = st.lists(numbers, min_size=6, max_size=6).map(lambda found: np.array(found, np.int64).reshape(3, 2))


def stream(zeros: int, ones: int) -> int:
    """Return the bytes of a stream of bits, from the text of spec/codecs.md."""
    count = zeros + ones
    if not zeros or not ones:
        return 6 if count else 4
    bits = sum(
        sign * n * int(log2(np.array([n]))[0]) for sign, n in ((1, count), (-1, zeros), (-1, ones))
    )  # in units of 2^-16
    lanes = 4 if count < 1 << 15 else 16
    return min(5 + math.ceil(count / 8), max(12 + 2 * lanes + (bits + bits // 256) // (8 << 16), 12 + 4 * lanes))


@every_family
@given(sections)
def test_estimated_sizes_of_sections_are_those_of_the_spec(kernels, counts):
    by_class = sum(stream(*pair) for pair in counts.tolist())
    together = stream(*counts.sum(axis=0).tolist())
    assert kernels.section(counts, logarithms()) == (by_class, together)


@every_family
@given(st.lists(sections, min_size=1, max_size=4))
def test_estimated_sizes_of_sections_add_up_over_chunks(kernels, chunks):
    before = np.zeros((len(chunks), 2, 4, 3, 2), np.int64)  # of 2 planes and 3 parts
    for chunk, counts in enumerate(chunks):
        before[chunk, 1, 2:] = counts
    for first, stop, there in ((0, 1, False), (0, 2, True), (1, 3, True), (2, 3, False)):
        taken = sum(1 + min(kernels.section(counts, logarithms())) for counts in chunks if counts.any() and there)
        assert kernels.section_of_chunks(before, 1, first, stop, logarithms()) == taken


@every_family
@given(st.lists(numbers, min_size=1, max_size=300))
def test_estimated_ideal_sizes_are_the_entropy_of_the_counts(kernels, found):
    counts = np.array(found, np.int64)
    expected = (counts * (log2(np.maximum(1, counts.sum(keepdims=True))) - log2(counts))).sum()
    assert kernels.ideal(counts, logarithms()) == expected


@given(st.integers(0, 1 << 32), st.integers(1, 60), st.floats(1e-3, 3))
def test_counts_and_sums_below_borders_are_the_same_in_numba_and_numpy(seed, bins, width):
    rng = np.random.default_rng(seed)
    edges = np.cumsum(rng.random(bins + 1))
    low, high = edges[:-1], edges[:-1] + np.diff(edges) * rng.choice([0.5, 1.0], bins)
    counts = rng.integers(1, 1000, bins)
    sums = counts * (low + (high - low) * rng.random(bins))
    args = low, high, counts, sums / counts, running(counts.astype(np.float64)), running(sums), width
    found = [(np.empty(80), np.empty(80)) for _ in range(2)]
    NUMBA.below(*args, *found[0])
    NUMPY.below(*args, *found[1])
    np.testing.assert_array_equal(found[0], found[1])
    every = counts.sum()
    assert (np.diff(found[0][0]) >= 0).all()
    assert (found[0][0] <= every).all()
    assert (found[0][0] == np.floor(found[0][0])).all()
    np.testing.assert_array_equal(found[0][0][np.arange(80) * width >= high[-1]], every)
