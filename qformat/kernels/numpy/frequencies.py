"""Tables of frequencies (spec/codecs.md, "Streams"); ``numba/frequencies.py`` compiles the same code."""

from __future__ import annotations

from typing import Any


def write_table(frequencies: Any, entries: int, precision: int, table: Any) -> int:
    """Write a table of ``entries`` frequencies to zeroed bytes, 4 for each entry; return the bytes used."""
    position, before, total = 0, 0, 0
    for entry in range(entries):
        frequency = int(frequencies[entry])
        length = 0
        while frequency >> length:
            length += 1
        step = length - before
        before = length
        for _ in range(2 * step - 1 if step > 0 else -2 * step):
            table[position // 8] |= 1 << position % 8
            position += 1
        position += 1
        for i in range(length - 1):
            table[position // 8] |= (frequency >> i & 1) << position % 8
            position += 1
        total += frequency
        if total == 1 << precision:
            break
    return (position + 7) // 8


def read_table(coded: Any, entries: int, precision: int, frequencies: Any) -> int:
    """Read a table from the first bytes of an array into zeros; return the bytes used, or -1 if it is not valid."""
    position, length, total = 0, 0, 0
    size = 8 * len(coded)
    for entry in range(entries):
        ones = 0
        while position < size and coded[position // 8] >> position % 8 & 1:
            ones += 1
            position += 1
        position += 1
        length += (ones + 1) // 2 if ones % 2 else -(ones // 2)
        if length < 0 or length > precision + 1 or position + max(0, length - 1) > size:
            return -1
        frequency = 1 << length >> 1
        for i in range(length - 1):
            frequency |= int(coded[position // 8] >> position % 8 & 1) << i
            position += 1
        frequencies[entry] = frequency
        total += frequency
        if total >= 1 << precision:
            break
    if total != 1 << precision:
        return -1
    while position % 8:  # the padding of the last byte
        if coded[position // 8] >> position % 8 & 1:
            return -1
        position += 1
    return position // 8


def symbol_frequencies(digits: Any, base: int, each: int, precision: int, symbols: Any) -> bool:
    """Fill zeros with the frequencies of symbols made of independent digits; return whether they add up to 2^precision.

    ``digits`` are the frequencies of the ``base`` digits, of which a symbol has ``each``. Products are rounded down as the spec
    says.
    """
    total, largest, most = 0, 0, -1
    for symbol in range(base**each):
        product, remaining, never = 1 << 30, symbol, False
        for _ in range(each):
            frequency = int(digits[remaining % base])
            product = product * frequency >> precision
            never |= frequency == 0
            remaining //= base
        product >>= 30 - precision
        if product == 0 and not never:
            product = 1
        symbols[symbol] = product
        total += product
        if product > most:
            largest, most = symbol, product
    most += (1 << precision) - total
    if most < 1:
        return False
    symbols[largest] = most
    return True
