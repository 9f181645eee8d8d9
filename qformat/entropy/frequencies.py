"""Frequencies of symbols as integers of a fixed sum, which encoder and decoder share, and the sizes of streams coded with them.

All in integers, because choices that depend on it decide the bytes of a file. A symbol is a byte-sized member of the coder's
alphabet; it may stand for several *digits* from 0 to base - 1, the first one the least significant.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qformat.kernels import load
from qformat.kernels.arrays import I64, U8, U32

SYMBOLS = 256
#: costs and logarithms are in units of 2^-16 bits
COST_BITS = 16
_TABLE_BITS = 15


@cache
def digits_per_symbol(base: int) -> int:
    """Return how many digits below `base` a symbol stands for: as many as fit in a byte."""
    each = 1
    while base ** (each + 1) <= SYMBOLS:
        each += 1
    return each


@cache
def digit_table(base: int) -> U8:
    """Return the digits of each symbol, read-only and of shape (256, 8): zeros after the last digit and beyond the last symbol."""
    table = np.zeros((SYMBOLS, 8), np.uint8)
    symbols = np.arange(base ** digits_per_symbol(base))
    for i in range(digits_per_symbol(base)):
        table[symbols, i] = symbols // base**i % base
    table.flags.writeable = False
    return table


def normalized(counts: I64, precision: int) -> U32:
    """Return frequencies of the sum 2^precision, nearly proportional to the counts; symbols that occur have at least 1.

    Parameters
    ----------
    counts
        How often each symbol occurs, of which no more than 2^precision do.
    precision
        At most 15.
    """
    total = int(counts.sum())
    scaled = np.maximum(((counts << (precision + 1)) + total) // (2 * total), counts > 0)
    missing = (1 << precision) - int(scaled.sum())
    largest = scaled.argmax()
    scaled[largest] += missing
    while scaled[largest] < 1:  # many rare symbols were rounded up: take from the most frequent one by one
        scaled[scaled.argmax()] -= 1
        scaled[largest] += 1
    frequencies: U32 = scaled.astype(np.uint32)
    return frequencies


def symbol_frequencies(digits: U32, base: int, precision: int) -> U32 | None:
    """Return the frequencies of symbols made of independent digits; None if they do not add up (spec/codecs.md, "Streams").

    Parameters
    ----------
    digits
        The frequencies of the digits, of the sum 2^precision.
    base
        The number of different digits.
    precision
        At most 15.
    """
    frequencies = np.zeros(SYMBOLS, np.uint32)
    valid = load("frequencies").symbol_frequencies(digits, base, digits_per_symbol(base), precision, frequencies)
    return frequencies if valid else None


def digit_counts(counts: I64, base: int) -> I64:
    """Return how often each digit occurs, from how often each symbol does."""
    each = digits_per_symbol(base)
    table = digit_table(base)[: base**each, :each]
    return np.bincount(table.ravel(), np.repeat(counts[: len(table)], each), SYMBOLS).astype(np.int64)


@cache
def logarithms() -> I64:
    """Return the base-2 logarithms of 0 to 2^15, rounded down to units of 2^-16, with 0 for that of 0.

    Bit by bit, by squaring, because the last digits of a library's logarithm differ between machines.
    """
    numbers = np.maximum(np.arange((1 << _TABLE_BITS) + 1), 1)
    result = _bit_lengths(numbers) - 1
    mantissa = numbers.astype(np.uint64) << (31 - result).astype(np.uint64)  # from 1 to 2, with 31 bits after the point
    for _ in range(COST_BITS):
        mantissa = mantissa * mantissa >> np.uint64(31)
        over = mantissa >> np.uint64(32)
        mantissa >>= over
        result = 2 * result + over.astype(np.int64)
    return result


def _bit_lengths(numbers: I64) -> I64:
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def log2(numbers: I64) -> I64:
    """Return the base-2 logarithms of numbers up to 2^53 in units of 2^-16, at most 7 too small, with 0 for that of 0."""
    shifts = np.maximum(0, _bit_lengths(numbers) - _TABLE_BITS)
    found: I64 = logarithms()[numbers >> shifts] + (shifts << COST_BITS)
    return found


def cost(counts: I64, frequencies: U32, precision: int) -> int:
    """Return the size of symbols with these counts, coded with some frequencies, in units of 2^-16 bits."""
    return int((counts * ((precision << COST_BITS) - logarithms()[frequencies])).sum())


def entropy(counts: I64) -> float:
    """Return the order-0 entropy of all symbols together, in bits."""
    occurring = counts[counts > 0]
    return float((occurring * np.log2(occurring.sum() / occurring)).sum())
