"""The bytes of a file: mapped into memory if it has a path, or read range by range from an open file object."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from qformat.container.layout import align
from qformat.errors import FormatError
from qformat.files import open_regular
from qformat.records import Segment

_MOST_AT_ONCE = 1 << 30  # the system reads no more than 2 GiB in one call


class Access(Protocol):
    """Where the bytes of a container come from."""

    name: Path
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on; fewer than asked for at the end of the file."""

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments of one owner, in order."""

    def close(self) -> None:
        """Let the file go. Views of segments that are still in use stay valid."""


class MappedFile:
    """A file with a path. Segments are views of the mapping, without a copy."""

    def __init__(self, path: Path) -> None:
        self.name = path
        self._map: mmap.mmap | None = None
        self._file = open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # it could be opened
            self._file.close()

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on."""
        parts = []
        while length and (part := os.pread(self._file.fileno(), min(length, _MOST_AT_ONCE), offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        return [memoryview(self._map)[segment.offset : segment.stop] for segment in segments]

    def close(self) -> None:
        """Let the file go."""
        self._map = None
        self._file.close()


class RangedFile:
    """An open file object that can seek: no more is read of it than is needed, neighbouring segments at once.

    It is not closed, for it is not ours; it must not be used by others meanwhile.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name = Path(str(getattr(file, "name", None) or getattr(file, "path", None) or "the file"))
        self._file = file
        self._lock = threading.Lock()
        with self._lock:
            self.size = file.seek(0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on."""
        parts = []
        with self._lock:
            self._file.seek(offset)
            while length and (part := self._file.read(length)):
                parts.append(part)
                length -= len(part)
        return b"".join(parts)

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments."""
        found: list[memoryview] = []
        first = 0
        for last, segment in enumerate(segments):
            follows = last + 1 < len(segments) and segments[last + 1].offset == align(segment.stop)
            if not follows:
                found += self._span(segments[first : last + 1])
                first = last + 1
        return found

    def _span(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of segments that follow each other."""
        start, stop = segments[0].offset, segments[-1].stop
        data = memoryview(self.read(start, stop - start))
        if len(data) != stop - start:
            raise FormatError("the file became shorter while it was read", path=self.name, offset=start + len(data))
        return [data[segment.offset - start : segment.stop - start] for segment in segments]

    def close(self) -> None:
        """Do nothing."""
