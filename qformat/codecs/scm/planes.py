"""Chunks of `scm`: magnitudes of depth 0, and the sections of bits that refine them (spec/codecs.md, "`scm`")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Buffer
from qformat.codecs.scm.grid import (
    CLASSES,
    LARGEST,
    PARTS,
    PHASES,
    POSITIONS,
    Grid,
    part_sizes,
    planes,
)
from qformat.entropy.frequencies import digits, logarithms, symbols_each
from qformat.entropy.streams import StreamReader, StreamWriter, letter_count
from qformat.kernels import load

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

_SPARSE = 64  # a chunk is sparse if at least one of so many elements is zero
_MARK_SPARSE, _MARK_WIDE = 1, 2
_NARROW, _WIDE = 16, 256
_SCATTERED = 4096  # a chunk is wide if more than one of so many elements is elsewhere else
_END = struct.Struct("<H")


def padded(values: F32) -> F32:
    """Return one-dimensional values, filled up with zeros to whole blocks."""
    if values.size % 32 == 0:
        return values
    whole = np.zeros(-(-values.size // 32) * 32, np.float32)
    whole[: values.size] = values
    return whole


@dataclass
class Magnitudes:
    """The elements of a chunk that count, as magnitudes at some depth.

    Attributes
    ----------
    size
        How many there are.
    used
        For each element of the chunk whether it counts; None if all do.
    values
        The elements, filled up to whole blocks.
    numbers
        Their magnitudes.
    """

    size: int
    used: NDArray[np.bool_] | None
    values: F32
    numbers: U32

    @classmethod
    def of(cls, values: F32, grid: Grid, depth: int) -> Magnitudes:
        """Return those of finite values."""
        nonzero = values != 0
        count = int(np.count_nonzero(nonzero))
        used = nonzero if (values.size - count) * _SPARSE >= values.size else None
        size = values.size if used is None else count
        chosen = padded(values if used is None else values[used])
        numbers = np.empty(chosen.size, np.uint32)
        load("planes").quantize(chosen, grid.deepest_widths(depth), numbers)
        return cls(size, used, chosen, numbers)


def write_base(writer: StreamWriter, magnitudes: Magnitudes) -> None:
    """Write signs and magnitudes, which are those of depth 0; they have the sign as one bit more afterwards."""
    size, used = magnitudes.size, magnitudes.used
    phases = [_symbols(magnitudes, phase, _NARROW - 1) for phase in range(PHASES)]
    wide = sum(over for _, over in phases) * _SCATTERED > size
    if wide:
        phases = [_symbols(magnitudes, phase, _WIDE - 1) for phase in range(PHASES)]
    writer.add(bytes([_MARK_SPARSE * (used is not None) + _MARK_WIDE * wide]))
    if used is not None:
        writer.bits(np.packbits(used, bitorder="little"), used.size, size)
    if not size:
        return
    base = _WIDE if wide else _NARROW
    kernels, numbers = load("planes"), magnitudes.numbers
    kernels.append_signs(magnitudes.values, numbers)
    for phase, (symbols, over) in enumerate(phases):
        count = int(part_sizes(size)[phase].sum())
        if not count:
            continue
        writer.stream(_letters(symbols, count, base), base)
        if over:
            every = numbers.reshape(-1, 32)[phase::PHASES].reshape(-1)
            writer.add((every[symbols == base - 1] >> 1).astype("<u4").tobytes())
        where, counts = (phase, 0, PARTS), np.zeros((CLASSES, 2), np.int64)
        kernels.count_section(numbers, size, 0, *where, counts.reshape(-1))
        _write_section(writer, numbers, size, 0, where, counts)


def _symbols(magnitudes: Magnitudes, phase: int, limit: int) -> tuple[U8, int]:
    """Return the limited magnitudes of a phase, filled up with zeros to whole blocks, and how many of them are elsewhere."""
    blocks = (magnitudes.values.size // 32 + 1 - phase) // PHASES
    symbols = np.empty(32 * blocks, np.uint8)
    over = load("planes").symbols(magnitudes.numbers, magnitudes.size, phase, limit, symbols)
    return symbols, int(over)


def _letters(symbols: U8, count: int, base: int) -> U8:
    """Return the letters of so many symbols, after which there are zeros."""
    if base == _WIDE:
        return symbols[:count]
    letters, each = np.empty(letter_count(count, base), np.uint8), symbols_each(base)
    load("symbols").join(symbols[: each * letters.size], base, each, letters)
    return letters


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
    """Write the bits of some positions, of magnitudes at the deepest depth; `before` is what `bits_before` found."""
    for plane, first, stop in planes(start, end):
        counts = before[plane, stop] - before[plane, first]
        if counts.any():
            shift, where = deepest - plane // PHASES - 1, (plane % PHASES, first, stop)
            _write_section(writer, magnitudes.numbers, magnitudes.size, shift, where, counts)


def _write_section(
    writer: StreamWriter, numbers: U32, size: int, shift: int, where: tuple[int, int, int], found: I64
) -> None:
    """Write one bit of some numbers, the one that is lowest once they are shifted; by classes if that is shorter, by estimate.

    `found` says for each class how many of its bits are 0 and 1.
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
    """The elements of a chunk while layers are read.

    Every method raises ``ValueError`` if the bytes are none that an encoder can have written.

    Attributes
    ----------
    size
        How many elements count.
    used
        For each element of the chunk whether it counts; None if all do.
    numbers, signs
        As in `Magnitudes`.
    end
        Positions that were read.
    """

    size: int
    used: NDArray[np.bool_] | None
    numbers: U32
    signs: U8
    end: int = 0

    @classmethod
    def of(cls, chunks: Sequence[Buffer], elements: int) -> Decoder:
        """Return the elements of a chunk from its layers."""
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
            self.section(reader, (phase, first, stop), elements)
        self.end = end

    @classmethod
    def _base(cls, reader: StreamReader, elements: int) -> Decoder:
        mark = reader.number(1)
        if mark > _MARK_SPARSE + _MARK_WIDE:
            raise ValueError(f"a chunk is marked with {mark}")
        used, size = None, elements
        if mark & _MARK_SPARSE:
            bits = np.unpackbits(reader.stream(letter_count(elements, 2), 2), bitorder="little")
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
                decoder.section(reader, (phase, 0, PARTS), count)
        load("planes").detach_signs(numbers, decoder.signs)
        return decoder

    def section(self, reader: StreamReader, where: tuple[int, int, int], elements: int) -> None:
        """Read a section: a bit more for some magnitudes."""
        mark = reader.number(1)
        if mark > 1:
            raise ValueError(f"a section is marked with {mark}")
        if mark:
            self._refine_classes(reader, where)
            return
        bits = np.zeros(4 * -(-elements // 32), np.uint8)
        bits[: -(-elements // 8)] = reader.stream(letter_count(elements, 2), 2)
        load("planes").refine(bits, self.size, *where, self.numbers)

    def _refine_classes(self, reader: StreamReader, where: tuple[int, int, int]) -> None:
        kernels, counts = load("planes"), np.zeros(CLASSES, np.int64)
        kernels.count_classes(self.numbers, self.size, 0, *where, counts)
        streams = [reader.stream(letter_count(count, 2), 2) for count in counts.tolist()]
        lengths = np.array([stream.size for stream in streams])
        bits = np.concatenate([*streams, np.zeros(8, np.uint8)])  # kernels read 8 bytes at once
        kernels.refine_classes(bits, np.cumsum(lengths) - lengths, self.size, *where, self.numbers)

    def values(self, grid: Grid, out: F32) -> None:
        """Give the values of a whole chunk, flat."""
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
    """Return what a chunk of a layer begins with."""
    return _END.pack(position)


def _read_phase(reader: StreamReader, numbers: U32, phase: int, count: int, base: int) -> None:
    each = symbols_each(base)
    letters = reader.stream(letter_count(count, base), base)
    symbols = np.zeros(-(-count // 32) * 32, np.uint8)
    if each == 1:
        symbols[:count] = letters
    else:
        _split_narrow(letters, symbols[:count])
    over = np.flatnonzero(symbols[:count] == base - 1)
    load("planes").spread(symbols, phase, numbers)
    if over.size:
        elsewhere = np.frombuffer(reader.take(4 * over.size).tobytes(), "<u4")
        if elsewhere.max() >= LARGEST:
            raise ValueError("a magnitude is impossible")
        numbers[over // 32 * (32 * PHASES) + phase * 32 + over % 32] = elsewhere


def _split_narrow(letters: U8, symbols: U8) -> None:
    load("symbols").split(letters, digits(_NARROW).reshape(-1), symbols_each(_NARROW), symbols)
