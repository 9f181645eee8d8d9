"""Streams of symbols: bytes stored raw, as a constant, or coded with static frequencies (spec/codecs.md, "Streams")."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from qformat.entropy.frequencies import (
    COST_BITS,
    SYMBOLS,
    cost,
    digit_counts,
    digits_per_symbol,
    entropy,
    logarithms,
    normalized,
    symbol_frequencies,
)
from qformat.kernels import load
from qformat.kernels.arrays import I64, U8, U32

RAW, CONSTANT, CODED, CODED_BY_DIGITS = range(4)
_LEAST_PRECISION, _MOST_PRECISION = 8, 15
#: of digits 0 and 1, which are often nearly even, while their table is short in any case
_PRECISION_OF_BITS = 13
#: coding has to save at least one part in 256, as raw symbols are read much faster
_WORTH = 256


def symbol_count(digits: int, base: int) -> int:
    """Return how many symbols hold `digits` digits below `base`."""
    return -(-digits // digits_per_symbol(base))


def _lanes(count: int) -> int:
    """Return the number of interleaved states for `count` symbols: more are faster, and each costs about 2 bytes."""
    if count < 1 << 12:
        return 4
    if count < 1 << 16:
        return 16
    return 32 if count < 1 << 17 else 64


@dataclass
class StreamWriter:
    """Streams and other bytes, one after the other.

    Attributes
    ----------
    parts
        The bytes so far.
    entropy
        The sum of the order-0 entropies of all streams, in bits.
    """

    parts: list[bytes] = field(default_factory=list)
    entropy: float = 0.0

    @property
    def nbytes(self) -> int:
        """The number of bytes so far."""
        return sum(map(len, self.parts))

    def extend(self, other: StreamWriter) -> None:
        """Append the contents of another writer."""
        self.parts += other.parts
        self.entropy += other.entropy

    def add(self, data: bytes) -> None:
        """Append bytes as they are."""
        self.parts.append(data)

    def stream(self, symbols: U8, base: int = SYMBOLS) -> None:
        """Append a stream.

        Parameters
        ----------
        symbols
            Each below base**digits_per_symbol(base).
        base
            The number of different digits.
        """
        if not symbols.size:
            self.parts.append(struct.pack("<I", 0))
            return
        counts = np.zeros(SYMBOLS, np.int64)
        load("rans").histogram(symbols, counts)
        self.entropy += entropy(counts)
        body = _packed(symbols, counts, base)
        self.parts.append(struct.pack("<I", len(body)) + body)

    def bits(self, packed: U8, count: int, ones: int) -> None:
        """Append a stream of digits 0 and 1, coded if they are uneven enough for that to pay.

        Parameters
        ----------
        packed
            Eight digits in a byte, the first in the lowest bit, the last byte padded with zeros.
        count, ones
            The number of digits, and how many of them are 1.
        """
        if not count:
            self.parts.append(struct.pack("<I", 0))
            return
        if ones in (0, 8 * packed.size):
            body = bytes([CONSTANT, packed[0]])
        else:
            shares = [share / count for share in (ones, count - ones) if share]
            self.entropy -= count * sum(share * math.log2(share) for share in shares)
            body = _packed_bits(packed, ones)
        self.parts.append(struct.pack("<I", len(body)) + body)

    def chunk(self, elements: int) -> bytes:
        """Return all bytes, padded with zeros to the least length of a chunk of `elements` elements."""
        content = b"".join(self.parts)
        return content + bytes(max(0, -(-elements // 1024) - len(content)))


def _packed(symbols: U8, counts: I64, base: int) -> bytes:
    """Return a stream without its length, in the mode with the fewest bytes by estimate."""
    if counts[symbols[0]] == symbols.size:
        return bytes([CONSTANT, symbols[0]])
    precision = min(_MOST_PRECISION, max(_LEAST_PRECISION, symbols.size.bit_length() - 2))
    head, chosen = bytes([RAW]), None
    least = symbols.size * 8 * (_WORTH - 1) // _WORTH
    for mode in (CODED_BY_DIGITS, CODED) if digits_per_symbol(base) > 1 else (CODED,):
        table, frequencies = _coded_table(counts, base, precision, by_digits=mode == CODED_BY_DIGITS)
        if frequencies is None or not frequencies[counts > 0].all():
            continue
        bits = 8 * len(table) + 32 * _lanes(symbols.size) + (cost(counts, frequencies, precision) >> COST_BITS)
        if bits < least:
            head, chosen, least = bytes([mode, precision]) + table, frequencies, bits
    if chosen is None:
        return head + symbols.tobytes()
    return head + _coded(symbols, chosen, precision)


def _packed_bits(symbols: U8, ones: int) -> bytes:
    """Do as `_packed` for symbols of eight bits, `ones` of which are set: raw, or coded by digits."""
    total, sum_ = 8 * symbols.size, 1 << _PRECISION_OF_BITS
    frequency = min(sum_ - 1, max(1, (2 * ones * sum_ + total) // (2 * total)))
    shares = (total - ones, sum_ - frequency), (ones, frequency)
    saved = sum(count * int(logarithms()[share]) for count, share in shares)
    bits = 32 + 32 * _lanes(symbols.size) + ((total * _PRECISION_OF_BITS << COST_BITS) - saved >> COST_BITS)
    head, frequencies = _bits_table(frequency) if bits < total * (_WORTH - 1) // _WORTH else (b"", None)
    if frequencies is None:
        return bytes([RAW]) + symbols.tobytes()
    return head + _coded(symbols, frequencies, _PRECISION_OF_BITS)


def _coded(symbols: U8, frequencies: U32, precision: int) -> bytes:
    """Return the states and words of a stream."""
    lanes = _lanes(symbols.size)
    coded = np.empty(2 * symbols.size + 4 * lanes, np.uint8)
    return coded[load("rans").encode(symbols, frequencies, precision, lanes, coded) :].tobytes()


@lru_cache(256)
def _bits_table(frequency: int) -> tuple[bytes, U32 | None]:
    """Return the head of a stream whose bits are 1 with some frequency, and the frequencies of its symbols; None if one is 0."""
    stored = np.zeros(SYMBOLS, np.uint32)
    stored[:2] = (1 << _PRECISION_OF_BITS) - frequency, frequency
    frequencies = symbol_frequencies(stored, 2, _PRECISION_OF_BITS)
    table = np.zeros(16, np.uint8)
    length = load("frequencies").write_table(stored, 2, _PRECISION_OF_BITS, table)
    if frequencies is not None and not frequencies.all():
        frequencies = None
    return bytes([CODED_BY_DIGITS, _PRECISION_OF_BITS]) + table[:length].tobytes(), frequencies


def _coded_table(counts: I64, base: int, precision: int, *, by_digits: bool) -> tuple[bytes, U32 | None]:
    """Return a table as it is stored, and the frequencies of symbols that follow from it; None if they do not add up."""
    entries = base if by_digits else base ** digits_per_symbol(base)
    stored = normalized(digit_counts(counts, base) if by_digits else counts, precision)
    table = np.zeros(4 * SYMBOLS, np.uint8)
    length = load("frequencies").write_table(stored, entries, precision, table)
    return table[:length].tobytes(), symbol_frequencies(stored, base, precision) if by_digits else stored


class StreamReader:
    """Reads the bytes of a `StreamWriter`, front to back.

    Every method raises ``ValueError`` if no encoder can have written these bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._at = 0

    def take(self, count: int) -> U8:
        """Return the next `count` bytes."""
        if count > self._data.size - self._at:
            raise ValueError("a chunk is too short")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        """Return the next unsigned integer, of `size` bytes."""
        return int.from_bytes(self.take(size).tobytes(), "little")

    def stream(self, count: int, base: int = SYMBOLS) -> U8:
        """Return the `count` symbols of the next stream, of digits below `base`."""
        body = self.take(self.number(4))
        if not count and not body.size:
            return body
        if not count or body.size < 2:
            raise ValueError("a stream has another length than its symbols need")
        size = base ** digits_per_symbol(base)
        mode, content = int(body[0]), body[1:]
        if mode in (RAW, CONSTANT):
            if content.size != (count if mode == RAW else 1):
                raise ValueError("a stream has another length than its symbols need")
            if size < SYMBOLS and content.max() >= size:
                raise ValueError(f"a stream has a symbol that is not below {size}")
            return content if mode == RAW else np.full(count, content[0], np.uint8)
        if mode > CODED_BY_DIGITS or (mode == CODED_BY_DIGITS and digits_per_symbol(base) == 1):
            raise ValueError(f"a stream has the unknown mode {mode}")
        precision = int(content[0])
        if not _LEAST_PRECISION <= precision <= _MOST_PRECISION:
            raise ValueError(f"a stream has the invalid precision {precision}")
        return _decoded(content[1:], count, base, precision, by_digits=mode == CODED_BY_DIGITS)

    def end(self, elements: int) -> None:
        """Check that nothing is left but the padding of a chunk of `elements` elements."""
        content, least = self._at, -(-elements // 1024)
        if self._data.size != max(content, least) or self._data[content:].any():
            raise ValueError("a chunk has more bytes than its elements need")


def _decoded(coded: U8, count: int, base: int, precision: int, *, by_digits: bool) -> U8:
    stored = np.zeros(SYMBOLS, np.uint32)
    entries = base if by_digits else base ** digits_per_symbol(base)
    start = load("frequencies").read_table(coded, entries, precision, stored)
    frequencies = symbol_frequencies(stored, base, precision) if start >= 0 and by_digits else stored
    if start < 0 or frequencies is None:
        raise ValueError("a stream has an invalid table of frequencies")
    lanes = _lanes(count)
    coded = np.ascontiguousarray(coded[start:])
    symbols = np.empty(count, np.uint8)
    if coded.size < 4 * lanes or load("rans").decode(coded, frequencies, precision, lanes, symbols):
        raise ValueError("a stream does not end where it should")
    return symbols
