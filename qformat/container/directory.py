"""Put a complete directory at a path, or nothing; or several files; for single files see `qformat.container.target`.

The files go to a directory ``NAME.partial`` beside the target, which is locked, and renamed at the end. Those of a conversion go to
``NAME.parts``, and from there to their places.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qformat.container.target import sync_directory
from qformat.errors import TargetError

MARK = ".qformat-partial"  # what the rest of a run that was killed is known by
_TRIES = 10


def check_directory(path: Path, replaceable: Callable[[str], bool], *, overwrite: bool) -> None:
    """Raise `TargetError` if a directory must not or cannot be made at `path`; `replaceable` tells which files may get lost."""
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
        if path.is_symlink() or not path.is_dir():
            raise TargetError(f"{path}: is not a directory; give another name")
        for file in path.rglob("*"):  # no more than the first that is in the way
            name = file.relative_to(path).as_posix()
            if (file.is_symlink() or not file.is_dir()) and not replaceable(name):
                raise TargetError(f"{path}: holds {name}, which would be lost; remove it or give another name")
        if os.path.lexists(_replaced(path)):
            raise TargetError(f"{_replaced(path)}: is in the way; remove it")
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
        (partial / MARK).unlink()
        check_directory(path, replaceable, overwrite=overwrite)
        _swap(partial, path)
    except BaseException as error:
        _remove(partial)
        if isinstance(error, OSError) and not isinstance(error, TargetError):
            raise TargetError(f"{path}: writing failed: {error.strerror}; nothing was changed there") from None
        raise
    finally:
        os.close(lock)


@contextmanager
def new_parts(path: Path, *, resume: bool) -> Iterator[Path]:
    """Yield a directory beside `path` for files on their way; it is removed at the end.

    Parameters
    ----------
    path
        Where the result shall stand.
    resume
        Yield what a run that was killed has left there, rather than remove it; and leave it if this one fails.

    Raises
    ------
    TargetError
        If it cannot be made, or holds something else.
    """
    folder = path.absolute().with_name(path.name + ".parts")
    lock = _begin(folder, keep=resume)
    try:
        yield folder
    except BaseException:
        if not resume:
            _remove(folder)
        raise
    else:
        _remove(folder)
    finally:
        os.close(lock)


def _begin(partial: Path, *, keep: bool = False) -> int:
    """Make the partial directory, and return its lock; that of a run that was killed is removed first, or kept."""
    while True:
        try:
            partial.mkdir()
        except FileExistsError:
            lock = _take_stale(partial, keep=keep)
            if lock is not None:
                return lock
            continue
        except OSError as error:
            raise TargetError(f"{partial}: cannot be made: {error.strerror}") from None
        try:
            lock = _locked(partial)
        except FileNotFoundError:  # another process took it for a stale one before it was locked
            continue
        (partial / MARK).touch()
        return lock


def _take_stale(partial: Path, *, keep: bool) -> int | None:
    """Remove the directory of a run that was killed, and nothing else of that name; or return its lock, if it has begun."""
    try:
        lock = _locked(partial)
    except FileNotFoundError:
        return None
    taken = False
    try:
        if not (partial / MARK).is_file():
            with suppress(FileNotFoundError):
                partial.rmdir()  # empty if a run was killed at once
        elif keep:
            taken = True
            return lock
        else:
            shutil.rmtree(partial)
    except OSError:
        raise TargetError(f"{partial}: is in the way, and not the rest of a run that was killed; remove it") from None
    finally:
        if not taken:
            os.close(lock)
    return None


def _remove(folder: Path) -> None:
    """Remove a directory, to which the job of a cluster that nobody waits for any more may still add a file."""
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return


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
    old = _replaced(path)
    replaced = path.exists()
    if replaced:
        path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        if replaced and not path.exists():
            old.rename(path)
        raise
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
    sync_directory(path.parent)


def _replaced(path: Path) -> Path:
    """Return where a directory stands for a moment while another one takes its place."""
    return path.with_name(path.name + ".replaced")
