"""A small encoder of streams and chunks, written from the text of spec/codecs.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

RAW, CONSTANT, CODED, BY_DIGITS = range(4)
CHUNK_ELEMENTS = 2**19


def bits_to_bytes(bits: str) -> bytes:
    """The first character is the lowest bit of the first byte."""
    return int(bits[::-1] or "0", 2).to_bytes(-(-len(bits) // 8), "little")


def table(frequencies: Sequence[int]) -> bytes:
    """As many entries as are given, whatever their sum is (Streams, Table)."""
    bits, before = "", 0
    for frequency in frequencies:
        b = frequency.bit_length()
        d = b - before
        bits += "1" * (2 * d - 1 if d > 0 else -2 * d) + "0"
        bits += "".join(str(frequency >> i & 1) for i in range(b - 1))
        before = b
    return bits_to_bytes(bits)


def without_end(frequencies: list[int]) -> list[int]:
    return frequencies[: max(i for i, f in enumerate(frequencies) if f) + 1]


def scaled(values: Sequence[int], size: int, precision: int) -> list[int]:
    """Any frequencies with the sum 2^L that give one to all that occurs."""
    counts = np.bincount(values, minlength=size).tolist()
    result = [max(1, (n << precision) // len(values)) if n else 0 for n in counts]
    result[result.index(max(result))] += (1 << precision) - sum(result)
    assert min(result) >= 0
    return result


def products(table_of_digits: list[int], s: int, k: int, precision: int) -> list[int]:
    """Frequencies of symbols from those of digits."""
    result = []
    for symbol in range(s**k):
        p, rest, zero = 2**30, symbol, False
        for _ in range(k):
            rest, digit = divmod(rest, s)
            p = (p * table_of_digits[digit]) >> precision
            zero |= table_of_digits[digit] == 0
        f = p >> (30 - precision)
        result.append(1 if f == 0 and not zero else f)
    result[result.index(max(result))] += (1 << precision) - sum(result)
    return result


def lanes(count: int) -> int:
    if count < 2**12:
        return 4
    if count < 2**16:
        return 16
    return 32 if count < 2**17 else 64


def coder(symbols: Sequence[int], frequencies: list[int], precision: int) -> tuple[list[int], list[int]]:
    """The states and the words (Streams, Coder)."""
    before = [0, *accumulate(frequencies)]
    states, words = [2**16] * lanes(len(symbols)), []
    for i in range(len(symbols) - 1, -1, -1):
        x, f, c = states[i % len(states)], frequencies[symbols[i]], before[symbols[i]]
        if x >= f << (32 - precision):
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % len(states)] = (x // f << precision) + x % f + c
    return states, words[::-1]


def sized(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def coded(mode: int, precision: int, entries: bytes, states: Sequence[int], words: Sequence[int]) -> bytes:
    return sized(bytes([mode, precision]) + entries + struct.pack(f"<{len(states)}I{len(words)}H", *states, *words))


def digits_per_symbol(s: int) -> int:
    return max(k for k in range(1, 9) if s**k <= 256)


def join(digits: Sequence[int], s: int, fill: int = 0) -> list[int]:
    """The symbols of these digits."""
    k = digits_per_symbol(s)
    complete = [*digits, *[fill] * (-len(digits) % k)]
    return [sum(complete[i + j] * s**j for j in range(k)) for i in range(0, len(complete), k)]


def stream(symbols: Any, s: int = 256, mode: int = CODED, precision: int = 12) -> bytes:
    symbols = [int(symbol) for symbol in symbols]
    k = digits_per_symbol(s)
    if not symbols:
        return bytes(4)
    if mode == RAW:
        return sized(bytes([RAW, *symbols]))
    if mode == CONSTANT:
        assert len(set(symbols)) == 1
        return sized(bytes([CONSTANT, symbols[0]]))
    frequencies = stored = scaled(symbols, s**k, precision)
    if mode == BY_DIGITS:
        stored = scaled([symbol // s**i % s for symbol in symbols for i in range(k)], s, precision)
        frequencies = products(stored, s, k, precision)
    return coded(mode, precision, table(without_end(stored)), *coder(symbols, frequencies, precision))


def random_symbols(count: int, size: int, seed: int = 0) -> list[int]:
    """Return symbols, small ones more often."""
    wanted = np.random.default_rng(seed).exponential(size / 9, count)
    return [int(symbol) for symbol in np.minimum(wanted, size - 1)]


def chunked(chunks: Sequence[bytes], **others: bytes) -> dict[str, bytes]:
    lengths = struct.pack(f"<{len(chunks)}I", *map(len, chunks))
    return {"chunks": b"".join(chunks), "lengths": lengths, **others}


def padded(content: bytes, elements: int) -> bytes:
    return content.ljust(-(-elements // 1024), b"\0")
