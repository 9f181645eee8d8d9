"""Streams made from the text of spec/codecs.md, decoded by the independent reader."""

from __future__ import annotations

import struct
from types import ModuleType

import numpy as np
import pytest

from tests.helpers import stream_encoder as encoder


def read(streams: ModuleType, content: bytes, count: int, s: int = 256) -> list[int]:
    cursor = streams.Cursor(content, "here")
    found = streams.symbols(cursor, count, s)
    assert found.dtype == np.uint8
    assert len(cursor.rest) == 0
    symbols: list[int] = found.tolist()
    return symbols


# ---- streams by hand

# L = 8, f = 128, 128. 128 has b = 8: after 0 15 ones, a zero and 7 zero bits; after 128 a zero and 7 zero bits.
HALVES = bytes.fromhex("0208 ff7f0000")
# Each of four lanes has one symbol: 2^16 / 128 × 256, and 128 more for the symbol 1. No words.
HALVES_STATES = bytes.fromhex("80000200 00000200 00000200 80000200")
# L = 15, f = 1, 32767: bits 1 0, then d = 14: 27 ones and a zero, then 14 ones.
UNEVEN = bytes.fromhex("020f fdffffdfff0f")
# Lane 0 has the symbols 0, 0, 1. Backwards: 1: 65536 = 2 × 32767 + 2, 2 × 2^15 + 2 + 1 = 0x10003. 0: × 2^15 is 0x80018000.
# 0: not below 2^17, so 0x8000 is put out; 0x8001 × 2^15 is 0x40008000. The other lanes have 1, 1: 0x10003, then 0x10006.
UNEVEN_STATES = bytes.fromhex("00800040 06000100 06000100 06000100")
# s = 16, L = 8, f = 255, 1. 255: 15 ones, a zero, 7 ones. 1: d = -7: 14 ones, a zero.
# Symbols 0, 1, 16, 17 have F = floor(255² / 256) = 254, 1, 1, 1, the sum of which is 257: so 253, 1, 1, 1.
# 17 has c = 255: 2^16 × 256 + 255; 0: 65536 = 259 × 253 + 9; 1: c = 253; 16: c = 254.
PAIRS = bytes.fromhex("0308 ff7fffff1f")
PAIRS_STATES = bytes.fromhex("ff000001 09030100 fd000001 fe000001")

