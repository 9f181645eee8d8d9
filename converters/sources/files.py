"""Files that tensors are read from, chunk by chunk and by several threads, without mapping them into memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qformat.container.index import MAX_ASSET_BYTES
from qformat.dtypes import DType, Elements
from qformat.errors import SourceError
from qformat.files import is_remote, open_regular, read_range, reading
from qformat.local_file import LocalFile
from qformat.pipeline.source import Checkpoint, SourceTensor

#: suffixes by which files with weights are found in a directory
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")


class Opener(Protocol):
    """Opens a file of weights."""

    def __call__(self, path: Path, *, shard: bool = True) -> Checkpoint:
        """Open a file, as one of several shards or by itself."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it does not contain a JSON object.
    """
    with open_regular(path) as file:
        data = file.read(MAX_ASSET_BYTES)
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004  like any other content
    return value


def missing(path: Path) -> SourceError:
    """Return the error for a file that is not there, or for a link to such a file."""
    if not is_remote(path) and path.is_symlink():
        return SourceError(f"{path}: is a link to {path.readlink()}, where there is no file; download it again")
    return SourceError(f"{path}: there is no such file or directory")


class SharedFile:
    """A file that is shared by its tensors, which must not be changed from the reading of its header on, when this is made.

    Raises `SourceError` if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._file = None if is_remote(path) else LocalFile(path, one_of_many=True)

    def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes at a position; raise `SourceError` if they cannot be read, or the file is shorter now."""
        data = np.empty(length, np.uint8).data  # unlike a bytearray, not zeroed first
        with reading(self.path):
            self._read_into(data, offset)
        return data

    def elements(self, dtype: DType, offset: int, elements: slice) -> Elements:
        """Return some elements of a tensor that begins at a position; raise `SourceError` if they cannot be read."""
        data = self.read(offset + elements.start * dtype.size, (elements.stop - elements.start) * dtype.size)
        return Elements(dtype, np.frombuffer(data, dtype.storage))

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        if self._file is None:
            data = read_range(self.path, offset, len(buffer))
            if len(data) < len(buffer):
                raise self._shorter()
            buffer[:] = data
            return
        count = self._file.read_into(buffer, offset)
        if count < len(buffer):
            raise self._shorter()
        if self._file.is_changed():
            raise SourceError(f"{self.path}: the file was changed while it was read; begin again")

    def _shorter(self) -> SourceError:
        return SourceError(f"{self.path}: the file became shorter while it was read")


@dataclass(frozen=True)
class FileTensor(SourceTensor):
    """A tensor whose elements are stored contiguously in a file, in row-major order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SharedFile
    offset: int
    kept: bool = False

    def read(self, elements: slice) -> Elements:
        """Read elements from the file."""
        return self.file.elements(self.dtype, self.offset, elements)
