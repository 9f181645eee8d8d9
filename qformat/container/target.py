"""Put a complete file at a path, or nothing.

The bytes go to ``NAME.partial`` beside the target, which is locked, synced and renamed at the end. A run that was killed leaves at
most that partial file and its journal; the next run to the same target takes them over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qformat.container.layout import MAGIC
from qformat.errors import TargetError

_SYNC_EVERY = 32 << 20
_READ = 1 << 20
_ATTRIBUTE, _PARTIAL = "user.qformat.request", "user.qformat.partial"
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise `TargetError` if a file must not or cannot be made at `path`."""
    if path.is_dir():
        raise TargetError(f"{path}: is a directory; give the name of a file")
    if not overwrite and os.path.lexists(path):
        raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
    if path.exists() and not path.is_file():
        raise TargetError(f"{path}: is not a regular file; give another name")
    if not path.parent.is_dir():
        raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TargetError(f"{path}: the directory {path.parent} is not writable")


def mark_at(path: Path) -> tuple[str, str]:
    """Return request and root that the file at a path was marked with; empty if it is not, or the file system keeps no marks."""
    try:
        request, _, root = os.getxattr(path, _ATTRIBUTE).decode("ascii", "replace").partition(" ")
    except (OSError, AttributeError):  # macOS has others
        return "", ""
    return request, root


def _is_partial(fd: int) -> bool:
    """Return whether a regular file is one that a run has begun: by its mark, or as it begins like a container."""
    with suppress(OSError, AttributeError):
        if _PARTIAL in os.listxattr(fd):
            return True
    return os.pread(fd, len(MAGIC), 0) in (b"", MAGIC)


def tidy(path: Path) -> None:
    """Remove what a run that was killed at its very end has left beside its complete file."""
    partial, journal = _beside(path)
    with suppress(OSError):
        if os.path.samestat(partial.lstat(), path.lstat()):
            partial.unlink()
    if not os.path.lexists(partial):
        _remove_journal(journal)


def move(old: Path, new: Path, *, overwrite: bool) -> None:
    """Give a complete file its name; without `overwrite`, a file that stands there is never replaced.

    Raises
    ------
    FileExistsError
        If there is one.
    OSError
        If it cannot be renamed.
    """
    if overwrite:
        old.replace(new)
        return
    try:
        os.link(old, new)  # fails if the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(new):
            raise FileExistsError from None
        old.rename(new)
    else:
        with suppress(OSError):  # the file stands at its path: what follows may not fail the run
            old.unlink()


def sync_directory(path: Path) -> None:
    """Let the disk have the names of the files in a directory, as far as that can be asked for."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def journal_draft(journal: Path) -> Path:
    """Return where a journal is begun, which replaces the one of an earlier run then."""
    return journal.with_name(journal.name + ".new")


def _remove_journal(journal: Path) -> None:
    for name in (journal, journal_draft(journal)):
        with suppress(OSError):
            name.unlink()


def _beside(path: Path) -> tuple[Path, Path]:
    """Return where the partial file of a target stands, and its journal."""
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.journal")


class Nowhere:
    """Stands in for a `Target` whose bytes nobody wants, but their number."""

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Do nothing."""

    def commit(self) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""

    def keep(self) -> None:
        """Do nothing."""

    def mark(self, request: str, root: str) -> None:
        """Do nothing."""