BY_HAND = {
    "none": (b"", 0, 256, []),
    "raw": (b"\0\7\0\xff", 3, 256, [7, 0, 255]),
    "raw, digits": (b"\0\0\xf2", 2, 3, [0, 242]),
    "constant": (b"\1\x1f", 3, 32, [31] * 3),
    "without words": (HALVES + HALVES_STATES, 4, 256, [1, 0, 0, 1]),
    "with a word": (UNEVEN + UNEVEN_STATES + b"\0\x80", 9, 256, [0, 1, 1, 1, 0, 1, 1, 1, 1]),
    "by digits": (PAIRS + PAIRS_STATES, 4, 16, [17, 0, 1, 16]),
    "one symbol": (bytes.fromhex("0208 ffff0100") + b"\0\0\1\0" * 4, 9, 256, [0] * 9),  # f = 2^L: 17 ones, 0, 8 zeros
    "fewer symbols than lanes": (HALVES + HALVES_STATES[:4] + b"\0\0\1\0" * 3, 1, 256, [1]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_reference_decodes_streams_made_by_hand(streams: ModuleType, name: str) -> None:
    body, count, s, symbols = BY_HAND[name]
    assert read(streams, encoder.sized(body), count, s) == symbols
    for wrong in (body + b"\0", body + b"\0\0", body[:-1], body[:-2]):
        if wrong != body and (wrong or count):
            with pytest.raises(streams.SpecError, match=r"left over|are needed|half a word|too few"):
                read(streams, encoder.sized(wrong), count, s)
    with pytest.raises(streams.SpecError, match="are needed"):  # the length goes beyond what is there
        read(streams, struct.pack("<I", len(body) + 1) + body, count, s)
    with pytest.raises(streams.SpecError, match="are needed"):
        read(streams, encoder.sized(body)[:3], count, s)


def test_the_stream_encoder_of_the_tests_gives_the_bytes_made_by_hand() -> None:
    assert encoder.table([128, 128]) == HALVES[2:]
    assert encoder.table([1, 32767]) == UNEVEN[2:]
    assert encoder.table([255, 1]) == PAIRS[2:]
    for start, given, frequencies, precision in (
        ("without words", HALVES, [128, 128], 8),
        ("with a word", UNEVEN, [1, 32767], 15),
        ("by digits", PAIRS, encoder.products([255, 1, *[0] * 14], 16, 2, 8), 8),
    ):
        body, _, _, symbols = BY_HAND[start]
        states, words = encoder.coder(symbols, frequencies, precision)
        assert encoder.coded(given[0], precision, given[2:], states, words) == encoder.sized(body)


@pytest.mark.parametrize("count", [1, 5, 4095, 4096, 65535, 65536, 131071, 131072, 150_001])
@pytest.mark.parametrize(
    ("s", "mode"), [(256, encoder.CODED), (3, encoder.CODED), (3, encoder.BY_DIGITS), (16, encoder.BY_DIGITS)]
)
def test_the_reference_decodes_streams_of_every_number_of_lanes(
    streams: ModuleType, count: int, s: int, mode: int
) -> None:
    symbols = encoder.random_symbols(count, s ** encoder.digits_per_symbol(s), count)
    if mode == encoder.BY_DIGITS:
        symbols = encoder.join(encoder.random_symbols(count * encoder.digits_per_symbol(s), s, count), s)
    assert read(streams, encoder.stream(symbols, s, mode), count, s) == symbols


@pytest.mark.parametrize("s", [3, 4, 5, 6, 7, 9, 11, 13, 15, 16, 17, 32, 256])
def test_the_reference_decodes_digits_of_every_base(streams: ModuleType, s: int) -> None:
    for precision in (8, 12, 15):
        for count in (1, 2, 4, 5, 6, 499):
            digits = [(i * i) % min(s, 7) for i in range(count)]
            symbols = encoder.join(digits, s, s - 1)
            for mode in (encoder.RAW, encoder.CODED, *[encoder.BY_DIGITS] * (s <= 16 and precision > 8)):
                cursor = streams.Cursor(encoder.stream(symbols, s, mode, precision), "here")
                assert streams.digits(cursor, count, s).tolist() == digits


def test_products_of_frequencies_are_rounded_down_one_after_the_other(streams: ModuleType) -> None:
    """Of the digits 1, 2, 3, 3 the exact product, rounded once, would be another one; so would some in another order."""
    frequencies = [4008, 3576, 12831, 12353]
    of_symbols = encoder.products(frequencies, 4, 4, 15)
    symbols = list(range(256))
    body = encoder.coded(encoder.BY_DIGITS, 15, encoder.table(frequencies), *encoder.coder(symbols, of_symbols, 15))
    assert read(streams, body, 256, 4) == symbols
    exact = frequencies[1] * frequencies[2] * frequencies[3] ** 2 >> 45
    assert of_symbols[1 + 4 * 2 + 16 * 3 + 64 * 3] == exact - 1


BITS = encoder.bits_to_bytes
ONES = "1" * 15 + "0" + "0" * 7  # 128 after 0
WRONG_STREAMS = {
    "no byte at all": (b"", 4, 256, "are needed"),
    "symbols that are not there": (b"\0", 0, 256, "left over"),
    "an unknown mode": (b"\4\0\0\0\0", 4, 16, "unknown mode 4"),
    "by digits of one each": (b"\3" + HALVES[1:] + HALVES_STATES, 4, 32, "unknown mode 3"),
    "by digits of bytes": (b"\3" + HALVES[1:] + HALVES_STATES, 4, 256, "unknown mode 3"),
    "raw symbol": (b"\0\0\xf3\0", 3, 3, "symbol 243 is not below 243"),
    "raw symbol of 32": (b"\0\0\x20\0", 3, 32, "symbol 32 is not below 32"),
    "constant symbol": (b"\1\xf3", 3, 3, "symbol 243 is not below 243"),
    "two constant symbols": (b"\1\1\1", 3, 3, "left over"),
    "precision 7": (b"\2\7" + encoder.table([64, 64]) + HALVES_STATES, 4, 256, "precision 7"),
    "precision 16": (b"\2\x10" + encoder.table([2**15, 2**15]) + HALVES_STATES, 4, 256, "precision 16"),
    "sum above": (b"\2\x08" + encoder.table([128, 129]) + HALVES_STATES, 4, 256, "sum 257"),
    "sum above in one": (b"\2\x08" + encoder.table([257]) + HALVES_STATES, 4, 256, "sum 257"),
    "sum below": (b"\2\x08" + encoder.table([1, 1, *[0] * 30]) + HALVES_STATES, 4, 32, "sum 2"),
    "sum below by digits": (b"\3\x08" + encoder.table([1, 1, 253]) + HALVES_STATES, 4, 3, "sum 255"),
    "bits below 0": (b"\2\x08" + BITS("110" + ONES) + HALVES_STATES, 4, 256, "of -1 bits"),
    "bits below 0 later": (b"\2\x08" + BITS("1 0 1111 0".replace(" ", "")) + HALVES_STATES, 4, 256, "of -1 bits"),
    "bits above L + 1": (b"\2\x08" + BITS("1" * 19 + "0" + "0" * 9) + HALVES_STATES, 4, 256, "of 10 bits"),
    "padding that is not 0": (b"\2\x08" + bytes.fromhex("ff7f0080") + HALVES_STATES, 4, 256, "padding of the table"),
    "table cut": (b"\2\x08\xff", 4, 256, "are needed"),
    "symbol without place": (
        b"\3\x08"
        + encoder.table([234, 8, *[1] * 14])
        + HALVES_STATES,  # 213 for the first symbol, but 267 for the others
        4,
        16,
        "of symbols do not fit",
    ),
    "first state": (HALVES + b"\x81" + HALVES_STATES[1:], 4, 256, "does not end at"),
    "last state": (HALVES + HALVES_STATES[:-4] + b"\x81\0\2\0", 4, 256, "does not end at"),
    "state without a symbol": (HALVES + HALVES_STATES[:4] + b"\0\0\1\0" * 2 + b"\1\0\1\0", 1, 256, "does not end at"),
    "states cut": (HALVES + HALVES_STATES[:-1], 4, 256, "are needed"),
    "words missing": (UNEVEN + UNEVEN_STATES, 9, 256, "words are too few"),
    "word left over": (UNEVEN + UNEVEN_STATES + b"\0\x80\0\0", 9, 256, "words are left over"),
    "half a word": (UNEVEN + UNEVEN_STATES + b"\0\x80\0", 9, 256, "half a word"),
    "another word": (UNEVEN + UNEVEN_STATES + b"\1\x80", 9, 256, "does not end at"),
}


@pytest.mark.parametrize("name", WRONG_STREAMS)
def test_the_reference_refuses_wrong_streams(streams: ModuleType, name: str) -> None:
    body, count, s, message = WRONG_STREAMS[name]
    with pytest.raises(streams.SpecError, match=f"^here: stream: .*{message}"):
        read(streams, encoder.sized(body), count, s)


def test_words_of_a_stream_are_taken_in_the_order_of_symbols(streams: ModuleType) -> None:
    symbols = encoder.random_symbols(300, 256)
    frequencies = encoder.scaled(symbols, 256, 12)
    entries = encoder.table(encoder.without_end(frequencies))
    states, words = encoder.coder(symbols, frequencies, 12)
    assert read(streams, encoder.coded(encoder.CODED, 12, entries, states, words), 300) == symbols
    at = next(i for i in range(50, len(words)) if words[i] != words[i - 1])
    words[at - 1], words[at] = words[at], words[at - 1]
    with pytest.raises(streams.SpecError):
        read(streams, encoder.coded(encoder.CODED, 12, entries, states, words), 300)
