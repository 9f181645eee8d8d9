"""Bit planes of magnitudes in numpy. Twin of ``numba/planes.py``, which documents it."""

from __future__ import annotations

import numpy as np

from qformat.kernels.arrays import F32, F64, I64, U8, U32, Bools

CLASSES = 3
CELLS = 4
DEEPEST = 8
LANES = 16


def _section(size: int, phase: int, first: int, stop: int) -> I64:
    """Return the numbers of the blocks of a section."""
    blocks = np.arange(phase, -(-size // 32), 2)
    unit = blocks // 2 % 32
    return blocks[(first <= unit) & (unit < stop)]


def _there(size: int, blocks: I64) -> Bools:
    """Return which elements of blocks are no padding."""
    return blocks[:, None] * 32 + np.arange(32) < size


def quantize(x: F32, widths: F64, t: U32) -> None:
    """Compute the magnitudes ``floor(|x| / width)``, with the width of the phase."""
    blocks = np.abs(x).astype(np.float64).reshape(-1, 32)
    t.reshape(-1, 32)[:] = blocks / widths[np.arange(len(blocks)) % 2][:, None]


def _halves(values: F32) -> tuple[F32, F32]:
    return values[:, :LANES], values[:, LANES:]


@np.errstate(over="ignore")
def measure(
    x: F32,
    t: U32,
    size: int,
    deepest: int,
    widths: F32,
    offsets: F32,
    scale: float,
    squares: F64,
    sums: F64,
    peaks: U32,
) -> None:
    """Sum up errors for each phase, part and depth from 0 to ``deepest``."""
    values, magnitudes = np.abs(x).reshape(-1, 32), t.reshape(-1, 32)
    number = np.arange(len(values))
    phase, kinds = number % 2, np.minimum(magnitudes >> np.uint32(deepest), CELLS - 1)
    cell = (phase * 32 + number // 2 % 32) * (DEEPEST + 1)
    there = _there(size, number)
    for depth in range(deepest + 1):
        place = phase * (DEEPEST + 1) + depth
        offset = offsets[(place * CELLS)[:, None] + kinds]
        parts = (magnitudes >> np.uint32(deepest - depth)).astype(np.float32)
        errors = np.abs(values - (parts + offset) * widths[place][:, None])
        errors[~there] = 0
        np.maximum.at(peaks.reshape(-1, LANES), cell + depth, np.maximum(*_halves(errors)).view(np.uint32))
        errors *= np.float32(scale)
        np.add.at(squares.reshape(-1, LANES), cell + depth, np.add(*_halves(errors * errors)))
        np.add.at(sums.reshape(-1, LANES), cell + depth, np.add(*_halves(errors)))


def limited(t: U32, size: int, phase: int, limit: int, chosen: U8) -> int:
    """Write the magnitudes of a phase as bytes, ``limit`` at most; return how many of them reach it."""
    blocks = _section(size, phase, 0, 32)
    values = np.minimum(t.reshape(-1, 32)[blocks], limit).reshape(-1)
    chosen[: values.size] = values
    return int(np.count_nonzero(values >= limit))


def plane(t: U32, size: int, shift: int, phase: int, first: int, stop: int, packed: U8) -> int:
    """Pack bit ``shift`` of each magnitude of a section, 32 to a word; return the number of words."""
    blocks = _section(size, phase, first, stop)
    bits = t.reshape(-1, 32)[blocks] >> np.uint32(shift) & 1
    packed[: 4 * blocks.size] = np.packbits(bits.astype(bool), bitorder="little")
    return blocks.size


def _elements(size: int, phase: int, first: int, stop: int) -> I64:
    """Return the numbers of the elements of a section."""
    blocks = _section(size, phase, first, stop)
    every = (blocks[:, None] * 32 + np.arange(32)).reshape(-1)
    return every[every < size]


def count_classes(t: U32, size: int, shift: int, phase: int, first: int, stop: int, counts: I64) -> None:
    """Count the elements of a section by the classes of their magnitudes, shifted."""
    values = t[_elements(size, phase, first, stop)] >> np.uint32(shift)
    counts += np.bincount(np.minimum(values, CLASSES - 1), minlength=CLASSES)


def count_bits(t: U32, size: int, deepest: int, counts: I64) -> None:
    """Count bits by depth, phase and part, by class of the magnitude above them and by value."""
    block = np.arange(size) // 32
    for depth in range(1, deepest + 1):
        values = t[:size] >> np.uint32(deepest - depth)
        kinds = np.minimum(values >> np.uint32(1), CLASSES - 1).astype(np.int64)
        cell = (((depth - 1) * 2 + block % 2) * 32 + block // 2 % 32) * CLASSES + kinds
        counts += np.bincount(2 * cell + (values & 1), minlength=counts.size)


def count_section(t: U32, size: int, shift: int, phase: int, first: int, stop: int, counts: I64) -> None:
    """Count the bits of a section by class of the magnitude above them and by value."""
    values = t[_elements(size, phase, first, stop)] >> np.uint32(shift)
    kinds = np.minimum(values >> np.uint32(1), CLASSES - 1).astype(np.int64)
    counts += np.bincount(2 * kinds + (values & 1), minlength=2 * CLASSES)


def split_classes(t: U32, size: int, shift: int, phase: int, first: int, stop: int, starts: I64, packed: U8) -> None:
    """Pack bit ``shift`` of each magnitude of a section, those of each class from its start on (in bytes)."""
    values = t[_elements(size, phase, first, stop)] >> np.uint32(shift)
    kinds = np.minimum(values >> np.uint32(1), CLASSES - 1)
    for kind in range(CLASSES):
        bits = np.packbits((values[kinds == kind] & 1).astype(bool), bitorder="little")
        packed[starts[kind] : starts[kind] + bits.size] = bits


def spread(chosen: U8, phase: int, t: U32) -> None:
    """Write magnitudes of a phase, padded to whole blocks, to their blocks."""
    t.reshape(-1, 32)[phase::2] = chosen.reshape(-1, 32)


def refine(packed: U8, size: int, phase: int, first: int, stop: int, t: U32) -> None:
    """Append a bit to each magnitude of a section, from whole words of 32."""
    blocks = _section(size, phase, first, stop)
    bits = np.unpackbits(packed, bitorder="little", count=32 * blocks.size).reshape(-1, 32)
    rows = t.reshape(-1, 32)
    rows[blocks] = rows[blocks] << np.uint32(1) | bits


def refine_classes(packed: U8, starts: I64, size: int, phase: int, first: int, stop: int, t: U32) -> None:
    """Do as `refine` with the bits of each class from its start on (in bytes)."""
    elements = _elements(size, phase, first, stop)
    values = t[elements]
    kinds, bits = np.minimum(values, CLASSES - 1), np.zeros(values.size, np.uint32)
    for kind in range(CLASSES):
        here = np.flatnonzero(kinds == kind)
        bits[here] = np.unpackbits(packed[starts[kind] :], bitorder="little", count=here.size)
    t[elements] = values << np.uint32(1) | bits


def append_signs(x: F32, t: U32) -> None:
    """Append to the magnitude of each element its sign as the lowest bit, 1 if it is negative."""
    t[:] = t << np.uint32(1) | np.signbit(x)


def detach_signs(joined: U32, packed: U8) -> None:
    """Do the opposite, in place."""
    packed[:] = np.packbits((joined & 1).astype(bool), bitorder="little")
    joined >>= np.uint32(1)


def _depths(blocks: int, end: int) -> I64:
    number = np.arange(blocks)
    return end // 64 + (end % 64 > number % 2 * 32 + number // 2 % 32)


def shallow(t: U32, end: int, deepest: int) -> None:
    """Reduce magnitudes at the deepest depth to those after ``end`` positions."""
    rows = t.reshape(-1, 32)
    rows >>= (deepest - _depths(len(rows), end)).astype(np.uint32)[:, None]


@np.errstate(over="ignore")
def values(t: U32, packed: U8, end: int, widths: F32, offsets: F32, decoded: F32) -> None:
    """Compute the values of magnitudes and signs after ``end`` positions."""
    rows = t.reshape(-1, 32)
    depth = _depths(len(rows), end)
    place = np.arange(len(rows)) % 2 * (DEEPEST + 1) + depth
    kinds = np.minimum(rows >> depth.astype(np.uint32)[:, None], CELLS - 1)
    found = (rows.astype(np.float32) + offsets[(place * CELLS)[:, None] + kinds]) * widths[place][:, None]
    negative = np.unpackbits(packed, bitorder="little", count=t.size).astype(np.uint32) << np.uint32(31)
    decoded.view(np.uint32)[:] = found.reshape(-1).view(np.uint32) | negative
