"""GGUF files that llama.cpp's gguf-split has split: their parts, and the header of the file that they are parts of."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qformat.converters.sources.gguf_file import (
    MAGIC,
    VERSIONS,
    Header,
    align,
    check_layout,
    parse,
    type_number,
    with_sizes,
)
from qformat.errors import SourceError
from qformat.files import open_regular, reading

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_MOST_PARTS = 99_999


@dataclass(frozen=True)
class Part:
    """A GGUF file, whole or a part of a split one.

    Attributes
    ----------
    path
        The file.
    header
        Its header.
    size
        Its size in bytes.
    """

    path: Path
    header: Header
    size: int

    @property
    def number(self) -> int:
        """Its number among the parts, from 0."""
        return self.header.number(_NUMBER) or 0

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.header.number(_COUNT) or 1


def read_part(path: Path) -> Part:
    """Read the header of a file; raise `SourceError` if it cannot be read, or is cut short or damaged."""
    with reading(path), open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = with_sizes(parse(file, size, str(path)), size, str(path))
    check_layout(header, size, str(path))
    return Part(path, header, size)


def other_parts(part: Part) -> list[Part]:
    """Return the other parts of a split file, which are beside it; raise `SourceError` if one is missing, or of another file."""
    count = part.count
    if count <= 1:
        return []
    name = _NAME.fullmatch(part.path.name)
    if count > _MOST_PARTS or name is None or (int(name[2]), int(name[3])) != (part.number + 1, count):
        raise SourceError(
            f"{part.path}: is part {part.number + 1} of {count} of a split GGUF file, but its name does not say so, and the others "
            f"cannot be found; name the parts NAME-00001-of-{count:05}.gguf and so on"
        )
    others = []
    for number in range(count):
        if number == part.number:
            continue
        path = part.path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not path.exists():
            raise SourceError(
                f"{part.path}: {path.name}, another part of the split file, is missing beside it; get it as well"
            )
        other = read_part(path)
        if (other.number, other.count) != (number, count):
            raise SourceError(f"{path}: is not the part of {part.path.name} that its name says; get all parts again")
        others.append(other)
    total = sum(len(one.header.tensors) for one in (part, *others))
    expected = part.header.number(_TENSORS)
    if expected is not None and expected != total:
        raise SourceError(
            f"{part.path}: the parts hold {total} tensors, and should hold {expected}; get all parts again"
        )
    return others


def joined(parts: Sequence[Part]) -> tuple[Header, int]:
    """Return the header of the whole file and its size, as gguf-split would merge the parts, which are in order."""
    first = parts[0].header
    names: dict[str, Path] = {}
    for part in parts:
        for tensor in part.header.tensors:
            if tensor.name in names:
                raise SourceError(f"{part.path}: tensor {tensor.name!r} is in {names[tensor.name].name} too")
            names[tensor.name] = part.path
    pairs = [first.data[start:stop] for key, (start, stop) in first.pairs.items() if not key.startswith("split.")]
    tensors = [tensor for part in parts for tensor in part.header.tensors]
    head = struct.pack("<4sIQQ", MAGIC, VERSIONS[-1], len(tensors), len(pairs)) + b"".join(pairs)
    entries = []
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        entries.append(
            struct.pack("<Q", len(name))
            + name
            + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            + struct.pack("<IQ", type_number(tensor.type.name), offset)
        )
        offset = align(offset + tensor.nbytes, first.alignment)
    data = head + b"".join(entries)
    header = parse(io.BytesIO(data), len(data), str(parts[0].path))
    placed = tuple(replace(new, type=old.type, size=old.size) for new, old in zip(header.tensors, tensors, strict=True))
    return replace(header, tensors=placed), header.data_start + offset
