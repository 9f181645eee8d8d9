"""Interleaved range asymmetric numeral systems, compiled. Twin of ``plain/rans.py`` (spec/codecs.md, "Streams")."""

from __future__ import annotations

import numpy as np

from qformat.kernels.jit.compiler import U8, kernel
from qformat.kernels.jit.simd import load_as, store_as

WORD = np.uint16(0)
STATE = np.uint32(0)
ZERO, ONE, TWO = np.uint64(0), np.uint64(1), np.uint64(2)
FREQUENCIES = "Array(uint32, 1, 'C', readonly=True)"


@kernel(f"void({U8}, int64[::1])")
def histogram(letters, counts):
    """Add how often each letter occurs to 256 counts."""
    # Four tables, as equal neighbours would else wait for each other's store
    parts = np.zeros((4, 256), np.int64)
    whole = letters.size // 4 * 4
    for i in range(0, whole, 4):
        parts[0, letters[i]] += 1
        parts[1, letters[i + 1]] += 1
        parts[2, letters[i + 2]] += 1
        parts[3, letters[i + 3]] += 1
    for i in range(whole, letters.size):
        parts[0, letters[i]] += 1
    for letter in range(256):
        counts[letter] += parts[0, letter] + parts[1, letter] + parts[2, letter] + parts[3, letter]


@kernel(f"int64({U8}, {FREQUENCIES}, int64, int64, uint8[::1])")
def encode(letters, frequencies, precision, lanes, coded):
    """Write states and words to the end of ``coded``; return where they begin.

    There are 2 bytes for each letter and 4 for each lane. Letters that occur need a frequency above 0; the sum is 2^precision.
    """
    size = np.int64(1) << precision
    shift = np.uint64(32 + precision)
    reciprocals = np.zeros(256, np.uint64)
    limits = np.zeros(256, np.uint32)
    starts = np.zeros(256, np.uint32)
    rests = np.zeros(256, np.uint32)
    start = 0
    for letter in range(256):
        frequency = np.int64(frequencies[letter])
        starts[letter] = start
        start += frequency
        if frequency:
            rests[letter] = size - frequency
            limits[letter] = (frequency << (32 - precision)) - 1
            # With 2^(32 + precision) / frequency rounded up, x * reciprocal >> (32 + precision) is x // frequency for all states x
            # that occur here, which are below frequency * 2^(32 - precision), and the product is below 2^64.
            reciprocals[letter] = ((ONE << shift) + np.uint64(frequency - 1)) // np.uint64(frequency)
    states = np.full(lanes, 1 << 16, np.uint32)
    at = np.uint64(coded.size)
    end = np.uint64(letters.size)
    width = np.uint64(lanes)
    while end > ZERO:
        begin = (end - ONE) // width * width
        for back in range(end - begin):
            lane = end - begin - ONE - back
            letter = letters[begin + lane]
            x = states[lane]
            store_as(coded, at - TWO, np.uint16(x))
            full = np.uint32(x > limits[letter])  # without a branch, which could not be predicted
            at -= np.uint64(full << np.uint32(1))
            x = np.uint32(x >> (full << np.uint32(4)))
            quotient = (np.uint64(x) * reciprocals[letter]) >> shift
            states[lane] = np.uint32(x + np.uint32(quotient) * rests[letter] + starts[letter])
        end = begin
    at -= np.uint64(4 * lanes)
    for lane in range(lanes):
        store_as(coded, at + np.uint64(4 * lane), states[lane])
    return np.int64(at)


@kernel(f"int64({U8}, {FREQUENCIES}, int64, int64, uint8[::1])")
def decode(coded, frequencies, precision, lanes, letters):
    """Read states and words, and fill ``letters``; return 0, or 1 if the bytes are none that an encoder can have written.

    There have to be the bytes of the states. The frequencies have the sum 2^precision.
    """
    slots = np.empty(1 << precision, np.uint8)
    starts = np.empty(256, np.uint32)
    start = 0
    for letter in range(256):
        starts[letter] = start
        for slot in range(start, start + np.int64(frequencies[letter])):
            slots[slot] = letter
        start += np.int64(frequencies[letter])
    states = np.empty(lanes, np.uint32)
    for lane in range(lanes):
        states[lane] = load_as(coded, 4 * lane, STATE)
    mask = np.uint32((1 << precision) - 1)
    shift = np.uint32(precision)
    # Unsigned, for numba looks at the sign of every other index
    width = np.uint64(lanes)
    at = np.uint64(4 * lanes)
    safe = np.uint64(max(0, coded.size - 2 * lanes))  # from here on there may be too few words for a round
    whole = np.uint64(letters.size // lanes * lanes)
    i = ZERO
    while i < whole and at <= safe:
        for lane in range(width):
            x = states[lane]
            y = x & mask
            letter = slots[y]
            letters[i + lane] = letter
            x = np.uint32(frequencies[letter] * (x >> shift) + (y - starts[letter]))
            # without a branch, which could not be predicted
            short = np.uint32(x < np.uint32(1 << 16))
            word = np.uint32(load_as(coded, at, WORD)) & (np.uint32(0) - short)
            states[lane] = np.uint32((x << (short << np.uint32(4))) | word)
            at += np.uint64(short << np.uint32(1))
        i += width
    size = np.uint64(coded.size)
    while i < np.uint64(letters.size):
        lane = i % width
        x = states[lane]
        y = x & mask
        letter = slots[y]
        letters[i] = letter
        x = np.uint32(frequencies[letter] * (x >> shift) + (y - starts[letter]))
        if x < np.uint32(1 << 16):
            if at + TWO > size:
                return 1
            x = np.uint32((x << np.uint32(16)) | np.uint32(load_as(coded, at, WORD)))
            at += TWO
        states[lane] = x
        i += ONE
    if at != size:
        return 1
    for lane in range(lanes):
        if states[lane] != 1 << 16:
            return 1
    return 0
