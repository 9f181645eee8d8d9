"""Interleaved rANS (Duda, 2013; Giesen, 2014), compiled. Twin of ``numpy/rans.py`` (spec/codecs.md, "Streams").

A coder is a state x from 2^16 to 2^32 - 1. Symbol i belongs to lane i mod ``lanes``, a state of its own, and all lanes share one
string of 16-bit words: each step depends on the one before in its lane only, so that the processor overlaps the others. Decoding
waits for table lookups most; 64 lanes, four vectors of 16, keep enough of them under way (and cost 2 bytes each, see
``streams._lanes``).

With words of 16 bits and a precision L of at most 15, a step moves one word at most: an encoder's state is below f 2^(32 - L) after
it gave one away, and 2^16 is less than that for every frequency f. So the encoder writes at most 2 bytes for a symbol, and a
decoder that has 2 bytes left for each lane can take a whole round without looking at the end again.
"""

from __future__ import annotations

import numpy as np

from qformat.kernels.numba import avx512
from qformat.kernels.numba.compiler import U8, U32, inline, kernel
from qformat.kernels.numba.simd_casts import to_u8
from qformat.kernels.numba.simd_memory import load, load_as, store, store_as

WORD = np.uint16(0)
STATE = np.uint32(0)
LOW, SIXTEEN = np.uint32(0xFFFF), np.uint32(16)
ZERO, ONE, TWO = np.uint64(0), np.uint64(1), np.uint64(2)


@kernel(f"void({U8}, int64[::1])")
def histogram(symbols, counts):
    """Add how often each symbol occurs to 256 counts."""
    # four tables, or equal neighbours would wait for each other's store
    parts = np.zeros((4, 256), np.int64)
    whole = symbols.size // 4 * 4
    for i in range(0, whole, 4):
        parts[0, symbols[i]] += 1
        parts[1, symbols[i + 1]] += 1
        parts[2, symbols[i + 2]] += 1
        parts[3, symbols[i + 3]] += 1
    for i in range(whole, symbols.size):
        parts[0, symbols[i]] += 1
    for symbol in range(256):
        counts[symbol] += parts[0, symbol] + parts[1, symbol] + parts[2, symbol] + parts[3, symbol]


@kernel(f"int64({U8}, {U32}, int64, int64, uint8[::1])")
def encode(symbols, frequencies, precision, lanes, coded):
    """Write states and words to the end of ``coded``; return where they begin.

    ``coded`` has 2 bytes for each symbol and 4 for each lane. Symbols that occur have a frequency above 0; the sum is 2^precision.
    """
    size = np.int64(1) << precision
    shift = np.uint64(32 + precision)
    reciprocals = np.zeros(256, np.uint64)
    limits = np.zeros(256, np.uint32)
    starts = np.zeros(256, np.uint32)
    complements = np.zeros(256, np.uint32)
    start = 0
    for symbol in range(256):
        frequency = np.int64(frequencies[symbol])
        starts[symbol] = start
        start += frequency
        if frequency:
            complements[symbol] = size - frequency
            limits[symbol] = (frequency << (32 - precision)) - 1
            # A division takes longer than all the rest. With 2^(32 + precision) / frequency rounded up, x * reciprocal >>
            # (32 + precision) is x // frequency for all states x that occur here, which are below frequency * 2^(32 - precision),
            # and the product is below 2^64.
            reciprocals[symbol] = ((ONE << shift) + np.uint64(frequency - 1)) // np.uint64(frequency)
    states = np.full(lanes, 1 << 16, np.uint32)
    at = np.uint64(coded.size)
    end = np.uint64(symbols.size)
    width = np.uint64(lanes)
    while end > ZERO:
        begin = (end - ONE) // width * width
        for back in range(end - begin):
            lane = end - begin - ONE - back
            symbol = symbols[begin + lane]
            x = states[lane]
            store_as(coded, at - TWO, np.uint16(x))
            # without a branch, which could not be predicted: the word is written in any case, and kept or overwritten
            full = np.uint32(x > limits[symbol])
            at -= np.uint64(full << np.uint32(1))
            x = np.uint32(x >> (full << np.uint32(4)))
            # x // f * 2^L + x % f + start, as x + x // f * (2^L - f) + start
            quotient = (np.uint64(x) * reciprocals[symbol]) >> shift
            states[lane] = np.uint32(x + np.uint32(quotient) * complements[symbol] + starts[symbol])
        end = begin
    at -= np.uint64(4 * lanes)
    for lane in range(lanes):
        store_as(coded, at + np.uint64(4 * lane), states[lane])
    return np.int64(at)


@inline
def _rounds(coded, at, symbols, i, states, slots, entries, precision):
    """Decode whole rounds of one symbol for each lane, while each lane could take a word; return the places in both arrays."""
    mask, shift = np.uint32((1 << precision) - 1), np.uint32(precision)
    width = np.uint64(states.size)
    last, safe = np.int64(symbols.size) - states.size, np.int64(coded.size) - 2 * states.size
    while np.int64(i) <= last and np.int64(at) <= safe:
        for lane in range(width):
            x = states[lane]
            y = x & mask
            symbol = slots[y]
            symbols[i + lane] = symbol
            entry = entries[symbol]
            x = np.uint32((entry & LOW) * (x >> shift) + y - (entry >> SIXTEEN))
            # without a branch, which could not be predicted: a word is read in any case, and masked
            short = np.uint32(x < np.uint32(1 << 16))
            word = np.uint32(load_as(coded, at, WORD)) & (np.uint32(0) - short)
            states[lane] = np.uint32((x << (short << np.uint32(4))) | word)
            at += np.uint64(short << np.uint32(1))
        i += width
    return at, i


