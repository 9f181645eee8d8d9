"""A small scm encoder, written from the text of spec/codecs.md, and tensors made by hand."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.helpers.files import Draft
from tests.helpers.reference import reference
from tests.helpers.stream_encoder import CODED, CONSTANT, RAW, join, padded, stream

ZERO = "0.000000000e+00"
MANTISSA = {"f16": 10, "bf16": 7, "f32": 23}
BIAS = {"f16": 15, "bf16": 127, "f32": 127}
LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F, "f32": 0x7F7FFFFF}
SIGN = {"f16": 1 << 15, "bf16": 1 << 15, "f32": 1 << 31}
UNSIGNED = {"f16": "<u2", "bf16": "<u2", "f32": "<u4"}


@cache
def value(dtype: str, pattern: int) -> Fraction:
    """That of a pattern without its sign."""
    m = MANTISSA[dtype]
    exponent, mantissa = pattern >> m, pattern % (1 << m)
    scale: Fraction = Fraction(2) ** (max(exponent, 1) - BIAS[dtype] - m)
    return (mantissa + (1 << m if exponent else 0)) * scale


@cache
def largest_below(dtype: str, v: Fraction) -> int:
    """F before its lowest bits are left out."""
    return bisect_right(range(LARGEST[dtype] + 1), v, key=lambda pattern: value(dtype, pattern)) - 1


@dataclass
class Element:
    """An element of a chunk that counts."""

    dtype: str
    index: int
    pattern: int
    phase: int
    part: int
    step: Fraction
    depth: int = 0
    t: int = 0

    @property
    def magnitude(self) -> int:
        return self.pattern % SIGN[self.dtype]

    @property
    def negative(self) -> int:
        return self.pattern // SIGN[self.dtype]

    @property
    def width(self) -> Fraction:
        return self.step * Fraction(1, 2**self.depth)

    def refine(self) -> None:
        """Find the cell again."""
        self.t = int(value(self.dtype, self.magnitude) / self.width)


@dataclass
class Choices:
    """The choices that the specification leaves to an encoder."""

    steps: tuple[Fraction, Fraction]
    offsets: bytes = bytes([128] * 32)
    ends: Sequence[int] = (0,)
    sparse: bool = False
    wide: bool = False
    z: Sequence[int] | None = None  # of each row; None: not lossless
    modes: Callable[[], bool] = lambda: False  # whether to do otherwise than simplest


def any_stream(symbols: Sequence[int], s: int, choices: Choices) -> bytes:
    if symbols and len(set(symbols)) == 1 and not choices.modes():
        return stream(symbols, s, CONSTANT)
    return stream(symbols, s, CODED if choices.modes() and len(symbols) > 5 else RAW)


def bit_stream(bits: Sequence[int], choices: Choices) -> bytes:
    return any_stream(join(bits, 2, 1), 2, choices)


def encode_chunk(
    patterns: Sequence[int], dtype: str, choices: Choices
) -> tuple[list[bytes], list[list[tuple[int, Fraction, float]]]]:
    """The bytes of each layer, and of `rest`; and after each layer of each element cell, width and value."""
    counted = [i for i, pattern in enumerate(patterns) if pattern % SIGN[dtype] or not choices.sparse]
    elements = [
        Element(dtype, i, patterns[i], n // 32 % 2, n // 64 % 32, choices.steps[n // 32 % 2])
        for n, i in enumerate(counted)
    ]
    first = bytes([choices.sparse + 2 * choices.wide])
    if choices.sparse:
        first += bit_stream([int(pattern % SIGN[dtype] != 0) for pattern in patterns], choices)
    for phase in (0, 1):
        members = [element for element in elements if element.phase == phase]
        s = 256 if choices.wide else 16
        for element in members:
            element.refine()
        if members:
            first += any_stream(join([min(element.t, s - 1) for element in members], s), s, choices)
            first += b"".join(struct.pack("<I", element.t) for element in members if element.t >= s - 1)
            first += encode_section([(element.t, element.negative) for element in members], choices)
    contents, known, before = [], [], 0
    for layer, end in enumerate(choices.ends):
        content = struct.pack("<H", end) + first * (layer == 0)
        for _, run in groupby(range(before, end), key=lambda number: number // 32):
            content += encode_range([(number // 32 % 2, number % 32) for number in run], elements, choices)
        contents.append(padded(content, len(patterns)) if layer == 0 else content)
        known.append(decoded(elements, len(patterns), choices))
        before = end
    if choices.z is not None:
        contents.append(encode_rest(patterns, elements, dtype, choices))
    return contents, known


def encode_range(places: list[tuple[int, int]], elements: list[Element], choices: Choices) -> bytes:
    """The next bits of these phases and parts."""
    members = [element for element in elements if (element.phase, element.part) in places]
    before = [element.t for element in members]
    for element in members:
        element.depth += 1
        element.refine()
    bits = [element.t - 2 * t for element, t in zip(members, before, strict=True)]
    return encode_section(list(zip(before, bits, strict=True)), choices) if members else b""


def encode_section(pairs: list[tuple[int, int]], choices: Choices) -> bytes:
    """Of magnitudes and bits."""
    if not choices.modes():
        return b"\0" + bit_stream([bit for _, bit in pairs], choices)
    classes = [[bit for t, bit in pairs if min(t, 2) == which] for which in range(3)]
    return b"\1" + b"".join(bit_stream(bits, choices) for bits in classes)


def decoded(elements: list[Element], count: int, choices: Choices) -> list[tuple[int, Fraction, float]]:
    result = [(0, Fraction(0), 0.0)] * count
    for e in elements:
        place = 16 * e.phase + 4 * e.depth + min(e.t >> e.depth, 3)
        o = choices.offsets[place] if e.depth < 4 else 128
        with np.errstate(over="ignore"):
            magnitude = (np.float32(e.t) + np.float32(o / 256)) * np.float32(float(e.width))
        result[e.index] = (e.t, e.width, float(-magnitude if e.negative else magnitude))
    return result


def encode_rest(patterns: Sequence[int], elements: list[Element], dtype: str, choices: Choices) -> bytes:
    assert choices.z is not None
    content = any_stream(choices.z, 256, choices)
    counted = {element.index for element in elements}
    if choices.sparse:
        content += bit_stream([p // SIGN[dtype] for i, p in enumerate(patterns) if i not in counted], choices)
    parts = []
    for element in elements:
        z = choices.z[element.index * len(choices.z) // len(patterns)]
        assert element.magnitude % 2**z == 0
        p = element.magnitude >> z
        a, end = (largest_below(dtype, (element.t + i) * element.width) >> z for i in (0, 1))
        assert a <= p <= end
        b = (end - a).bit_length()
        y = max(0, b - 6)
        r = end - a
        which = r if r < 16 else {5: 16, 6: 17}.get(b, 18) + 3 * element.phase
        parts.append((which, y, (p >> y) - (a >> y), p % 2**y))
        assert r or parts[-1] == (0, 0, 0, 0)
    for which in range(1, 22):
        if upper := [part[2] for part in parts if part[0] == which]:
            content += any_stream(upper, 256, choices)
    for j in range(3):
        if lower := [part[3] >> 8 * j & 255 for part in parts if part[1] >= 8 * j + 8]:
            content += any_stream(lower, 256, choices)
    bits = [part[3] >> i & 1 for part in parts for i in range(part[1] // 8 * 8, part[1])]
    return content + (bit_stream(bits, choices) if bits else b"")


def grid(choices: Choices) -> bytes:
    return np.array([float(step) for step in choices.steps], "<f4").tobytes() + choices.offsets


def cut(chunks: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(chunks)}I", *map(len, chunks)) + b"".join(chunks)


@dataclass
class Case:
    """A tensor."""

    dtype: str
    shape: tuple[int, ...]
    params: dict[str, Any]
    segments: dict[str, bytes]
    measures: str = "1.000000000e+00"
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        measures = dict.fromkeys(["rmse", "max", "mean"], self.measures)
        self.record = {"params": self.params, "range": self.measures, "segments": [{"name": n} for n in self.segments]}
        for segment in self.record["segments"]:
            if segment["name"].startswith("layer."):
                segment["error"] = measures
        if self.params.get("lossless") is not True:
            self.record["error"] = {"rmse": self.measures, "max": self.measures}

    def with_segments(self, **segments: bytes) -> Case:
        """Other segments, `layer_1` being `layer.1`."""
        changed = {name.replace("_", "."): content for name, content in segments.items()}
        assert changed.keys() <= self.segments.keys()
        return Case(self.dtype, self.shape, self.params, self.segments | changed, self.measures)

    def draft(self) -> Draft:
        segments = [{**deepcopy(s), "bytes": self.segments[s["name"]]} for s in self.record["segments"]]
        others = {"name": "t", "shape": list(self.shape), "dtype": self.dtype, "codec": "scm"}
        return Draft(tensors=[{**deepcopy(self.record), **others, "segments": segments}])


def encode(chunks: Sequence[tuple[Sequence[int], Choices]], dtype: str, shape: tuple[int, ...]) -> tuple[Case, Any]:
    choices = chunks[0][1]
    made = [encode_chunk(patterns, dtype, c) for patterns, c in chunks]
    names = ["grid", *[f"layer.{k + 1}" for k in range(len(choices.ends))], *["rest"] * (choices.z is not None)]
    contents = [grid(choices), *[cut(column) for column in zip(*[contents for contents, _ in made], strict=True)]]
    params = {"layers": len(choices.ends), "lossless": choices.z is not None}
    known = [[cell for chunk in layer for cell in chunk] for layer in zip(*[k for _, k in made], strict=True)]
    return Case(dtype, shape, params, dict(zip(names, contents, strict=True))), known


def decode(case: Case, layers: int | None = None) -> Any:
    tensor = reference.Tensor("t", case.shape, case.dtype, "scm", case.record, tuple(case.segments.items()), "")
    return reference.decode(tensor, layers=layers)


def source(patterns: Sequence[int], dtype: str) -> np.ndarray:
    stored = np.array(patterns, UNSIGNED[dtype])
    if dtype == "bf16":
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.view("<f2" if dtype == "f16" else "<f4")


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, list[int], Choices, tuple[int, int]]:
    dtype = draw(st.sampled_from(sorted(MANTISSA)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.integers(-8, 8) if dtype == "f16" else st.integers(-100, 125))
    first, second = (
        min(Fraction(int(mantissa)) * Fraction(2) ** (exponent - 15 + int(more)), Fraction(2) ** 126)
        for mantissa, more in zip(rng.integers(2**15, 2**16, 2), rng.integers(0, 2, 2), strict=True)
    )
    steps = (first, second)
    shape = draw(st.sampled_from([(1, 1), (1, 2), (31, 1), (3, 11), (1, 64), (13, 5), (2, 65), (5, 40)]))
    count = shape[0] * shape[1]
    z = [int(rng.choice([0, 1, 3, MANTISSA[dtype] - 1, MANTISSA[dtype]])) for _ in range(shape[0])]
    if draw(st.booleans()):
        z = [0] * shape[0]
    # Magnitudes of all exponents, and such near the steps; the largest of all that are below 2^22 steps; zeros.
    top = largest_below(dtype, min(steps) * 2**22 - Fraction(1, 2**200))
    magnitudes = [int(magnitude) for magnitude in rng.integers(0, top, count, endpoint=True)]
    usual = [min(top, largest_below(dtype, min(steps) * Fraction(float(u)))) for u in rng.exponential(4, count)]
    special = [0, 1, 2 ** MANTISSA[dtype] - 1, 2 ** MANTISSA[dtype], top]
    kinds = rng.choice(3, count, p=draw(st.sampled_from([(0.1, 0.8, 0.1), (0.05, 0.05, 0.9), (1, 0, 0), (0, 1, 0)])))
    chosen = [
        (magnitudes[i], usual[i], special[int(rng.integers(5))] * int(rng.integers(2)))[kind]
        for i, kind in enumerate(kinds)
    ]
    chosen = [magnitude >> z[i // shape[1]] << z[i // shape[1]] for i, magnitude in enumerate(chosen)]
    patterns = [magnitude + SIGN[dtype] * int(rng.integers(2)) for magnitude in chosen]
    ends = sorted(draw(st.lists(st.integers(0, 512) | st.sampled_from([1, 31, 32, 33, 64]), min_size=1, max_size=6)))
    offsets = bytes([128] * 32) if draw(st.booleans()) else rng.bytes(32)
    otherwise = draw(st.sampled_from([0, 0.3, 1]))
    sparse, wide, lossless = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    modes = lambda: bool(rng.random() < otherwise)  # noqa: E731
    return dtype, patterns, Choices(steps, offsets, ends, sparse, wide, z if lossless else None, modes), shape


# Steps 1 and 2; o is 128 but for phase 0, depth 1, cell 1, where it is 64.
GRID = bytes.fromhex("0000803f 00000040") + bytes([*[128] * 5, 64, *[128] * 26])
# 1.25, -0.5, 20. Magnitudes 1, 0, elsewhere: symbols 0x01, 0x0f; 20; a section with the signs 0, 1, 0.
LAYER_1 = bytes.fromhex("0000 00 03000000 00 010f 14000000 00 020000000102")
# To position 0: cells half as wide; bits 0, 1, 0. Then to position 64, with three streams: magnitudes 2, 1, 40.
LAYER_2 = bytes.fromhex("0100 00 020000000102")
LAYER_3 = bytes.fromhex("4100 01 00000000 020000000100 020000000101")
# 1.25 is 0x3fa00000, and the cell from 1.25 to 1.5; -0.5 0xbf000000, from 0.5 to 0.75; 20 0x41a00000, from 20 to 20.25.
# z = 20: a is 0x3fa, 0x3f0, 0x41a; r, the class, is 2, 4, 0; upper parts 0, 0.
REST = bytes.fromhex("020000000114 020000000100 020000000100")
BY_HAND = Case(
    "f32",
    (3,),
    {"layers": 3, "lossless": True},
    {
        "grid": GRID,
        "layer.1": cut([LAYER_1]),
        "layer.2": cut([LAYER_2]),
        "layer.3": cut([LAYER_3]),
        "rest": cut([REST]),
    },
)


LOSSY = Case(
    "f32", (3,), {"layers": 2, "lossless": False}, {"grid": GRID, "layer.1": cut([LAYER_1]), "layer.2": cut([LAYER_2])}
)


# The same with zeros: 1.25, 0, -0, -0.5, 20, 0, 0, 0, -0. Bits 1, 0, 0, 1, 1, 0, 0, 0; 0: 0x19, 0x00.
SPARSE_1 = bytes.fromhex("0000 01 0300000000 1900") + LAYER_1[3:]
# z = 21, 0, 5 in the three rows. Signs 0, 1, 0, 0, 0, 1: 0x22. Cells are half as wide as the steps. F is 0x1fc and 0x1fe of
# 1.25, which is 0x1fd: class 2, upper part 1. Of -0.5 0x3f000000, which it is, and 0x3f800000: b = 24, y = 18. Of 20
# 0x41a00000, which it is, and 0x41a40000: b = 19, y = 13. Both are of class 18 with upper parts 0, 0; bits 0 to 7 of both, 8 to
# 15 of the first, 7 bits more, all 0.
SPARSE_REST = bytes.fromhex("0400000000150005 020000000122 020000000101") + bytes.fromhex("020000000100") * 4
SPARSE = Case(
    "f32",
    (3, 3),
    {"layers": 2, "lossless": True},
    {"grid": GRID, "layer.1": cut([SPARSE_1]), "layer.2": cut([LAYER_2]), "rest": cut([SPARSE_REST])},
)


# Segment, its one chunk (or all of it), old and new bytes, message.
WRONG: list[tuple[Case, str, bytes, str, str, str]] = [
    (BY_HAND, "layer.1", LAYER_1, "0000 00 03", "0102 00 03", "end 513 is not 0 to 512"),
    (BY_HAND, "layer.2", LAYER_2, "0100 00", "ffff 00", "end 65535 is not 0 to 512"),
    (BY_HAND, "layer.3", LAYER_3, "4100 01", "0000 01", "end 0 is not 1 to 512"),
    (BY_HAND, "layer.1", LAYER_1, "0000 00 03", "0000 04 03", "marked with 4"),
    (BY_HAND, "layer.1", LAYER_1, "0000 00 03", "0000 80 03", "marked with 128"),
    (BY_HAND, "layer.1", LAYER_1, "0000 00 03", "0000 02 03", "are needed"),  # wide, and one symbol too few
    (BY_HAND, "layer.1", LAYER_1, "0000 00 03", "0100 00 03", "are needed"),  # no section
    (BY_HAND, "layer.1", LAYER_1, "14000000", "00004000", "4194304 is not below"),
    (BY_HAND, "layer.1", LAYER_1, "14000000", "000000ff", "is not below"),
    (BY_HAND, "layer.1", LAYER_1, "14000000", "", "are needed"),
    (BY_HAND, "layer.1", LAYER_1, "14000000", "14000000 14000000", "section is marked with 20"),
    (BY_HAND, "layer.1", LAYER_1, "00 010f 14", "00 010e 14", "section is marked with 20"),
    (BY_HAND, "layer.1", LAYER_1, "00 020000000102", "01 020000000102", "are needed"),  # three streams
    (BY_HAND, "layer.1", LAYER_1, "00 020000000102", "01 020000000102 0000000000000000", "are needed"),
    (BY_HAND, "layer.1", LAYER_1, "00 020000000102", "02 020000000102", "section is marked with 2"),
    (BY_HAND, "layer.1", LAYER_1, "00 020000000102", "ff 020000000102", "section is marked with 255"),
    (BY_HAND, "layer.1", LAYER_1, "020000000102", "020000000102 00", "1 bytes are left over"),
    (BY_HAND, "layer.1", LAYER_1, "020000000102", "03000000010200", "left over"),
    (BY_HAND, "layer.2", LAYER_2, "0100 00", "0100 02", "section is marked with 2"),
    (BY_HAND, "layer.2", LAYER_2, "0100 00", "0100 01", "are needed"),
    (BY_HAND, "layer.2", LAYER_2, "020000000102", "020000000102 00", "1 bytes are left over"),
    (BY_HAND, "layer.2", LAYER_2, "020000000102", "", "are needed"),
    (BY_HAND, "layer.2", LAYER_2, "0100 00", "0000 00", "7 bytes are left over"),
    (BY_HAND, "layer.2", LAYER_2, "0100 00", "4100 00", "are needed"),  # only one of two sections
    (BY_HAND, "layer.3", LAYER_3, "4100 01", "4100 00", "are needed"),
    (BY_HAND, "layer.3", LAYER_3, "01 00000000 02", "01 02000000 0100 02", "left over"),  # a symbol of no element
    (BY_HAND, "layer.3", LAYER_3, "00000000 020000000100", "00000000 00000000", "are needed"),
    (BY_HAND, "rest", REST, "0114 02", "0118 02", "24 bits are left out, more than 23"),
    (BY_HAND, "rest", REST, "020000000100 020000000100", "020000000100", "are needed"),
    (BY_HAND, "rest", REST, "14 020000000100", "14 020000000100 020000000100", "left over"),
    (BY_HAND, "rest", REST, "14 020000000100", "17 020000000100", "left over"),
    (BY_HAND, "rest", REST, "020000000114", "03000000001414", "left over"),  # there is one row
    (BY_HAND, "rest", REST, "020000000114", "", "left over|are needed"),
    (SPARSE, "layer.1", SPARSE_1, "00 1900", "00 0900", "left over|unknown mode|are needed"),
    (SPARSE, "layer.1", SPARSE_1, "0300000000 1900", "02000000 0019", "are needed"),
    (SPARSE, "rest", SPARSE_REST, "00 150005", "00 180005", "24 bits are left out, more than 23"),
    (SPARSE, "rest", SPARSE_REST, "00 150005", "00 15ff05", "255 bits are left out, more than 23"),
    (SPARSE, "rest", SPARSE_REST, "00 150005", "00 150018", "24 bits are left out, more than 23"),  # of no element
    (SPARSE, "rest", SPARSE_REST, "0400000000 150005", "0300000000 1500", "are needed"),
    (SPARSE, "rest", SPARSE_REST, "020000000122", "", "are needed"),
    (SPARSE, "rest", SPARSE_REST, "020000000122", "00000000", "are needed"),
    (SPARSE, "rest", SPARSE_REST, "020000000122", "020000000122 020000000122", "left over"),
    (SPARSE, "rest", SPARSE_REST, "020000000101 020000000100 02", "020000000101 02", "are needed"),
]


def constant(*symbols: int) -> bytes:
    """Streams of one symbol each."""
    return b"".join(stream([symbol], 256, CONSTANT) for symbol in symbols)
