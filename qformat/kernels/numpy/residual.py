"""The bits of floats that planes leave open, in numpy. Twin of ``numba/residual.py``, which documents it."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F64, I64, U8, U32

KEPT = 6
CLASSES = 22
FEW = 16
LARGEST = 0x7F7FFFFF


@np.errstate(over="ignore")
def _floor(values: F64, kind: int) -> I64:
    """Return the patterns of the largest finite floats not above float64 numbers, which are not negative."""
    singles = values.astype(np.float32)
    patterns = singles.view(np.uint32).astype(np.int64) - (singles.astype(np.float64) > values)
    patterns = np.minimum(patterns, LARGEST)
    if kind == 4:
        return patterns
    if kind == 1:
        return patterns >> 16
    small = (np.minimum(values, 1.0) * 16777216.0).astype(np.int64)
    return np.where(patterns < 0x38800000, small, np.minimum((patterns >> 13) - 0x1C000, 0x7BFF))


def _cells(t: U32, shifts: U8, size: int, end: int, widths: F64, kind: int) -> tuple[I64, I64, I64]:
    """Return for each element the first pattern of its cell, how many bits that leaves open, and its class."""
    block = np.arange(size) // 32
    phase = block % 2
    width = widths[phase * 9 + end // 64 + (end % 64 > phase * 32 + block // 2 % 32)]
    magnitude = t[:size].astype(np.float64)
    first = _floor(magnitude * width, kind) >> shifts
    spread = (_floor((magnitude + 1) * width, kind) >> shifts) - first
    length = np.frexp(spread.astype(np.float64))[1].astype(np.int64)
    return first, length, np.where(spread < FEW, spread, FEW + 3 * phase + np.minimum(length, KEPT + 1) - 5)


def count(t: U32, shifts: U8, size: int, end: int, widths: F64, kind: int, classes: I64, lengths: I64) -> None:
    """Count elements by class, and by the number of bits that their cell leaves open."""
    _, length, class_ = _cells(t, shifts, size, end, widths, kind)
    classes += np.bincount(class_, minlength=CLASSES)
    lengths += np.bincount(length, minlength=32)


def _order(class_: I64, starts: I64) -> I64:
    """Return the place of each element's upper part."""
    counts = np.bincount(class_, minlength=CLASSES)
    order = np.argsort(class_, kind="stable")
    places = np.empty(order.size, np.int64)
    places[order] = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts - starts, counts)
    return places


def _bits_between(low: I64) -> tuple[I64, I64]:
    """Return for each bit of the string between its element and its number in that."""
    between = low % 8
    element = np.repeat(np.arange(low.size), between)
    number = np.arange(element.size) - np.repeat(np.cumsum(between) - between, between)
    return element, number + (low - between)[element]


def split(
    patterns: U32,
    t: U32,
    shifts: U8,
    size: int,
    end: int,
    widths: F64,
    kind: int,
    upper: U8,
    classes: I64,
    lower: U8,
    counts: I64,
    middle: U8,
) -> int:
    """Cut the patterns of magnitudes, shifted, into parts; return the number of bits between upper parts and whole bytes."""
    first, length, class_ = _cells(t, shifts, size, end, widths, kind)
    pattern = patterns[:size].astype(np.int64) >> shifts
    low = np.maximum(length - KEPT, 0)
    upper[:] = ((pattern >> low) - (first >> low))[np.argsort(class_, kind="stable")]
    classes += np.bincount(class_, minlength=CLASSES)
    for byte in range(len(lower)):
        chosen = pattern[low >= 8 * (byte + 1)] >> 8 * byte & 255
        lower[byte, : chosen.size] = chosen
        counts[byte] = chosen.size
    element, number = _bits_between(low)
    bits = np.packbits((pattern[element] >> number & 1).astype(bool), bitorder="little")
    middle[: bits.size] = bits
    return element.size


def join(
    t: U32,
    shifts: U8,
    size: int,
    end: int,
    widths: F64,
    kind: int,
    starts: I64,
    upper: U8,
    lower: U8,
    middle: U8,
    patterns: U32,
) -> None:
    """Put patterns together again from the results of `split`."""
    first, length, class_ = _cells(t, shifts, size, end, widths, kind)
    low = np.maximum(length - KEPT, 0)
    found = (first >> low) + upper[_order(class_, starts)] << low
    starts += np.bincount(class_, minlength=CLASSES)
    for byte in range(len(lower)):
        chosen = np.flatnonzero(low >= 8 * (byte + 1))
        found[chosen] |= lower[byte, : chosen.size].astype(np.int64) << 8 * byte
    element, number = _bits_between(low)
    bits = np.unpackbits(middle, bitorder="little", count=element.size).astype(np.int64)
    np.bitwise_or.at(found, element, bits << number)
    patterns[:size] = np.minimum(found << shifts, 0xFFFFFFFF).astype(np.uint32)
