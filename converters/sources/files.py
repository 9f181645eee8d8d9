"""Files that tensors are read from, chunk by chunk and by several threads, without mapping them into memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qformat.container.index import MAX_ASSET_BYTES
from qformat.dtypes import DType, Elements
from qformat.errors import SourceError
from qformat.files import is_remote, open_regular, read_range
from qformat.pipeline.source import SourceTensor


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it holds none.
    """
    with open_regular(path) as file:
        data = file.read(MAX_ASSET_BYTES)
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004  like all else that is wrong with it
    return value


class SharedFile:
    """A file that is opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._fd: int | None = None

    def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes at a position.

        Raises
        ------
        SourceError
            If they cannot be read, or are no longer there.
        """
        data = np.empty(length, np.uint8).data  # which is not zeroed first
        try:
            self._read_into(data, offset)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from None
        return data

    def elements(self, dtype: DType, offset: int, elements: slice) -> Elements:
        """Return some elements of a tensor that begins at a position.

        Raises
        ------
        SourceError
            If they cannot be read.
        """
        data = self.read(offset + elements.start * dtype.size, (elements.stop - elements.start) * dtype.size)
        return Elements(dtype, np.frombuffer(data, dtype.storage))

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        if is_remote(self.path):
            data = read_range(self.path, offset, len(buffer))
            if len(data) < len(buffer):
                raise self._shorter()
            buffer[:] = data
            return
        with self._lock:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise self._shorter()
            buffer = buffer[count:]
            offset += count

    def _shorter(self) -> SourceError:
        return SourceError(f"{self.path}: the file became shorter while it was read")

    # The function is kept, as modules go before the last objects do
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd is not None:
            close(self._fd)


@dataclass(frozen=True)
class FileTensor(SourceTensor):
    """A tensor whose elements stand in a file as they are, one after the other."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SharedFile
    offset: int

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        return self.file.elements(self.dtype, self.offset, elements)
