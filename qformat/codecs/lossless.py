"""Floats bit for bit, entropy-coded (spec/codecs.md, "`lossless`")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import ChunkEncoder, EncodedChunk
from qformat.codecs.layout import Buffer, Chunks, Layout, Matrix
from qformat.codecs.registry import register
from qformat.codecs.row_groups import VALUES, group_rows
from qformat.dtypes import DType, Elements
from qformat.entropy.streams import StreamReader, StreamWriter, symbol_count
from qformat.kernels import load

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]
Patterns = NDArray[Any]

_MOST_GROUPS = 16
_SPARSE = 64  # a group is sparse if at least one element in 64 is zero
_PLAIN = 2  # added to the mark of a group whose elements are stored byte by byte ...
_SCATTERED = 16  # ... because the heads of more than one element in 16 lie outside the 255 that have symbols
_ELSEWHERE = 255  # symbol of the other heads, which are stored in full


@register
@dataclass(frozen=True)
class Lossless(ChunkEncoder):
    """Floats bit for bit, in fewer bytes: exponents are entropy-coded, and mantissas as far as they are not random."""

    id: ClassVar[str] = "lossless"

    def decoded_from(self, dtype: DType) -> DType:
        """Return the dtype of the source."""
        return dtype

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether these are floats."""
        return dtype.floating

    def layout(self, matrix: Matrix) -> Layout:
        """Return the chunks."""
        return (Chunks(),)

    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Encode the rows of a chunk."""
        patterns = np.ascontiguousarray(elements.data).view(_unsigned(elements.data.dtype))
        groups, counts = group_rows(patterns, elements.dtype.exponent)
        writer = StreamWriter()
        writer.add(bytes([len(counts)]))
        if len(counts) > 1:
            writer.stream(groups)
        for number in range(len(counts)):
            rows = patterns if len(counts) == 1 else patterns[groups == number]
            _write_group(writer, rows.reshape(-1), counts[number], elements.dtype.exponent)
        return EncodedChunk((writer.chunk(patterns.size),), elements.all_finite(), entropy=writer.entropy)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the rows of a chunk."""
        reader = StreamReader(parts[0])
        patterns = out.view(_unsigned(out.dtype))
        exponent = 8 if out.dtype in (np.float32, np.uint16) else 0  # bfloat16 is held as uint16, binary16 is not
        count = reader.number(1)
        if not 1 <= count <= _MOST_GROUPS:
            raise ValueError(f"a chunk has {count} groups of rows")
        if count == 1:
            _read_group(reader, patterns.reshape(-1), exponent)
        else:
            groups = reader.stream(len(out))
            if groups.max() >= count:
                raise ValueError("a row is in a group that does not exist")
            for number in range(count):
                rows = np.flatnonzero(groups == number)
                values = np.empty((rows.size, out.shape[1]), patterns.dtype)
                _read_group(reader, values.reshape(-1), exponent)
                patterns[rows] = values
        reader.end(out.size)


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _write_group(writer: StreamWriter, patterns: Patterns, counts: I64, exponent: int) -> None:
    zeros = patterns.size - int(np.count_nonzero(patterns))
    sparse = zeros * _SPARSE >= patterns.size
    headed = exponent == 8
    if headed:
        if sparse:
            counts[0] -= zeros
        base, elsewhere = _base(counts)
        headed = elsewhere * _SCATTERED <= patterns.size
    writer.add(bytes([sparse + _PLAIN * (exponent == 8 and not headed)]))
    if sparse:
        used = patterns != 0
        writer.stream(np.packbits(used, bitorder="little"))
        patterns = patterns[used]
    if not patterns.size:
        return
    if headed:
        _write_headed(writer, patterns, base)
        return
    for part in _bytes(patterns):
        writer.stream(part)


def _base(counts: I64) -> tuple[int, int]:
    """Return the base of the 255 consecutive heads that occur most often, and the number of other heads."""
    reached = np.concatenate([[0], np.cumsum(np.concatenate([counts, counts[: _ELSEWHERE - 1]]))])
    fitting = reached[_ELSEWHERE:] - reached[:-_ELSEWHERE]
    return int(fitting.argmax()), int(reached[VALUES] - fitting.max())


