"""CTranslate2's ``model.bin``: format version, kind of model, variables, and aliases of variables.

The layout follows the loader of CTranslate2 (``src/models/model.cc``), versions 4 to 6: integers are little-endian; a string is its
length (16 bits) and its bytes, of which the last is a NUL.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import BinaryIO

from qformat.converters.sources.files import FileTensor, SharedFile
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.files import open_regular, reading
from qformat.pipeline.source import Checkpoint

_VERSIONS = range(4, 7)
_DTYPES = tuple(DTYPES[name] for name in ("f32", "i8", "i16", "i32", "f16", "bf16"))  # by their numbers in the file
_MAX_DIMENSIONS = 16


class _Reader:
    """Reads everything but the data of variables."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        self.offset = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self._file.seek(self.offset)
        data = self._file.read(count)
        if len(data) < count:
            raise SourceError(f"it ends at byte {self.size}, in the middle of a field; download it again")
        self.offset += count
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        at = self.offset
        data = self.take(self.number(2))
        try:
            if data[-1:] != b"\0":
                raise ValueError
            return data[:-1].decode()
        except ValueError:
            raise SourceError(f"no valid string at byte {at}: the file is damaged") from None


def is_ctranslate2(start: bytes, path: Path) -> bool:
    """Return whether a file that begins so is one of CTranslate2."""
    del path
    name = start[6 : 6 + int.from_bytes(start[4:6], "little")]
    return start[:4] in [version.to_bytes(4, "little") for version in range(2, 100)] and name.endswith(b"Spec\0")


def open_ctranslate2(path: Path) -> Checkpoint:
    """Return the checkpoint in a file. A variable with several names is stored once; the metadata lists its ``aliases``.

    Raises `SourceError` if it cannot be read, is damaged, or of an unknown version.
    """
    try:
        with reading(path), open_regular(path) as file:
            tensors, aliases = _parse(_Reader(file), SharedFile(path))
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    warnings = []
    if aliases:
        name, same = next(iter(aliases.items()))
        warnings.append(
            f"{path.name}: {name!r} is an alias of {same!r}{and_more(aliases)}; stored once, the aliases in the metadata"
        )
    scaled = [tensor.name for tensor in tensors if tensor.name.endswith("weight_scale")]
    if scaled:
        warnings.append(
            f"{path.name}: {len(scaled)} matrices of integers are kept as they are, with scales such as {scaled[0]!r}"
        )
    metadata = {"aliases": json.dumps(aliases, sort_keys=True)} if aliases else {}
    return Checkpoint(tensors, warnings=warnings, files=[path], metadata=metadata)


def _parse(reader: _Reader, shared: SharedFile) -> tuple[list[FileTensor], dict[str, str]]:
    version = reader.number(4)
    kind, _ = reader.string(), reader.number(4)
    if version not in _VERSIONS:
        raise SourceError(
            f"{kind} in version {version} of CTranslate2's format cannot be read, only {_VERSIONS[0]} to {_VERSIONS[-1]}"
        )
    found: dict[str, FileTensor] = {}
    for _ in range(reader.number(4)):
        variable = _variable(reader, shared)
        if variable.name in found:
            raise SourceError(f"duplicate variable {variable.name!r}: the file is damaged")
        found[variable.name] = variable
    aliases = {}
    for _ in range(reader.number(4)):
        name, same = reader.string(), reader.string()
        if same not in found or name in found or name in aliases:
            raise SourceError(f"invalid alias {name!r} of {same!r}: the file is damaged")
        aliases[name] = same
    if reader.offset != reader.size:
        raise SourceError(f"{reader.size - reader.offset} bytes too many at its end: the file is damaged")
    return list(found.values()), aliases


def _variable(reader: _Reader, shared: SharedFile) -> FileTensor:
    name = reader.string()
    rank = reader.number(1)
    if rank > _MAX_DIMENSIONS:
        raise SourceError(f"variable {name!r} has {rank} dimensions: the file is damaged")
    shape = tuple(reader.number(4) for _ in range(rank))
    kind, size = reader.number(1), reader.number(4)
    if kind >= len(_DTYPES):
        raise SourceError(f"variable {name!r} is of unknown dtype number {kind}")
    dtype, offset = _DTYPES[kind], reader.offset
    if size != dtype.size * math.prod(shape) or size > reader.size - offset:
        raise SourceError(f"variable {name!r} of {size} bytes does not match its shape, or is cut short")
    reader.offset += size
    return FileTensor(name, dtype, shape, shared, offset)
