"""Put a complete directory at a path, or nothing; for single files see `qformat.container.target`.

The files go to a directory ``NAME.partial`` beside the target, which is locked, and renamed at the end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qformat.errors import TargetError

_MARK = ".qformat-partial"  # what the rest of a run that was killed is known by


def check_directory(path: Path, replaceable: Callable[[str], bool], *, overwrite: bool) -> None:
    """Raise `TargetError` if a directory must not or cannot be made at `path`; `replaceable` tells which files may get lost."""
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
        if path.is_symlink() or not path.is_dir():
            raise TargetError(f"{path}: is not a directory; give another name")
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if (file.is_symlink() or not file.is_dir()) and not replaceable(name):
                raise TargetError(f"{path}: holds {name}, which would be lost; remove it or give another name")
    if not path.parent.is_dir():
        raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TargetError(f"{path}: the directory {path.parent} is not writable")


@contextmanager
def new_directory(path: Path, replaceable: Callable[[str], bool], *, overwrite: bool) -> Iterator[Path]:
    """Yield a directory to write files into, which takes its place at `path` if nothing fails.

    Parameters
    ----------
    path
        Where it shall stand.
    replaceable
        Tells of a file of a directory that stands there whether it may get lost.
    overwrite
        Whether to replace such a directory.

    Raises
    ------
    TargetError
        If it cannot be made; nothing has changed at `path` then.
    """
    check_directory(path, replaceable, overwrite=overwrite)
    path = path.absolute()
    partial = path.with_name(path.name + ".partial")
    lock = _begin(partial)
    try:
        yield partial
        (partial / _MARK).unlink()
        check_directory(path, replaceable, overwrite=overwrite)
        _swap(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, TargetError):
            raise TargetError(f"{path}: writing failed: {error.strerror}; nothing was changed there") from None
        raise
    finally:
        os.close(lock)


def _begin(partial: Path) -> int:
    """Make the partial directory, and return its lock; that of a run that was killed is removed first."""
    while True:
        try:
            partial.mkdir()
        except FileExistsError:
            _remove_stale(partial)
            continue
        except OSError as error:
            raise TargetError(f"{partial}: cannot be made: {error.strerror}") from None
        try:
            lock = _locked(partial)
        except FileNotFoundError:  # another process took it for a stale one before it was locked
            continue
        (partial / _MARK).touch()
        return lock


def _remove_stale(partial: Path) -> None:
    try:
        lock = _locked(partial)
    except FileNotFoundError:
        return
    try:
        if (partial / _MARK).is_file():
            shutil.rmtree(partial)
        else:
            with suppress(FileNotFoundError):
                partial.rmdir()  # empty if a run was killed at once
    except OSError:
        raise TargetError(f"{partial}: is in the way, and not the rest of an export; remove it") from None
    finally:
        os.close(lock)


def _locked(partial: Path) -> int:
    try:
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TargetError(f"{partial}: is in the way: {error.strerror}; remove it") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise TargetError(f"{partial}: another process is writing it; wait for it to end") from None
    except OSError:  # a network file system without locks: do without
        pass
    return fd


def _swap(partial: Path, path: Path) -> None:
    """Put the directory in its place, and remove the one that stood there."""
    old = path.with_name(path.name + ".replaced")
    replaced = path.exists()
    if replaced:
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if replaced:
            old.rename(path)
        raise
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):  # the directory is complete and in its place
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