def _read_group(reader: StreamReader, patterns: Patterns, exponent: int) -> None:
    if not patterns.size:
        return
    mark = reader.number(1)
    if mark > (1 + _PLAIN if exponent == 8 else 1):
        raise ValueError(f"a group of rows is marked with {mark}")
    if mark & _PLAIN:
        exponent = 0
    if not mark & 1:
        _read_parts(reader, patterns, exponent)
        return
    bits = np.unpackbits(reader.stream(-(-patterns.size // 8)), bitorder="little")
    if bits[patterns.size :].any():
        raise ValueError("elements are marked that do not exist")
    used = bits[: patterns.size].view(bool)
    values = np.empty(int(np.count_nonzero(used)), patterns.dtype)
    if values.size:
        _read_parts(reader, values, exponent)
    if not values.all():
        raise ValueError("an element that is marked as nonzero is zero")
    patterns[:] = 0
    patterns[used] = values


def _read_parts(reader: StreamReader, patterns: Patterns, exponent: int) -> None:
    if exponent == 8:
        _read_headed(reader, patterns)
    elif patterns.itemsize == 2:
        load("float_parts").join_16(*(reader.stream(patterns.size) for _ in range(2)), patterns)
    else:
        by_bytes = patterns.view(np.uint8).reshape(-1, patterns.itemsize)
        for place in range(patterns.itemsize - 1, -1, -1):
            by_bytes[:, place] = reader.stream(patterns.size)


def _bytes(patterns: Patterns) -> list[U8]:
    """Return the bytes of all elements by significance, the most significant first."""
    if patterns.itemsize == 2:
        second, first = (np.empty(patterns.size, np.uint8) for _ in range(2))
        load("float_parts").split_16(patterns, second, first)
        return [second, first]
    by_bytes = patterns.view(np.uint8).reshape(-1, patterns.itemsize)
    return [np.ascontiguousarray(by_bytes[:, place]) for place in range(patterns.itemsize - 1, -1, -1)]


def _write_headed(writer: StreamWriter, patterns: Patterns, base: int) -> None:
    """Write bfloat16 or binary32."""
    kernels, size = load("float_parts"), patterns.size
    upper: U16 = patterns
    rest: list[U8] = []
    if patterns.itemsize == 4:
        upper, rest = np.empty(size, np.uint16), [np.empty(size, np.uint8) for _ in range(2)]
        kernels.split_32(patterns, upper, *rest)
    heads, low, high = (np.zeros(symbol_count(size, symbols), np.uint8) for symbols in (256, 16, 4))
    elsewhere = kernels.split_upper(upper, base, heads, low, high)
    writer.add(struct.pack("<H", base))
    writer.stream(heads)
    if elsewhere:
        writer.add((upper[heads == _ELSEWHERE] >> 5 & (VALUES - 1)).astype("<u2").tobytes())
    writer.stream(low, 16)
    writer.stream(high, 4)
    for part in rest:
        writer.stream(part)


def _read_headed(reader: StreamReader, patterns: Patterns) -> None:
    """Read bfloat16 or binary32."""
    kernels, size = load("float_parts"), patterns.size
    base = reader.number(2)
    heads = reader.stream(size)
    elsewhere = np.frombuffer(reader.take(2 * int(np.count_nonzero(heads == _ELSEWHERE))).tobytes(), "<u2")
    if max(base, elsewhere.max(initial=0)) >= VALUES:
        raise ValueError("an exponent is impossible")
    low, high = (reader.stream(symbol_count(size, symbols), symbols) for symbols in (16, 4))
    upper: U16 = patterns if patterns.itemsize == 2 else np.empty(size, np.uint16)
    kernels.join_upper(heads, low, high, base, elsewhere, upper)
    if patterns.itemsize == 4:
        kernels.join_32(upper, reader.stream(size), reader.stream(size), patterns)