class Target:
    """The partial file of one run.

    Parameters
    ----------
    path
        Where the complete file shall stand.
    overwrite
        Whether a file that stands there may be replaced.
    resume
        Whether to go on with the partial file of a run that was killed, rather than to remove it.

    Attributes
    ----------
    journal_path
        Where the journal of the partial file stands.

    Raises
    ------
    TargetError
        If there is a file already, the directory cannot be written, or another process is writing the same file.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool = False) -> None:
        check_target(path, overwrite=overwrite)
        self.path = path
        self._overwrite = overwrite
        self._resume = resume
        self._partial, self.journal_path = _beside(path)
        self._fd = self._open_locked(resume=resume)
        with suppress(OSError, AttributeError):  # so that it is known if this run is killed
            os.setxattr(self._fd, _PARTIAL, b"")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="qformat-sync")
        self._sync: Future[None] | None = None
        self._unsynced = 0

    def _open_locked(self, *, resume: bool) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            try:
                fd = os.open(self._partial, flags, 0o666)
            except FileExistsError:
                stale = self._take_stale(keep=resume)
                if stale is not None:
                    return stale
                continue
            except OSError as error:
                raise TargetError(f"{self._partial}: cannot be written: {error.strerror}") from None
            try:
                self._lock(fd)
            except OSError:
                os.close(fd)
                continue
            if self._is_ours(fd):
                return fd
            os.close(fd)  # another process took it for a stale one before it was locked

    def _take_stale(self, *, keep: bool) -> int | None:
        """Remove the partial file of a run that was killed, and nothing else of that name; or return it, open and locked."""
        flags = (os.O_RDWR if keep else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._partial, flags)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TargetError(f"{self._partial}: is in the way: {error.strerror}; remove it") from None
        taken = False
        try:
            status = os.fstat(fd)
            own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            complete = status.st_nlink == 2 and self._is_target(fd)  # killed between two names of the complete file
            if not own or not (status.st_nlink == 1 or complete) or not _is_partial(fd):
                raise TargetError(f"{self._partial}: is in the way, and not the rest of a conversion; remove it")
            try:
                self._lock(fd)
            except OSError:
                raise TargetError(f"{self.path}: another process is writing it; wait for it to end") from None
            if self._is_ours(fd):
                if keep and not complete:
                    taken = True
                    return fd
                self._partial.unlink()
                _remove_journal(self.journal_path)
        finally:
            if not taken:
                os.close(fd)
        return None

    def _is_target(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.lstat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _lock(fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks: do without
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise

    def _is_ours(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._partial.lstat())
        except FileNotFoundError:
            return False

    def _start_sync(self) -> None:
        """Let the disk work while more is encoded: at the end there is little left to wait for."""
        if self._sync is not None:
            if not self._sync.done():
                return
            self._sync.result()  # the kernel reports a failed write once, so it must not be lost here
        self._unsynced = 0
        self._sync = self._syncer.submit(_sync_data, self._fd)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises
        ------
        TargetError
            If the disk is full or the write fails otherwise.
        """
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._fd, view, offset)
                view = view[written:]
                offset += written
                self._unsynced += written
            if self._unsynced >= _SYNC_EVERY:
                self._start_sync()
        except OSError as error:
            raise self._failed(error) from None

    def mark(self, request: str, root: str) -> None:
        """Let the file tell outside its bytes which request it was made for, if the file system keeps that.

        The root is there because whoever writes another file over this one, as cp does, leaves the mark as it is.
        """
        with suppress(OSError, AttributeError):
            os.setxattr(self._fd, _ATTRIBUTE, f"{request} {root}".encode())

    def digest(self, offset: int, length: int) -> str | None:
        """Return the SHA-256 of some bytes of the partial file in hexadecimal; None if they are not all there."""
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
        """Leave no more than some bytes of the partial file.

        Raises
        ------
        TargetError
            If that fails.
        """
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._failed(error) from None

    def commit(self) -> None:
        """Sync the file to disk and give it its name.

        Raises
        ------
        TargetError
            If that fails, or if a file has appeared at the path meanwhile and may not be replaced.
        """
        try:
            if self._sync is not None:
                self._sync.result()
            with suppress(OSError, AttributeError):
                os.removexattr(self._fd, _PARTIAL)
            os.fsync(self._fd)
            move(self._partial, self.path, overwrite=self._overwrite)
        except FileExistsError:
            raise TargetError(f"{self.path}: a file has appeared there meanwhile; nothing was replaced") from None
        except OSError as error:
            raise self._failed(error) from None
        self._syncer.shutdown()
        with suppress(OSError):  # the file is complete and in its place: nothing below may fail the run
            os.close(self._fd)
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove the partial file."""
        self._syncer.shutdown(cancel_futures=True)
        with suppress(OSError):
            if self._is_ours(self._fd):
                self._partial.unlink()
        with suppress(OSError):
            os.close(self._fd)

    def keep(self) -> None:
        """Leave the partial file to a run that goes on with it."""
        self._syncer.shutdown(cancel_futures=True)
        with suppress(OSError):
            os.close(self._fd)

    def _failed(self, error: OSError) -> TargetError:
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file would be larger than the allowed file size",
        }.get(error.errno or 0, error.strerror)
        left = "what was done is kept beside it" if self._resume else "nothing was left there"
        return TargetError(f"{self.path}: writing failed: {what}; {left}")
