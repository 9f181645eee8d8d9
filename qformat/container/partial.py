"""One file of a workspace while it is written: its bytes, and the journal of its complete assets and tensors.

The journal is a file of lines: the first holds the fingerprint of the file, then comes one for each asset and tensor, written after
all of its bytes. Each line begins with a digest of its JSON. Nothing in a journal is trusted before the bytes have been compared
with their digests.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qformat.container.index import parse_asset, parse_tensor
from qformat.container.target import suffixed
from qformat.errors import FormatError, TargetError
from qformat.records import AssetRecord, TensorRecord

Record = AssetRecord | TensorRecord

_SYNC_EVERY = 32 << 20
_READ = 1 << 20
_JOURNAL = ".journal"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def writing_failed(label: Path, error: OSError, *, kept: bool) -> TargetError:
    """Return the error to raise for one of the operating system; `kept` says whether the work so far stays for ``--resume``."""
    if isinstance(error, TargetError):
        return error
    cause = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would be larger than the allowed file size",
    }.get(error.errno or 0, error.strerror)
    left = "the finished tensors are kept for --resume" if kept else "nothing was left there"
    return TargetError(f"{label}: writing failed: {cause}; {left}")


def take_lock(fd: int, label: Path) -> None:
    """Lock an open file until it is closed; raise `TargetError` if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetError(f"{label}: another process is writing it; wait for it to end") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some network file systems have no locks
            raise


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; raise `OSError` if that fails."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[written:], offset + written


class NullTarget:
    """Stands in for a `PartialFile` in a dry run, where only the number of bytes counts."""

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class PartialFile:
    """A file in a workspace, opened for writing at any offset; what an earlier run has written stays.

    A context manager: the file is synced when the block ends without an exception.

    Parameters
    ----------
    path
        The file.
    label
        The final path, for messages.
    kept
        Whether it stays for a later run if this one fails, for messages.

    Raises
    ------
    TargetError
        If it cannot be opened, or another process is writing it.
    """

    def __init__(self, path: Path, label: Path, *, kept: bool = False) -> None:
        self._label, self._kept = label, kept
        try:
            self._fd = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise writing_failed(label, error, kept=kept) from None
        try:
            take_lock(self._fd, label)  # the job of a cluster may run twice, if its first worker only seems to be lost
        except OSError as error:
            os.close(self._fd)
            raise writing_failed(label, error, kept=kept) from None
        except BaseException:
            os.close(self._fd)
            raise
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="qformat-sync")
        self._sync: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`; raise `TargetError` if the disk is full or the write fails otherwise."""
        try:
            write_all(self._fd, data, offset)
            self._unsynced += len(data)
            if self._unsynced >= _SYNC_EVERY:
                self._start_sync()
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._kept) from None

    def _start_sync(self) -> None:
        """Sync in the background while more is encoded, so that little is left to wait for in the end."""
        if self._sync is not None:
            if not self._sync.done():
                return
            self._sync.result()  # the kernel reports a failed write once, so it must not be lost here
        self._unsynced = 0
        self._sync = self._syncer.submit(_sync_data, self._fd)

    def digest(self, offset: int, length: int) -> str | None:
        """Return the SHA-256 of some bytes in hexadecimal; None if the file ends before."""
        digest = hashlib.sha256()
        try:
            while length:
                data = os.pread(self._fd, min(length, _READ), offset)
                if not data:
                    return None
                digest.update(data)
                offset, length = offset + len(data), length - len(data)
        except (OSError, OverflowError):
            return None
        return digest.hexdigest()

    def cut(self, size: int) -> None:
        """Truncate the file; raise `TargetError` if that fails."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._kept) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                if kind is None:
                    if self._sync is not None:
                        self._sync.result()
                    os.fsync(self._fd)
            finally:
                self._syncer.shutdown(cancel_futures=True)
                os.close(self._fd)  # where network file systems report what could not be written
        except OSError as failure:
            if kind is None:
                raise writing_failed(self._label, failure, kept=self._kept) from None


class Journal:
    """The journal of a file that is locked by this process; a context manager, which closes it.

    Parameters
    ----------
    path
        The file; its journal stands beside it.
    label, kept
        As for `PartialFile`.
    fingerprint
        Identifies everything that decides the bytes of the file.

    Attributes
    ----------
    records
        The assets and tensors that an earlier run with the same fingerprint has finished, as far as the journal can be read.
    """

    def __init__(self, path: Path, label: Path, fingerprint: str, *, kept: bool = False) -> None:
        self._path, self._label, self._kept = suffixed(path, _JOURNAL), label, kept
        self._fingerprint = fingerprint
        self.records: list[Record] = []
        self._size = 0
        self._ends = [0]  # the position after the first line, and after each record
        try:
            self._fd = os.open(self._path, _FLAGS, 0o666)
            try:
                lines = self._path.read_bytes().splitlines(keepends=True)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._kept) from None
        if lines and _parse(lines[0]) == {"fingerprint": fingerprint}:
            self._ends = [len(lines[0])]
            for record, line in _records(lines[1:]):
                self.records.append(record)
                self._ends.append(self._ends[-1] + len(line))

    def keep_first(self, count: int) -> None:
        """Keep the first records and drop the others; new ones follow. Raise `TargetError` if the journal cannot be written."""
        self._size = self._ends[count]
        with suppress(OSError):  # else records stay after those that follow, which are checked before they are believed
            os.ftruncate(self._fd, self._size)
        if not self._size:
            self._write({"fingerprint": self._fingerprint})

    def add(self, record: Record) -> None:
        """Record that all bytes of an asset or a tensor were written; raise `TargetError` if the journal cannot be written."""
        key = "asset" if isinstance(record, AssetRecord) else "tensor"
        self._write({key: record.to_json()})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode()
        data = _digest(text) + b" " + text + b"\n"
        try:
            write_all(self._fd, data, self._size)
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._kept) from None
        self._size += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it is only needed after a failure
            os.close(self._fd)


def count_finished(folder: Path) -> int:
    """Return how many tensors the journals in a folder record as finished."""
    journals = [path for path in folder.iterdir() if path.name.endswith(_JOURNAL) and path.is_file()]
    return sum(path.read_bytes().count(b' {"tensor": ') for path in journals)


def _parse(line: bytes) -> Any:
    """Return the value of a line, or None if it is incomplete or damaged."""
    digest, _, text = line.removesuffix(b"\n").partition(b" ")
    try:
        return json.loads(text) if line.endswith(b"\n") and digest == _digest(text) else None
    except ValueError:
        return None


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def _records(lines: list[bytes]) -> Iterator[tuple[Record, bytes]]:
    """Yield the records of lines up to the first that is damaged."""
    parsers: dict[str, Callable[[Any], Record]] = {"tensor": parse_tensor, "asset": parse_asset}
    for line in lines:
        try:
            ((key, value),) = _parse(line).items()
            yield parsers[key](value), line
        except (FormatError, AttributeError, KeyError, ValueError):
            return
