"""The bytes of a file: of one with a path, or of an open file object. They are copied into memory of this process, never mapped."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from qformat.container.layout import align
from qformat.errors import IntegrityError, SourceError
from qformat.files import as_path
from qformat.local_file import MOST_AT_ONCE, LocalFile
from qformat.locks import ForkLock
from qformat.records import Segment


class Access(Protocol):
    """Where the bytes of a container come from."""

    name: Path
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on; fewer than asked for at the end of the file."""

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on; raise `IntegrityError` if the file ends before."""

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments of one owner, in order; raise `IntegrityError` if the file ends before."""

    def is_changed(self) -> bool:
        """Return whether the file is known to have changed since it was opened."""

    def close(self) -> None:
        """Let the file go. The bytes of segments that are still in use stay valid."""


def open_access(path: str | bytes | os.PathLike[str] | BinaryIO, *, one_of_many: bool = False) -> Access:
    """Return the bytes of a file, or of an open file object; raise `TypeError` for anything else."""
    if isinstance(path, (str, os.PathLike)) or (isinstance(path, bytes) and b"\0" not in path):
        return PathFile(as_path(path), one_of_many=one_of_many)
    if isinstance(path, bytes) or not _can_be_read(path):  # bytes that are no path are the contents of a file
        raise TypeError(
            "give a path, or a binary file object that can be read and can seek, such as open(path, 'rb') or io.BytesIO(data); "
            f"this is {type(path).__module__}.{type(path).__qualname__}"
        )
    return RangedFile(path)


def _can_be_read(file: object) -> bool:
    """Return whether an object is an open binary file that can be read at any position."""
    if isinstance(file, (io.TextIOBase, mmap.mmap)) or not all(hasattr(file, name) for name in ("read", "seek")):
        return False
    if getattr(file, "closed", False):
        return True  # which the file says better itself
    return all(not hasattr(file, name) or getattr(file, name)() for name in ("readable", "seekable"))


class PathFile:
    """A file with a path; `one_of_many` is as in `LocalFile`."""

    def __init__(self, path: Path, *, one_of_many: bool = False) -> None:
        self.name = path
        self._file = LocalFile(path, one_of_many=one_of_many)
        self.size = self._file.size

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on."""
        return self._file.read(offset, length)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        done = self._file.read_into(buffer, offset)
        if done < len(buffer):
            raise _shorter(self.name, offset + done)

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments."""
        return [self._segment(segment) for segment in segments]

    def _segment(self, segment: Segment) -> memoryview:
        if segment.length > MOST_AT_ONCE:  # without joining parts, which would take twice the memory
            buffer = memoryview(bytearray(segment.length))
            self.fill(buffer, segment.offset)
            return buffer.toreadonly()
        data = self._file.read(segment.offset, segment.length)
        if len(data) < segment.length:
            raise _shorter(self.name, segment.offset + len(data))
        return memoryview(data)

    def is_changed(self) -> bool:
        """Return whether length or time of modification are others than when the file was opened."""
        return self._file.is_changed()

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


class RangedFile:
    """An open file object that can seek: no more is read of it than is needed, neighbouring segments at once.

    It is not closed, for it is not ours; it must not be used by others meanwhile. One of the system's own files is read by its
    descriptor, without moving its position, so that it can be used in forked processes as well.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name = Path(str(getattr(file, "name", None) or getattr(file, "path", None) or "the file"))
        self._file = file
        self._lock = ForkLock()
        self._process = os.getpid()
        with self._lock:
            self.size = file.seek(0, os.SEEK_END)
        self._by_descriptor = _is_plain(file)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on."""
        buffer = memoryview(bytearray(length))
        return bytes(buffer[: self._read_into(buffer, offset)])

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        done = self._read_into(buffer, offset)
        if done < len(buffer):
            raise _shorter(self.name, offset + done)

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        if self._by_descriptor:
            return self._read_by_descriptor(buffer, offset)
        if os.getpid() != self._process and not isinstance(self._file, io.BytesIO):
            raise SourceError(
                f"{self.name}: the open file belongs to another process, with which its position is shared; "
                "give the path, or open it again in this process"
            )
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(buffer) and (part := self._file.read(len(buffer) - done)):
                buffer[done : done + len(part)] = part
                done += len(part)
        return done

    def _read_by_descriptor(self, buffer: memoryview, offset: int) -> int:
        done, descriptor = 0, self._file.fileno()
        while done < len(buffer) and (
            part := os.pread(descriptor, min(len(buffer) - done, MOST_AT_ONCE), offset + done)
        ):
            buffer[done : done + len(part)] = part
            done += len(part)
        return done

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
        data = memoryview(bytearray(stop - start))
        self.fill(data, start)
        data = data.toreadonly()
        return [data[segment.offset - start : segment.stop - start] for segment in segments]

    def is_changed(self) -> bool:
        """Return that nothing is known."""
        return False

    def close(self) -> None:
        """Do nothing."""


def _is_plain(file: BinaryIO) -> bool:
    """Return whether a file object has the bytes of its descriptor; that of ``gzip``, for one, has others."""
    if isinstance(file, io.BufferedRandom):
        file.flush()
    raw = file.raw if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    return type(raw) is io.FileIO


def _shorter(path: Path, end: int) -> IntegrityError:
    return IntegrityError("the file became shorter while it was read", path=path, offset=end)
