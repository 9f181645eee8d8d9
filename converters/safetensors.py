"""Read tensors of a .safetensors file piece by piece, without mapping it into memory.

The library that the format comes from checks the file; its numpy flavour cannot read bfloat16 and gives whole tensors only, so the
bytes are read here.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from qformat.dtypes import DTYPES, DType, Elements
from qformat.errors import SourceError

_DTYPES = {
    "BOOL": "bool",
    "F8_E4M3": "f8_e4m3",
    "F8_E5M2": "f8_e5m2",
    "BF16": "bf16",
} | {name.upper(): name for name in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f16", "f32", "f64")}

_MAX_HEADER = 100_000_000  # the library's own limit


class _SharedFile:
    """A file opened when it is first read, and read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._fd: int | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self._lock:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise SourceError(f"{self.path}: the file became shorter while it was read")
            buffer = buffer[count:]
            offset += count

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a .safetensors file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: _SharedFile
    offset: int

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        data = np.empty(elements.stop - elements.start, self.dtype.storage)
        try:
            self.file.read_into(data.view(np.uint8).data, self.offset + elements.start * self.dtype.size)
        except OSError as error:
            raise SourceError(f"{self.file.path}: cannot be read: {error.strerror}") from None
        return Elements(self.dtype, data)


def open_safetensors(path: Path) -> list[SafetensorsTensor]:
    """Return the tensors of a .safetensors file.

    Raises
    ------
    SourceError
        If it is missing, cut short, damaged, or holds a dtype that cannot be stored.
    """
    _check(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    shared = _SharedFile(path)
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise SourceError(f"{path}: tensor {name!r} is of dtype {entry['dtype']}, which cannot be stored")
        dtype = DTYPES[_DTYPES[entry["dtype"]]]
        tensors.append(
            SafetensorsTensor(name, dtype, tuple(entry["shape"]), shared, 8 + length + entry["data_offsets"][0])
        )
    return tensors


def _check(path: Path) -> None:
    """Let the library check header, offsets and length."""
    if not path.is_file():
        raise SourceError(f"{path}: is not a file")
    try:
        size = path.stat().st_size
        if size == 0:
            raise SourceError(f"{path}: the file is empty; download it again")
        with safe_open(path, framework="np"):
            return
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        expected = _announced_size(path)
        if expected > size:
            raise SourceError(
                f"{path}: is cut short: it has {size} bytes of at least {expected}; download it again"
            ) from None
        if 0 < expected < size:
            raise SourceError(
                f"{path}: does not have the length that its header says, {expected} bytes, but {size}; download it again"
            ) from None
        raise SourceError(f"{path}: not a valid safetensors file: {error}") from None


def _announced_size(path: Path) -> int:
    """Return how long a file should be, going by as much of its header as is there, or 0 if the header makes no sense."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8).ljust(8, b"\0"), "little")
        if length > _MAX_HEADER:
            return 0
        header = file.read(length)
    if len(header) < length or not header:
        return 8 + max(length, 2)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return 8 + length + max([0, *map(int, ends)])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0
