"""The last layer of `scm`: the bits that planes leave open, which make floats exact (spec/codecs.md, "`scm`", `rest`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Buffer
from qformat.codecs.scm.grid import Grid
from qformat.codecs.scm.planes import Decoder, Magnitudes
from qformat.dtypes import BF16, F32, DType, Elements
from qformat.entropy.streams import StreamReader, StreamWriter
from qformat.kernels import load
from qformat.kernels.arrays import I64, U8, U32, Bools

_CLASSES, _LENGTHS = 22, 32
_KEPT = 6  # bits of upper parts
_BYTES = 3


def _kind(dtype: DType) -> int:
    """Return the kernels' number for a dtype."""
    return 4 if dtype is F32 else 1 if dtype is BF16 else 2


def _patterns(elements: Elements) -> tuple[U32, Bools]:
    """Return the patterns of magnitudes, and whether each element is negative."""
    bits = elements.data.view(f"u{elements.dtype.size}")
    sign = 8 * elements.dtype.size - 1
    patterns: U32 = (bits & bits.dtype.type((1 << sign) - 1)).astype(np.uint32)
    return patterns, bits >> bits.dtype.type(sign) != 0


def precision_of(elements: Elements) -> int:
    """Return the bits of mantissa in use: those from the highest to the lowest one that is set in any element."""
    used = int(np.bitwise_or.reduce(elements.data.view(f"u{elements.dtype.size}"), axis=None))
    lowest = (used & -used).bit_length() - 1
    return max(0, elements.dtype.mantissa - lowest) if used else 0


def _shifts(patterns: U32, dtype: DType) -> U8:
    """Return for each row how many of the lowest bits are 0 in all its patterns, at most all of the mantissa."""
    used = np.bitwise_or.reduce(patterns, axis=1)
    lowest = used & (~used + np.uint32(1))
    lengths = np.frexp(lowest.astype(np.float64))[1] - 1  # of a power of 2, or -1
    return np.where(used > 0, np.minimum(lengths, dtype.mantissa), 0).astype(np.uint8)


def _by_element(shifts: U8, cols: int, used: Bools | None) -> U8:
    """Return the shift of each stored element; one number if all are the same."""
    if (shifts == shifts[0]).all():
        return shifts[:1]
    every = np.repeat(shifts, cols)
    return every if used is None else every[used]


def write_residual(writer: StreamWriter, elements: Elements, magnitudes: Magnitudes, end: int, grid: Grid) -> None:
    """Write the bits of a matrix that are left open after `end` positions; the magnitudes are those after them."""
    patterns, negative = _patterns(elements)
    used = magnitudes.used
    shifts = _shifts(patterns, elements.dtype)
    writer.stream(shifts)
    flat = patterns.reshape(-1)
    if used is not None:
        negative, flat = negative.reshape(-1)[~used], flat[used]
        writer.bits(np.packbits(negative, bitorder="little"), negative.size, int(np.count_nonzero(negative)))
    if not flat.size:
        return
    kernels = load("residual")
    by_element = _by_element(shifts, patterns.shape[1], used)
    where = magnitudes.numbers, by_element, magnitudes.size, end, grid.widths, _kind(elements.dtype)
    upper, lower = np.empty(flat.size, np.uint8), np.empty((_BYTES, flat.size + 1), np.uint8)
    classes, counts = np.zeros(_CLASSES, np.int64), np.zeros(_BYTES, np.int64)
    middle = np.empty(flat.size * 7 // 8 + 9, np.uint8)
    bits = kernels.split(flat, *where, upper, classes, lower, counts, middle)
    stops = np.cumsum(classes)
    for class_ in np.flatnonzero(classes).tolist():
        if class_:
            writer.stream(upper[stops[class_] - classes[class_] : stops[class_]])
    for byte, count in enumerate(counts.tolist()):
        if count:
            writer.stream(lower[byte, :count])
    if bits:
        writer.stream(middle[: -(-bits // 8)])


def read_residual(chunk: Buffer, decoder: Decoder, grid: Grid, dtype: DType, out: NDArray[np.generic]) -> None:
    """Write the elements of a whole chunk to `out`, a matrix of its dtype.

    Raises
    ------
    ValueError
        If no encoder can have written these bytes.
    """
    reader, used, size = StreamReader(chunk), decoder.used, decoder.size
    shifts = reader.stream(len(out))
    if shifts.max() > dtype.mantissa:
        raise ValueError("more bits are left out of patterns than they have")
    zeros = np.zeros(0, bool)
    if used is not None:
        count = out.size - size
        bits = np.unpackbits(reader.stream(-(-count // 8), 2), bitorder="little")
        zeros = bits[:count].view(bool)
    patterns = np.zeros(size, np.uint32)
    if size:
        _read_patterns(reader, decoder, grid, dtype, _by_element(shifts, out.shape[1], used), patterns)
    reader.end(0)
    sign = np.uint32(8 * dtype.size - 1)
    patterns |= np.unpackbits(decoder.signs, count=size, bitorder="little").astype(np.uint32) << sign
    target = out.view(f"u{dtype.size}").reshape(-1)
    if used is None:
        target[:] = patterns
        return
    target[used] = patterns
    target[~used] = zeros.astype(target.dtype) << target.dtype.type(sign)


def _read_patterns(reader: StreamReader, decoder: Decoder, grid: Grid, dtype: DType, shifts: U8, patterns: U32) -> None:
    kernels, size = load("residual"), decoder.size
    where = decoder.numbers, shifts, size, decoder.end, grid.widths, _kind(dtype)
    classes, lengths = np.zeros(_CLASSES, np.int64), np.zeros(_LENGTHS, np.int64)
    kernels.count(*where, classes, lengths)
    upper = [
        reader.stream(int(count)) if class_ else np.zeros(count, np.uint8)
        for class_, count in enumerate(classes)
        if count
    ]
    low = _low_bits()
    lower = np.zeros((_BYTES, size + 1), np.uint8)
    for byte in range(_BYTES):
        count = int(lengths[low >= 8 * (byte + 1)].sum())
        if count:
            lower[byte, :count] = reader.stream(count)
    middle = np.zeros(_middle_bytes(lengths) + 8, np.uint8)
    if middle.size > 8:
        middle[:-8] = reader.stream(middle.size - 8)
    found = np.empty(-(-size // 32) * 32, np.uint32)
    kernels.join(*where, _starts(classes), np.concatenate(upper), lower, middle, found)
    patterns[:] = found[:size]
    infinity = ((1 << dtype.exponent) - 1) << dtype.mantissa
    if patterns.max() >= infinity:
        raise ValueError("an element is not finite")


def _starts(classes: I64) -> I64:
    """Return where the upper parts of each class begin."""
    starts: I64 = np.cumsum(classes) - classes
    return starts


def _low_bits() -> I64:
    """Return how many bits are below the upper part, by the number of open bits."""
    return np.maximum(np.arange(_LENGTHS) - _KEPT, 0)


def _middle_bytes(lengths: I64) -> int:
    """Return the bytes of the bits between upper parts and whole bytes."""
    return -(-int((lengths * (_low_bits() % 8)).sum()) // 8)