@inline
def _step(states, entry, mask, shift):
    """Return the states after a symbol, before they take words."""
    return (entry & LOW) * (states >> shift) + (states & mask) - (entry >> SIXTEEN)


@inline
def _rounds_avx512(coded, at, symbols, i, states, slots, entries, precision):
    """Do as `_rounds`, with 16 lanes in a vector. Each `avx512.refill` reads 32 bytes, which `_rounds`' bound covers, too."""
    mask, shift = np.uint32((1 << precision) - 1), np.uint32(precision)
    last, safe = np.int64(symbols.size) - states.size, np.int64(coded.size) - 2 * states.size
    if states.size == 64:
        a, b, c, d = load(states, 0, 16), load(states, 16, 16), load(states, 32, 16), load(states, 48, 16)
        while np.int64(i) <= last and np.int64(at) <= safe:
            first, second = avx512.gather(slots, a & mask) & 255, avx512.gather(slots, b & mask) & 255
            third, fourth = avx512.gather(slots, c & mask) & 255, avx512.gather(slots, d & mask) & 255
            store(symbols, i, to_u8(first))
            store(symbols, i + SIXTEEN, to_u8(second))
            store(symbols, i + SIXTEEN + SIXTEEN, to_u8(third))
            store(symbols, i + SIXTEEN + SIXTEEN + SIXTEEN, to_u8(fourth))
            a = _step(a, avx512.gather(entries, first), mask, shift)
            b = _step(b, avx512.gather(entries, second), mask, shift)
            c = _step(c, avx512.gather(entries, third), mask, shift)
            d = _step(d, avx512.gather(entries, fourth), mask, shift)
            a, at = avx512.refill(a, coded, at)
            b, at = avx512.refill(b, coded, at)
            c, at = avx512.refill(c, coded, at)
            d, at = avx512.refill(d, coded, at)
            i += np.uint64(64)
        store(states, 0, a)
        store(states, 16, b)
        store(states, 32, c)
        store(states, 48, d)
    elif states.size == 32:
        a, b = load(states, 0, 16), load(states, 16, 16)
        while np.int64(i) <= last and np.int64(at) <= safe:
            first, second = avx512.gather(slots, a & mask) & 255, avx512.gather(slots, b & mask) & 255
            store(symbols, i, to_u8(first))
            store(symbols, i + SIXTEEN, to_u8(second))
            a = _step(a, avx512.gather(entries, first), mask, shift)
            b = _step(b, avx512.gather(entries, second), mask, shift)
            a, at = avx512.refill(a, coded, at)
            b, at = avx512.refill(b, coded, at)
            i += np.uint64(32)
        store(states, 0, a)
        store(states, 16, b)
    return _rounds(coded, at, symbols, i, states, slots, entries, precision)


_whole_rounds = _rounds_avx512 if avx512.AVAILABLE else _rounds


@kernel(f"int64({U8}, {U32}, int64, int64, uint8[::1])")
def decode(coded, frequencies, precision, lanes, symbols):
    """Read states and words, and fill ``symbols``; return 0, or 1 if no encoder can have written these bytes.

    ``coded`` may hold anything, but at least the 4 bytes of each state. The frequencies have the sum 2^precision.
    """
    # One byte for each of the 2^L slots and 4 for each symbol stay in the first cache, where a table of all that a slot needs would
    # be too large. (3 bytes more, as gathers read 4 at once.)
    slots = np.empty((1 << precision) + 3, np.uint8)
    entries = np.empty(256, np.uint32)  # the frequency, and in the upper half the sum of those before it
    start = np.int64(0)
    for symbol in range(256):
        frequency = np.int64(frequencies[symbol])
        entries[symbol] = (start << 16) | frequency
        for slot in range(start, start + frequency):
            slots[slot] = symbol
        start += frequency
    states = np.empty(lanes, np.uint32)
    for lane in range(lanes):
        states[lane] = load_as(coded, 4 * lane, STATE)
    # places are unsigned: numba would test the sign of other indices, to count negative ones from the end
    at, i = _whole_rounds(coded, np.uint64(4 * lanes), symbols, ZERO, states, slots, entries, precision)
    width, size = np.uint64(lanes), np.uint64(coded.size)
    mask, shift = np.uint32((1 << precision) - 1), np.uint32(precision)
    while i < np.uint64(symbols.size):  # the last symbols, with a check for each word
        lane = i % width
        x = states[lane]
        y = x & mask
        symbol = slots[y]
        symbols[i] = symbol
        entry = entries[symbol]
        x = np.uint32((entry & LOW) * (x >> shift) + y - (entry >> SIXTEEN))
        if x < np.uint32(1 << 16):
            if at + TWO > size:
                return 1
            x = np.uint32((x << SIXTEEN) | np.uint32(load_as(coded, at, WORD)))
            at += TWO
        states[lane] = x
        i += ONE
    if at != size:
        return 1
    for lane in range(lanes):
        if states[lane] != 1 << 16:
            return 1
    return 0
