"""The header of GGUF files, parsed without trusting it (docs/gguf.md of ggml describes the format), and written.

A file is a header (counts, key-value pairs, names, types and places of tensors), then the tensors' bytes, each at a multiple of the
alignment. `parse` reads the header only, and skips strings and arrays without decoding them.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple, NoReturn

from qformat.codecs.ggml import GGML_BLOCKS
from qformat.container.index import MAX_ASSET_BYTES, MAX_DIMENSIONS, MAX_INTEGER
from qformat.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
#: formats of `struct` for the types of scalar values
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMENSIONS = MAX_DIMENSIONS  # ggml has 4, but video models have more
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NESTING = 4
_READ = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<4sIQQ")
_KIND_AND_COUNT = struct.Struct("<IQ")
_TYPE_AND_OFFSET = struct.Struct("<IQ")


class TensorType(NamedTuple):
    """A tensor type: its name in lower case, and the elements and bytes of a block."""

    name: str
    block: int
    nbytes: int


def _types() -> dict[int, TensorType]:
    numbers = {
        "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q8_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 12,
        "q5_k": 13, "q6_k": 14, "q8_k": 15, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21,
        "iq2_s": 22, "iq4_xs": 23, "i8": 24, "i16": 25, "i32": 26, "i64": 27, "f64": 28, "iq1_m": 29, "bf16": 30, "tq1_0": 34,
        "tq2_0": 35, "mxfp4": 39, "nvfp4": 40, "q1_0": 41,
    }  # fmt: skip
    plain = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
    blocks = {"q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34)}
    sizes = {name: (1, size) for name, size in plain.items()} | blocks | GGML_BLOCKS
    return {number: TensorType(name, *sizes[name]) for name, number in numbers.items()}


#: by number
TYPES = _types()
TYPE_NUMBERS = {type_.name: number for number, type_ in TYPES.items()}


# Types that are not known here, and where their numbers are used
_UNKNOWN = {
    4: "q4_2, which ggml has removed", 5: "q4_3, which ggml has removed", 31: "q4_0_4_4, which llama.cpp has removed",
    32: "q4_0_4_8, which llama.cpp has removed", 33: "q4_0_8_8, which llama.cpp has removed",
    36: "iq4_nl_4_4, which llama.cpp has removed, or i2_s of bitnet.cpp", 37: "iq4_nl_4_8, which llama.cpp has removed",
    38: "iq4_nl_8_8, which llama.cpp has removed, or tl1 of bitnet.cpp", 42: "q2_0 of newer versions of llama.cpp",
}  # fmt: skip
_OF_IK_LLAMA = range(97, 512)
# Numbers that forks have given to other types
_CONTESTED = {39: "tl2 of bitnet.cpp", 40: "an older q1_0 of another fork", 41: "another type of a fork"}


def unknown_type(number: int) -> TensorType:
    """Return a type of which only the number is known."""
    return TensorType(str(number), 1, 0)


def type_number(name: str) -> int:
    """Return the number of a type, known or not."""
    return TYPE_NUMBERS[name] if name in TYPE_NUMBERS else int(name)


def describe_type(type_: TensorType) -> str:
    """Return words for a type that is not known."""
    number = int(type_.name)
    if number in _CONTESTED:
        return f"{number} with another size than that of {TYPES[number].name} ({_CONTESTED[number]}?)"
    words = _UNKNOWN.get(number) or ("a type of ik_llama.cpp" if number in _OF_IK_LLAMA else "unknown here")
    return f"{number} ({words})"


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a tensor in a header."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # the length of a row last
    offset: int  # of its data in the file
    at: int  # offset of its type and offset in the header
    size: int | None = None  # of its data, if the type does not say it

    @property
    def is_opaque(self) -> bool:
        """Whether the type is not known, so that its data are only bytes."""
        return self.type.name not in TYPE_NUMBERS

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        if self.size is not None:
            return self.size
        return self.elements // self.type.block * self.type.nbytes

    @property
    def stop(self) -> int:
        """Offset of the byte after the last."""
        return self.offset + self.nbytes


class Value(NamedTuple):
    """The type of a value, and its offset in the header."""

    kind: int
    at: int


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes
    ----------
    data
        Its bytes, up to the end of the last entry.
    values
        The place of each key's value.
    tensors
        The tensors in the order of their entries.
    alignment
        Of the offsets of tensors.
    pairs
        (start, stop) of each key and its value in the header.
    """

    data: bytes
    values: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    pairs: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def data_start(self) -> int:
        """Base of the offsets of tensors."""
        return align(len(self.data), self.alignment)

    def number(self, key: str) -> int | None:
        """Return the value of a key, if it is an integer."""
        value = self.values.get(key)
        code = SCALARS.get(value.kind) if value else None
        if value is None or code is None or code in "fd?":
            return None
        number: int = struct.unpack_from(f"<{code}", self.data, value.at)[0]
        return number

    def integers(self, key: str) -> tuple[int, ...] | None:
        """Return the value of a key, if it is an array of integers."""
        value = self.values.get(key)
        if value is None or value.kind != ARRAY:
            return None
        kind, count = _KIND_AND_COUNT.unpack_from(self.data, value.at)
        code = SCALARS.get(kind, "?")
        if code in "fd?":
            return None
        return struct.unpack_from(f"<{count}{code}", self.data, value.at + _KIND_AND_COUNT.size)

    def text(self, key: str) -> str:
        """Return the value of a key, if it is a string, or nothing."""
        value = self.values.get(key)
        if value is None or value.kind != STRING:
            return ""
        (length,) = _U64.unpack_from(self.data, value.at)
        return self.data[value.at + _U64.size :][:length].decode("utf-8", "replace")

    def gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of every range of a file of this size that belongs to no tensor; the first is the header."""
        at = 0
        for tensor in sorted(self.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.nbytes:
                if at < tensor.offset:
                    yield at, tensor.offset
                at = tensor.stop
        if at < size:
            yield at, size


def align(offset: int, alignment: int) -> int:
    """Round an offset up to a multiple of an alignment."""
    return -(-offset // alignment) * alignment


def parse(file: BinaryIO, size: int, label: str) -> Header:
    """Read the header of a file.

    Parameters
    ----------
    file
        Open, at its beginning; only the header is read, and a little more.
    size
        Its size in bytes.
    label
        Its name in messages.

    Raises
    ------
    SourceError
        If it is not a GGUF file of a known version, or cut short or damaged.
    """
    return _Parser(file, size, label).header()


def with_sizes(header: Header, size: int, label: str) -> Header:
    """Return a header in which tensors of unknown types have the bytes up to the next tensor, or the end of a file of this size.

    A number that forks use for other types is unknown if the size of ggml's type does not fit. Raises `SourceError` if tensors of
    unknown types overlap.
    """
    ordered = sorted(tensor.offset for tensor in header.tensors if tensor.elements)
    places = Counter(ordered)
    extents: dict[str, int] = {}
    for tensor in header.tensors:
        next_one = bisect_right(ordered, tensor.offset)
        end = ordered[next_one] if next_one < len(ordered) else max(size, tensor.offset)
        extents[tensor.name] = end - tensor.offset if tensor.elements else 0
    numbers = {tensor.name: TYPE_NUMBERS.get(tensor.type.name) for tensor in header.tensors}
    foreign = {
        numbers[tensor.name]
        for tensor in header.tensors
        if numbers[tensor.name] in _CONTESTED
        and tensor.elements
        and not tensor.nbytes <= extents[tensor.name] < tensor.nbytes + header.alignment
    }
    found = []
    for tensor in header.tensors:
        number = numbers[tensor.name]
        if number is not None and number in foreign:
            tensor = replace(tensor, type=unknown_type(number))  # noqa: PLW2901
        if tensor.is_opaque:
            if tensor.elements and tensor.offset >= size:
                raise SourceError(
                    f"{label}: tensor {tensor.name!r} would begin at byte {tensor.offset}, but the file has {size}: it is cut "
                    "short or damaged; get it again"
                )
            if places[tensor.offset] > 1:
                raise SourceError(
                    f"{label}: tensor {tensor.name!r} overlaps another; the file is damaged (at byte {tensor.offset})"
                )
            tensor = replace(tensor, size=extents[tensor.name])  # noqa: PLW2901
        found.append(tensor)
    return replace(header, tensors=tuple(found))


def check_layout(header: Header, size: int, label: str) -> None:
    """Raise `SourceError` if tensors are misaligned, overlap, or exceed a file of this size."""
    end = 0
    before = ""
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        where = f"{label}: tensor {tensor.name!r}"
        if (tensor.offset - header.data_start) % header.alignment:
            raise SourceError(f"{where} does not begin at a multiple of {header.alignment} (at byte {tensor.at})")
        if not tensor.nbytes:
            continue
        if tensor.stop > size:
            raise SourceError(
                f"{where} would end at byte {tensor.stop}, but the file has {size}: it is cut short or damaged; get it again"
            )
        if tensor.offset < end:
            raise SourceError(
                f"{where} overlaps tensor {before!r}; the file is damaged, or of a program with other types than llama.cpp "
                f"(at byte {tensor.offset})"
            )
        end, before = tensor.stop, tensor.name


class _Parser:
    """Goes through a header once. Every length and count is checked against the rest of the file before it is used."""

    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self._file = file
        self._size = size
        self._label = label
        self._data = bytearray()
        self._at = 0

    def header(self) -> Header:
        tensors, keys = self._counts()
        values: dict[str, Value] = {}
        pairs: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            start = self._at
            key = self._text("a key", _MAX_KEY_BYTES)
            if key in values:
                self._fail(f"duplicate key {key!r}", start)
            kind = self._unpack(_U32, "a key's type")[0]
            values[key] = Value(kind, self._at)
            self._skip(kind, f"key {key!r}")
            pairs[key] = start, self._at
        alignment = self._alignment(values)
        found = [self._tensor() for _ in range(tensors)]
        start = align(self._at, alignment)
        names: set[str] = set()
        for tensor in found:
            if tensor.name in names:
                self._fail(f"duplicate tensor name {tensor.name!r}", tensor.at)
            names.add(tensor.name)
        placed = tuple(replace(tensor, offset=start + tensor.offset) for tensor in found)
        self._load(0, self._at, "the header")
        return Header(bytes(self._data[: self._at]), values, placed, alignment, pairs)

    def _counts(self) -> tuple[int, int]:
        """Check magic and version, and return the numbers of tensors and keys."""
        if self._size < _COUNTS.size:
            self._fail("is cut short: it ends inside its header; get it again", self._size)
        magic, version, tensors, keys = self._unpack(_COUNTS, "the header")
        if magic != MAGIC:
            self._fail("is not a GGUF file", 0)
        if version not in VERSIONS:
            if version == 1:
                self._fail("is GGUF of version 1, which is too old; create it again with a newer tool", 4)
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (*VERSIONS, 1):
                self._fail("is a big-endian GGUF file, which is not supported; get the little-endian one", 4)
            self._fail(f"is GGUF of version {version}, which is not supported; use a newer qformat", 4)
        if tensors > _MAX_TENSORS:
            self._fail(f"claims {tensors} tensors, more than {_MAX_TENSORS}", 8)
        if keys > _MAX_KEYS:
            self._fail(f"claims {keys} keys, more than {_MAX_KEYS}", 16)
        return tensors, keys

    def _alignment(self, values: Mapping[str, Value]) -> int:
        value = values.get("general.alignment")
        if value is None:
            return DEFAULT_ALIGNMENT
        if value.kind != UINT32:
            self._fail("general.alignment is not an unsigned 32-bit integer", value.at)
        self._load(value.at, _U32.size, "general.alignment")
        alignment: int = _U32.unpack_from(self._data, value.at)[0]
        if not alignment or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment}, which is not a power of two", value.at)
        return alignment

    def _tensor(self) -> TensorInfo:
        """Read an entry; the offset stays relative."""
        start = self._at
        name = self._text("a tensor's name", _MAX_KEY_BYTES)
        dimensions = self._unpack(_U32, "a tensor's entry")[0]
        if dimensions > _MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}", start)
        shape = self._unpack(struct.Struct(f"<{dimensions}Q"), "a tensor's entry")[::-1]
        at = self._at
        number, offset = self._unpack(_TYPE_AND_OFFSET, "a tensor's entry")
        type_ = TYPES.get(number) or unknown_type(number)
        if max(shape, default=0) > MAX_INTEGER or math.prod(shape) > MAX_INTEGER or offset > MAX_INTEGER:
            self._fail(f"tensor {name!r} is larger than any file", start)
        row = shape[-1] if shape else 1
        if row % type_.block and number in _CONTESTED:
            type_ = unknown_type(number)
        elif row % type_.block:
            self._fail(
                f"tensor {name!r} has rows of {row} elements, not a multiple of the blocks of {type_.name}", start
            )
        return TensorInfo(name, type_, shape, offset, at)

    def _skip(self, kind: int, what: str, depth: int = 0) -> None:
        """Skip a value."""
        if kind in SCALARS:
            self._jump(1, struct.calcsize(f"<{SCALARS[kind]}"), what)
        elif kind == STRING:
            self._skip_strings(1, what)
        elif kind == ARRAY and depth < _MAX_NESTING:
            inner, count = self._unpack(_KIND_AND_COUNT, what)
            if inner in SCALARS:
                self._jump(count, struct.calcsize(f"<{SCALARS[inner]}"), what)
            elif inner == STRING:
                self._skip_strings(count, what)
            else:
                self._check(count * _KIND_AND_COUNT.size, what)
                for _ in range(count):
                    self._skip(inner, what, depth + 1)
        elif kind == ARRAY:
            self._fail(f"{what} is nested too deeply", self._at)
        else:
            self._fail(f"{what} is of unknown type {kind}", self._at)

    def _skip_strings(self, count: int, what: str) -> None:
        """Skip strings; vocabularies have hundreds of thousands, so that this loop takes most of the time."""
        self._check(count * _U64.size, what)
        data, unpack, at, loaded = self._data, _U64.unpack_from, self._at, len(self._data)
        for _ in range(count):
            if at + 8 > loaded:
                self._load(at, 8, what)
                loaded = len(data)
            at += 8 + unpack(data, at)[0]
        self._at = self._checked(at, what)

    def _jump(self, count: int, size: int, what: str) -> None:
        self._at = self._checked(self._at + count * size, what)

    def _text(self, what: str, longest: int) -> str:
        start = self._at
        length = self._unpack(_U64, what)[0]
        if length > longest:
            self._fail(f"{what} claims {length} bytes, more than {longest}", start)
        self._load(self._at, length, what)
        raw = bytes(self._data[self._at : self._at + length])
        self._at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not valid UTF-8", start)

    def _unpack(self, fields: struct.Struct, what: str) -> tuple[Any, ...]:
        self._load(self._at, fields.size, what)
        values = fields.unpack_from(self._data, self._at)
        self._at += fields.size
        return values

    def _check(self, length: int, what: str) -> None:
        """Refuse a value that exceeds the file."""
        self._checked(self._at + length, what)

    def _checked(self, stop: int, what: str) -> int:
        if stop > self._size:
            self._fail(f"is cut short or damaged: {what} would end at byte {stop} of {self._size}", self._at)
        if stop > MAX_ASSET_BYTES:
            self._fail(f"has a header of more than {MAX_ASSET_BYTES} bytes", self._at)
        return stop

    def _load(self, at: int, length: int, what: str) -> None:
        """Read up to some bytes of the header."""
        stop = at + length
        if stop <= len(self._data):
            return
        self._checked(stop, what)
        wanted = min(max(stop, len(self._data) + _READ, 2 * len(self._data)), self._size)
        while len(self._data) < wanted:
            part = self._file.read(wanted - len(self._data))
            if not part:
                self._fail("became shorter while it was read", len(self._data))
            self._data += part

    def _fail(self, cause: str, at: int) -> NoReturn:
        raise SourceError(f"{self._label}: {cause} (at byte {at})")


def encode(value: bool | float | str | Sequence[str] | Sequence[int]) -> bytes:
    """Return the value of a key, its type first: bool, uint32, float32 or string, or an array of strings or int32."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return _U32.pack(STRING) + _string(value)
    kind = INT32 if value and isinstance(value[0], int) else STRING
    items = [_string(item) if isinstance(item, str) else struct.pack("<i", item) for item in value]
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return _U64.pack(len(raw)) + raw


def build(values: Mapping[str, Any], tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """Return a header, of version 3.

    Parameters
    ----------
    values
        The value of each key.
    tensors
        (name, type, shape) of each, in the order of the file.
    """
    parts = [_COUNTS.pack(MAGIC, VERSIONS[-1], len(tensors), len(values))]
    parts += [_string(key) + encode(value) for key, value in values.items()]
    offset = 0
    for name, type_, shape in tensors:
        number = TYPE_NUMBERS[type_]
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dimensions, _TYPE_AND_OFFSET.pack(number, offset)]
        _, block, nbytes = TYPES[number]
        offset = align(offset + math.prod(shape) // block * nbytes, DEFAULT_ALIGNMENT)
    return b"".join(parts)
