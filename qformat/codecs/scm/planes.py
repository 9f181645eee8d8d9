"""Chunks of `scm`: magnitudes of depth 0, and the sections of bits that refine them (spec/codecs.md, "`scm`")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from qformat.codecs.layout import Buffer
from qformat.codecs.scm.grid import CLASSES, LARGEST, PARTS, PHASES, POSITIONS, Grid, part_sizes, planes
from qformat.entropy.frequencies import digit_table, digits_per_symbol, logarithms
from qformat.entropy.streams import StreamReader, StreamWriter, symbol_count
from qformat.kernels import load
from qformat.kernels.arrays import F32, I64, U8, U32, Bools

_SPARSE = 64  # a chunk is sparse if at least 1 in 64 elements is zero
_MARK_SPARSE, _MARK_WIDE = 1, 2
_NARROW, _WIDE = 16, 256
_SCATTERED = 4096  # a chunk is wide if more than 1 in 4096 elements would be elsewhere if it were narrow
_END = struct.Struct("<H")


def padded(values: F32) -> F32:
    """Return one-dimensional values, padded with zeros to whole blocks of 32."""
    if values.size % 32 == 0:
        return values
    whole = np.zeros(-(-values.size // 32) * 32, np.float32)
    whole[: values.size] = values
    return whole


@dataclass
class Magnitudes:
    """The elements of a chunk that are stored (all, or all but zeros), as magnitudes at some depth.

    Attributes
    ----------
    size
        The number of stored elements.
    used
        For each element of the chunk, flat, whether it is stored; None if all are.
    values
        The stored elements, float32, padded to whole blocks.
    numbers
        Their magnitudes.
    """

    size: int
    used: Bools | None
    values: F32
    numbers: U32

    @classmethod
    def of(cls, values: F32, grid: Grid, depth: int) -> Magnitudes:
        """Return the magnitudes of finite values, one-dimensional."""
        nonzero = values != 0
        count = int(np.count_nonzero(nonzero))
        used = nonzero if (values.size - count) * _SPARSE >= values.size else None
        size = values.size if used is None else count
        chosen = padded(values if used is None else values[used])
        numbers = np.empty(chosen.size, np.uint32)
        load("planes").quantize(chosen, grid.deepest_widths(depth), numbers)
        return cls(size, used, chosen, numbers)


def write_base(writer: StreamWriter, magnitudes: Magnitudes) -> None:
    """Write signs and magnitudes, which are those of depth 0. Afterwards the magnitudes have the sign as their lowest bit."""
    size, used = magnitudes.size, magnitudes.used
    phases = [_limited(magnitudes, phase, _NARROW - 1) for phase in range(PHASES)]
    wide = sum(over for _, over in phases) * _SCATTERED > size
    if wide:
        phases = [_limited(magnitudes, phase, _WIDE - 1) for phase in range(PHASES)]
    writer.add(bytes([_MARK_SPARSE * (used is not None) + _MARK_WIDE * wide]))
    if used is not None:
        writer.bits(np.packbits(used, bitorder="little"), used.size, size)
    if not size:
        return
    base = _WIDE if wide else _NARROW
    kernels, numbers = load("planes"), magnitudes.numbers
    kernels.append_signs(magnitudes.values, numbers)
    for phase, (digits, over) in enumerate(phases):
        count = int(part_sizes(size)[phase].sum())
        if not count:
            continue
        writer.stream(_joined(digits, count, base), base)
        if over:
            every = numbers.reshape(-1, 32)[phase::PHASES].reshape(-1)
            writer.add((every[digits == base - 1] >> 1).astype("<u4").tobytes())
        where, counts = (phase, 0, PARTS), np.zeros((CLASSES, 2), np.int64)
        kernels.count_section(numbers, size, 0, *where, counts.reshape(-1))
        _write_section(writer, numbers, size, 0, where, counts)


def _limited(magnitudes: Magnitudes, phase: int, limit: int) -> tuple[U8, int]:
    """Return the magnitudes of a phase, `limit` at most and padded to whole blocks, and how many of them reach it."""
    blocks = (magnitudes.values.size // 32 + 1 - phase) // PHASES
    digits = np.empty(32 * blocks, np.uint8)
    over = load("planes").limited(magnitudes.numbers, magnitudes.size, phase, limit, digits)
    return digits, int(over)


def _joined(digits: U8, count: int, base: int) -> U8:
    """Return the symbols of the first `count` digits, which zeros follow."""
    if base == _WIDE:
        return digits[:count]
    symbols, each = np.empty(symbol_count(count, base), np.uint8), digits_per_symbol(base)
    load("symbols").join(digits[: each * symbols.size], base, each, symbols)
    return symbols


def _sections(size: int, start: int, end: int) -> list[tuple[int, int, int, int, int]]:
    """Return (depth, phase, first part, part after the last, elements) of each section of a layer that has elements."""
    sizes, found = part_sizes(size), []
    for plane, first, stop in planes(start, end):
        elements = int(sizes[plane % PHASES, first:stop].sum())
        if elements:
            found.append((plane // PHASES + 1, plane % PHASES, first, stop, elements))
    return found


def write_sections(
    writer: StreamWriter, magnitudes: Magnitudes, deepest: int, start: int, end: int, before: I64
) -> None:
    """Write the bits of positions from `start` to before `end`, of magnitudes at depth `deepest`, with the counts `before`."""
    for plane, first, stop in planes(start, end):
        counts = before[plane, stop] - before[plane, first]
        if counts.any():
            shift, where = deepest - plane // PHASES - 1, (plane % PHASES, first, stop)
            _write_section(writer, magnitudes.numbers, magnitudes.size, shift, where, counts)


def _write_section(
    writer: StreamWriter, numbers: U32, size: int, shift: int, where: tuple[int, int, int], found: I64
) -> None:
    """Write bit `shift` of the magnitudes of a section, by classes if that is shorter by estimate.

    `found` has shape (3, 2): how many bits of each class are 0 and 1.
    """
    kernels = load("planes")
    by_class, together = load("estimates").section(found, logarithms())
    classes = [(zeros + ones, ones) for zeros, ones in found.tolist()]
    if by_class < together:
        # kernels write 8 bytes at once
        *starts, end = accumulate((-(-count // 8) + 8 for count, _ in classes), initial=0)
        bits = np.zeros(end, np.uint8)
        kernels.split_classes(numbers, size, shift, *where, np.array(starts), bits)
        writer.add(bytes([1]))
        for start, (count, ones) in zip(starts, classes, strict=True):
            writer.bits(bits[start : start - (-count // 8)], count, ones)
        return
    elements, set_ = map(sum, zip(*classes, strict=True))
    bits = np.empty(4 * -(-elements // 32), np.uint8)
    kernels.plane(numbers, size, shift, *where, bits)
    writer.add(bytes([0]))
    writer.bits(bits[: -(-elements // 8)], elements, set_)


@dataclass
class Decoder:
    """The stored elements of a chunk while its layers are read.

    Every method raises ``ValueError`` if no encoder can have written these bytes.

    Attributes
    ----------
    size, used, numbers
        As in `Magnitudes`.
    signs
        A bit for each element, 1 if it is negative, packed.
    end
        The number of positions read.
    """

    size: int
    used: Bools | None
    numbers: U32
    signs: U8
    end: int = 0

    @classmethod
    def of(cls, chunks: Sequence[Buffer], elements: int) -> Decoder:
        """Return the elements of a chunk of `elements` from its part of each layer read."""
        reader = StreamReader(chunks[0])
        end = _read_end(reader, 0)
        decoder = cls._base(reader, elements)
        decoder.refine(reader, end)
        reader.end(elements)
        for chunk in chunks[1:]:
            reader = StreamReader(chunk)
            decoder.refine(reader, _read_end(reader, decoder.end))
            reader.end(0)
        return decoder

    def refine(self, reader: StreamReader, end: int) -> None:
        """Read the bits up to a position."""
        for _, phase, first, stop, elements in _sections(self.size, self.end, end):
            self._section(reader, (phase, first, stop), elements)
        self.end = end

    @classmethod
    def _base(cls, reader: StreamReader, elements: int) -> Decoder:
        mark = reader.number(1)
        if mark > _MARK_SPARSE + _MARK_WIDE:
            raise ValueError(f"a chunk is marked with {mark}")
        used, size = None, elements
        if mark & _MARK_SPARSE:
            bits = np.unpackbits(reader.stream(symbol_count(elements, 2), 2), bitorder="little")
            used = bits[:elements].view(bool)
            size = int(np.count_nonzero(used))
        numbers = np.empty(-(-size // 32) * 32, np.uint32)
        if not size:
            return cls(size, used, numbers, np.zeros(0, np.uint8))
        base = _WIDE if mark & _MARK_WIDE else _NARROW
        decoder = cls(size, used, numbers, np.zeros(numbers.size // 8, np.uint8))
        for phase, count in enumerate(part_sizes(size).sum(axis=1).tolist()):
            if count:
                _read_phase(reader, numbers, phase, count, base)
                decoder._section(reader, (phase, 0, PARTS), count)
        load("planes").detach_signs(numbers, decoder.signs)
        return decoder

    def _section(self, reader: StreamReader, where: tuple[int, int, int], elements: int) -> None:
        """Read a section: one more bit of its magnitudes."""
        mark = reader.number(1)
        if mark > 1:
            raise ValueError(f"a section is marked with {mark}")
        if mark:
            self._refine_classes(reader, where)
            return
        bits = np.zeros(4 * -(-elements // 32), np.uint8)
        bits[: -(-elements // 8)] = reader.stream(symbol_count(elements, 2), 2)
        load("planes").refine(bits, self.size, *where, self.numbers)

    def _refine_classes(self, reader: StreamReader, where: tuple[int, int, int]) -> None:
        kernels, counts = load("planes"), np.zeros(CLASSES, np.int64)
        kernels.count_classes(self.numbers, self.size, 0, *where, counts)
        streams = [reader.stream(symbol_count(count, 2), 2) for count in counts.tolist()]
        lengths = np.array([stream.size for stream in streams])
        bits = np.concatenate([*streams, np.zeros(8, np.uint8)])  # kernels read 8 bytes at once
        kernels.refine_classes(bits, np.cumsum(lengths) - lengths, self.size, *where, self.numbers)

    def values(self, grid: Grid, out: F32) -> None:
        """Write the values of the whole chunk to `out`, float32, flat."""
        whole = self.used is None and out.size == self.numbers.size
        decoded = out if whole else np.empty(self.numbers.size, np.float32)
        load("planes").values(self.numbers, self.signs, self.end, grid.single_widths, grid.places, decoded)
        if self.used is not None:
            out[:] = 0
            out[self.used] = decoded[: self.size]
        elif not whole:
            out[:] = decoded[: self.size]


def _read_end(reader: StreamReader, start: int) -> int:
    end = reader.number(_END.size)
    if not start <= end <= POSITIONS:
        raise ValueError(f"a layer ends at position {end}")
    return end


def end_of(position: int) -> bytes:
    """Return the head of a chunk of a layer that ends at a position."""
    return _END.pack(position)


def _read_phase(reader: StreamReader, numbers: U32, phase: int, count: int, base: int) -> None:
    each = digits_per_symbol(base)
    symbols = reader.stream(symbol_count(count, base), base)
    digits = np.zeros(-(-count // 32) * 32, np.uint8)
    if each == 1:
        digits[:count] = symbols
    else:
        _split_narrow(symbols, digits[:count])
    over = np.flatnonzero(digits[:count] == base - 1)
    load("planes").spread(digits, phase, numbers)
    if over.size:
        elsewhere = np.frombuffer(reader.take(4 * over.size).tobytes(), "<u4")
        if elsewhere.max() >= LARGEST:
            raise ValueError("a magnitude is impossible")
        numbers[over // 32 * (32 * PHASES) + phase * 32 + over % 32] = elsewhere


def _split_narrow(symbols: U8, digits: U8) -> None:
    load("symbols").split(symbols, digit_table(_NARROW).reshape(-1), digits_per_symbol(_NARROW), digits)
