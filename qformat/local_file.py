"""Regular files that are read by position, into memory of this process.

Nothing is mapped: reading a mapped file that another process has cut short kills the process (SIGBUS), and what was checked in a
mapping may be something else when it is used. ``pread`` has no offset that threads and forked processes would share.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qformat.files import open_regular
from qformat.locks import ForkLock

# Shards and checkpoints of many files have more than a process may have open (256 on macOS, 1024 on Linux)
_MOST_OPEN = 32
#: bytes to read in one call, of which the system allows no more than 2 GiB
MOST_AT_ONCE = 1 << 30


class ReplacedError(OSError):
    """Another file has taken the place of one that is to be opened again."""


class _Descriptor:
    """An open file; it is closed with the last reference, so that a thread that reads from it keeps it."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        self.fd = self._file.fileno()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # it could be opened
            self._file.close()


class LocalFile:
    """A regular file, open for reading.

    Parameters
    ----------
    path
        The file.
    one_of_many
        Close it when others have been read since, and open it again for the next read, which raises `ReplacedError` if it is
        another file then.

    Attributes
    ----------
    path
        The file.
    size
        Its length in bytes when it was opened.

    Raises
    ------
    OSError
        If it cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path, *, one_of_many: bool = False) -> None:
        self.path = path
        self._closed = False
        self._pooled = one_of_many
        self._own: _Descriptor | None = None
        descriptor = _Descriptor(path)
        status = os.fstat(descriptor.fd)
        self.size = status.st_size
        self._modified = status.st_mtime_ns
        self._file = (status.st_dev, status.st_ino)
        if one_of_many:
            _pool.put(self, descriptor)
        else:
            self._own = descriptor

    def __del__(self) -> None:
        if getattr(self, "_pooled", False):
            _pool.drop(self)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on, fewer at the end of the file."""
        descriptor, parts = self._descriptor(), []
        with self._naming():  # one call is enough, but for more than MOST_AT_ONCE
            while length and (part := os.pread(descriptor.fd, min(length, MOST_AT_ONCE), offset)):
                parts.append(part)
                offset += len(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer of bytes with those from an offset on, and return their number, which is smaller at the end of the file."""
        descriptor, done = self._descriptor(), 0
        while done < len(buffer):
            part = buffer[done : done + MOST_AT_ONCE]
            with self._naming():
                count = os.preadv(descriptor.fd, [part], offset + done)
            if not count:
                break
            done += count
        return done

    def is_changed(self) -> bool:
        """Return whether the file has another length or time of modification than when it was opened."""
        descriptor = self._descriptor()
        with self._naming():
            status = os.fstat(descriptor.fd)
        return (status.st_size, status.st_mtime_ns) != (self.size, self._modified)

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._own = None
        if self._pooled:
            _pool.drop(self)

    def reopen(self) -> _Descriptor:
        """Open the file once more."""
        descriptor = _Descriptor(self.path)
        status = os.fstat(descriptor.fd)
        if (status.st_dev, status.st_ino) != self._file:
            raise ReplacedError(0, "was replaced by another file while it was read", str(self.path))
        return descriptor

    def _descriptor(self) -> _Descriptor:
        if self._closed:
            raise ValueError(f"{self.path}: is closed already")
        return self._own or _pool.get(self)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Give errors of the system the name of the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


class _Pool:
    """The descriptors of the files that are some of many, of which the least recently used are closed."""

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()  # by id of the file, which takes it out when it goes

    def put(self, file: LocalFile, descriptor: _Descriptor) -> None:
        """Take in a descriptor."""
        with self._lock:
            self._open[id(file)] = descriptor
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)

    def get(self, file: LocalFile) -> _Descriptor:
        """Return the descriptor of a file, which is opened again if need be."""
        with self._lock:
            descriptor = self._open.get(id(file))
            if descriptor:
                self._open.move_to_end(id(file))
                return descriptor
        descriptor = file.reopen()
        self.put(file, descriptor)
        return descriptor

    def drop(self, file: LocalFile) -> None:
        """Forget the descriptor of a file."""
        self._open.pop(id(file), None)


_pool = _Pool()
