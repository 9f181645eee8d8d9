"""The reference reader's part for the layered codec `scm`, written from `codecs.md` alone.

`where`, also an attribute of cursors, is the beginning of error messages. Numbers in comments and docstrings are sections
of `codecs.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from reference_codecs import check_keys, get, raw_values, rows_cols, shaped
from reference_streams import DENSITY, Cursor, borders, chunks, digits, fail, symbols

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    Params = Mapping[str, object]
    Segments = Sequence[tuple[str, bytes]]
    Places = list[tuple[slice, slice]]
    Bools = npt.NDArray[np.bool_]
    Integers = npt.NDArray[np.int64]
    Float32 = npt.NDArray[np.float32]

LAYERED = ("scm",)  # the codecs that are layered
MAX_LAYERS = 64
PARTS = 32  # of each of the two phases (17.3)
MAX_END = 512  # 8 depths of 2 phases of 32 parts (17.4)
GRID_SIZE = 40
# The source dtypes: bytes of an element, bits of its mantissa, the pattern of its largest finite number.
DTYPES = {"f16": (2, 10, 0x7BFF), "bf16": (2, 7, 0x7F7F), "f32": (4, 23, 0x7F7FFFFF)}


@dataclass
class _Grid:
    """The steps of both phases, and o[phase, depth, cell] (17.2)."""

    steps: Float32
    offsets: Integers


@dataclass
class _Chunk:
    """A chunk after some layers. `coded` has an item for each element, the other arrays one for each coded element (17.3)."""

    rows: slice
    cols: slice
    sparse: bool
    coded: Bools
    phase: Integers
    part: Integers
    negative: Bools
    magnitude: Integers
    end: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    def depth(self) -> Integers:
        """Return the depth of each coded element: how many positions before the end are those of its part."""
        number = PARTS * self.phase + self.part  # number of the position that brings it to depth 1
        depth: Integers = np.maximum(0, -(-(self.end - number) // (2 * PARTS)))
        return depth


def layers_of(params: Params, where: str) -> list[str]:
    """Return the names of the segments that are layers."""
    number = get(params, "layers", int, where)
    if not 1 <= number <= MAX_LAYERS:
        fail(where, f"'layers' {number} is not 1 to {MAX_LAYERS}")
    return [f"layer.{k}" for k in range(1, number + 1)]


def decode(
    dtype: str, shape: tuple[int, ...], params: Params, segments: Segments, *, layers: int | None, where: str
) -> npt.NDArray[Any]:
    """Decode one tensor.

    Parameters
    ----------
    dtype, shape, params
        Of the tensor's record.
    segments : sequence of (str, bytes)
        Name and bytes of each segment.
    layers : int, optional
        Number of layers to decode, without later ones and `rest`. Default: everything.
    where : str
        Beginning of error messages.

    Returns
    -------
    numpy.ndarray
        The values in this shape: float32, or as the raw codec `dtype` decodes them if `rest` is decoded.

    Raises
    ------
    SpecError
        If the tensor is invalid.
    """
    if dtype not in DTYPES:
        fail(where, f"dtype {dtype} cannot be stored as scm")
    check_keys(params, ("layers", "lossless"), where)
    lossless = get(params, "lossless", bool, where)
    names = layers_of(params, where)
    if layers is not None and not 1 <= layers <= len(names):
        fail(where, f"there are {len(names)} layers, not {layers}")
    if [name for name, _ in segments] != ["grid", *names, *["rest"] * lossless]:
        fail(where, f"segments are {[name for name, _ in segments][:4]}, but the codec has others")
    wanted = names[:layers]
    with_rest = lossless and layers is None
    content = dict(segments)
    rows, cols = rows_cols(shape)
    if rows * cols == 0:  # 16: there are no chunks, and all segments are empty
        if any(content.values()):
            fail(where, "a segment is not empty, but there are no elements")
        none = _values_of(np.empty(0, np.int64), dtype, where) if with_rest else np.empty(0, np.float32)
        return shaped(none, shape, where)
    if rows * cols > DENSITY * len(content["layer.1"]):  # 16: before the result is allocated
        fail(where, f"{len(content['layer.1'])} bytes of layer.1 are too few for {rows * cols} elements")
    places = borders(rows, cols, 1)
    grid = _grid(content["grid"], where)

    known = [_first(row, col, cursor) for row, col, cursor in _cut(content, "layer.1", places, where)]
    for name in wanted[1:]:
        for (_, _, cursor), chunk in zip(_cut(content, name, places, where), known, strict=True):
            _sections(cursor, chunk)
    if not with_rest:
        values = np.empty((rows, cols), np.float32)
        for chunk in known:
            values[chunk.rows, chunk.cols] = _values(chunk, grid).reshape(chunk.shape)
        return shaped(values, shape, where)
    patterns = np.empty((rows, cols), np.int64)
    for (row, col, cursor), chunk in zip(_cut(content, "rest", places, where), known, strict=True):
        patterns[row, col] = _rest(cursor, chunk, grid, dtype).reshape(chunk.shape)
    return shaped(_values_of(patterns, dtype, where), shape, where)


def _cut(content: Mapping[str, bytes], name: str, places: Places, where: str) -> Iterator[tuple[slice, slice, Cursor]]:
    """Cut a segment that begins with the lengths of its chunks (16)."""
    segment = Cursor(content[name], f"{where}: {name}")
    lengths = segment.take(4 * len(places))
    return chunks(segment.rest, lengths, places, segment.where, padded=name == "layer.1")


def _values_of(patterns: Integers, dtype: str, where: str) -> npt.NDArray[Any]:
    """Return the values of these patterns, as the raw codec does."""
    stored: npt.NDArray[Any] = patterns.astype(f"<u{DTYPES[dtype][0]}")
    return raw_values(dtype, stored if dtype == "bf16" else stored.view(f"<f{DTYPES[dtype][0]}"), where)


def _grid(content: bytes, where: str) -> _Grid:
    if len(content) != GRID_SIZE:
        fail(where, f"the grid has {len(content)} bytes and not {GRID_SIZE}")
    patterns = np.frombuffer(content[:8], "<u4")
    steps = patterns.view("<f4").astype(np.float32)
    for pattern, step in zip(patterns.tolist(), steps.tolist(), strict=True):
        if pattern % 2**8 or not 2.0**-100 <= step <= 2.0**126:  # a NaN is neither
            fail(where, f"a step of {step} (pattern {pattern:#010x})")
    offsets = np.frombuffer(content[8:], np.uint8).astype(np.int64).reshape(2, 4, 4)
    return _Grid(steps, offsets)


# ---- layers


def _end(cursor: Cursor, before: int) -> int:
    end = cursor.number(2)
    if not before <= end <= MAX_END:
        fail(cursor.where, f"the end {end} is not {before} to {MAX_END}")
    return end


def _first(rows: slice, cols: slice, cursor: Cursor) -> _Chunk:
    """Read a chunk of the first layer (17.6)."""
    end = _end(cursor, 0)
    mark = cursor.number(1)
    if mark > 3:
        fail(cursor.where, f"a chunk is marked with {mark}")
    sparse, wide = mark % 2 == 1, mark >= 2
    count = (rows.stop - rows.start) * (cols.stop - cols.start)
    coded = digits(cursor, count, 2) == 1 if sparse else np.ones(count, np.bool_)
    number = np.arange(coded.sum())  # of coded elements
    block = number // 32
    magnitude, negative = np.zeros(len(number), np.int64), np.zeros(len(number), np.bool_)
    chunk = _Chunk(rows, cols, sparse, coded, block % 2, block // 2 % PARTS, negative, magnitude)
    if not len(number):
        chunk.end = end
        return chunk
    for phase in (0, 1):
        members = np.flatnonzero(chunk.phase == phase)
        if len(members):
            magnitude[members] = _magnitudes(cursor, len(members), 256 if wide else 16)
            negative[members] = _section(cursor, magnitude[members]) == 1
    _sections_to(end, cursor, chunk)
    return chunk


def _magnitudes(cursor: Cursor, count: int, s: int) -> Integers:
    """Read the magnitudes of one phase at depth 0 (17.6)."""
    magnitude = digits(cursor, count, s).astype(np.int64)
    escaped = magnitude == s - 1
    magnitude[escaped] = np.frombuffer(cursor.take(4 * int(escaped.sum())), "<u4")
    if magnitude.max() >= 2**22:
        fail(cursor.where, f"a magnitude of {magnitude.max()} is not below 2^22")
    return magnitude


def _sections(cursor: Cursor, chunk: _Chunk) -> None:
    """Read a chunk of a later layer (17.7)."""
    _sections_to(_end(cursor, chunk.end), cursor, chunk)


def _sections_to(end: int, cursor: Cursor, chunk: _Chunk) -> None:
    """Read the positions from the chunk's end so far to `end` (17.7)."""
    while chunk.end < end:
        start = chunk.end
        stop = min(end, (start // PARTS + 1) * PARTS)  # the phase changes at multiples of 32
        first, phase = start % PARTS, start // PARTS % 2
        parts = (chunk.part >= first) & (chunk.part < first + stop - start)
        members = np.flatnonzero(parts & (chunk.phase == phase))
        if len(members):
            before = chunk.magnitude[members]
            chunk.magnitude[members] = 2 * before + _section(cursor, before)
        chunk.end = stop


def _section(cursor: Cursor, before: Integers) -> Integers:
    """Read a section: a bit for each element; `before` has their magnitudes (17.5)."""
    mode = cursor.number(1)
    if mode == 0:
        return digits(cursor, len(before), 2).astype(np.int64)
    if mode != 1:
        fail(cursor.where, f"a section is marked with {mode}")
    bits = np.zeros(len(before), np.int64)
    for cell in range(3):
        members = np.flatnonzero(np.minimum(before, 2) == cell)
        bits[members] = digits(cursor, len(members), 2)
    return bits


# ---- values


def _values(chunk: _Chunk, grid: _Grid) -> Float32:
    """Return the values of all elements of a chunk (17.3)."""
    depth, t = chunk.depth(), chunk.magnitude
    cell = np.minimum(t >> depth, 3)
    o = np.where(depth < 4, grid.offsets[chunk.phase, np.minimum(depth, 3), cell], 128)
    width = grid.steps[chunk.phase] * np.exp2(-depth).astype(np.float32)  # exact: far from subnormal numbers
    place = t.astype(np.float32) + (o / 256).astype(np.float32)  # both are rounded: t, and the sum
    with np.errstate(over="ignore"):  # a product beyond binary32 rounds to an infinity
        magnitude = place * width
    values = np.zeros(len(chunk.coded), np.float32)
    values[chunk.coded] = np.where(chunk.negative, -magnitude, magnitude)
    return values


# ---- residual


def _floor(v: npt.NDArray[np.float64], dtype: str) -> Integers:
    """Return the pattern of the largest finite number of the dtype that is not above v ≥ 0."""
    short = np.float16 if dtype == "f16" else np.float32
    with np.errstate(over="ignore"):  # a too large v is rounded to an infinity, which is above v
        nearest = v.astype(short)
    pattern = nearest.view(f"u{nearest.itemsize}").astype(np.int64) - (nearest.astype(np.float64) > v)
    return pattern >> 16 if dtype == "bf16" else pattern


def _rest(cursor: Cursor, chunk: _Chunk, grid: _Grid, dtype: str) -> Integers:
    """Read a chunk of `rest`; return the patterns of all of its elements (17.8)."""
    size, mantissa, largest = DTYPES[dtype]
    sign = 1 << 8 * size - 1
    high, wide = chunk.shape
    z_of_row = symbols(cursor, high)
    if z_of_row.max() > mantissa:
        fail(cursor.where, f"{z_of_row.max()} bits are left out, more than {mantissa}")
    patterns = np.zeros(high * wide, np.int64)
    if chunk.sparse:
        others = np.flatnonzero(~chunk.coded)
        patterns[others] = sign * digits(cursor, len(others), 2).astype(np.int64)
    if not np.any(chunk.coded):
        return patterns

    t, z = chunk.magnitude, np.repeat(z_of_row, wide)[chunk.coded].astype(np.int64)
    width = grid.steps[chunk.phase].astype(np.float64) * np.exp2(-chunk.depth())
    a = _floor(t * width, dtype) >> z  # products of 31 and 16 bits are exact
    r = (_floor((t + 1) * width, dtype) >> z) - a
    b = np.frexp(r.astype(np.float64))[1]  # the number of bits
    y = np.maximum(0, b - 6)
    upper, lower = np.zeros(len(t), np.int64), np.zeros(len(t), np.int64)
    classes = np.where(r < 16, r, 16 + 3 * chunk.phase + np.minimum(b, 7) - 5)
    for which in range(1, 22):
        members = np.flatnonzero(classes == which)
        if len(members):
            upper[members] = symbols(cursor, len(members))
    for j in range(3):
        members = np.flatnonzero(y >= 8 * (j + 1))
        if len(members):
            lower[members] += symbols(cursor, len(members)).astype(np.int64) << 8 * j
    left = y % 8  # bits of each element beyond whole bytes
    if np.any(left):
        bits = np.unpackbits(symbols(cursor, -(-int(left.sum()) // 8)), bitorder="little")
        start = np.cumsum(left) - left
        for i in range(7):
            members = np.flatnonzero(left > i)
            lower[members] += bits[start[members] + i].astype(np.int64) << (y[members] // 8 * 8 + i)
    p = ((((a >> y) + upper) << y) + lower) << z
    if p.max() > largest:
        fail(cursor.where, f"the pattern {p.max():#x} is not that of a finite number")
    patterns[chunk.coded] = p + sign * chunk.negative
    return patterns
