"""Open files at untrusted paths: on this machine, or at any URL that fsspec supports."""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qformat.errors import SourceError, install_hint

_AT_ONCE = 8 << 20  # bytes per request
_CHANGES = ("size", "mtime", "LastModified", "Last-Modified", "ETag", "Content-MD5", "Digest")  # keys of fsspec


def as_path(value: object) -> Path:
    """Return the path that a caller has given; raise `TypeError` if it is none."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(
            f"give a path (str, bytes or os.PathLike); this is {type(value).__module__}.{type(value).__qualname__}"
        )
    return Path(os.fsdecode(value))


def source_path(text: str) -> Path:
    """Return the path of a checkpoint; for a URL, an object with the interface of a path (see `is_remote`).

    Raises `SourceError` if a package for such URLs is missing.
    """
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath
    except ImportError:
        raise SourceError(f"{text}: universal-pathlib is needed for URLs; {install_hint('remote')}") from None
    try:
        path = UPath(text)
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise SourceError(f"{text}: cannot be opened: {error}") from None
    return cast("Path", path)


def is_remote(path: Path) -> bool:
    """Return whether a path is a URL."""
    return not isinstance(path, Path)


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Return bytes of a remote file, fewer if it ends there; raise `SourceError` if they cannot be read."""
    try:
        data: bytes = path.fs.cat_file(path.path, start=offset, end=offset + length)  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001  each file system has exceptions of its own
        raise SourceError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    return data


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise `SourceError` with the name of a file in place of `OSError`."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def on_this_machine(path: Path) -> Iterator[Path]:
    """Yield the path of a file, or of a temporary local copy of a remote file, which stays open after it is deleted.

    Raises
    ------
    OSError
        If the copy cannot be written.
    SourceError
        If the URL cannot be read.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="qformat-") as folder:
        copy = Path(folder) / path.name
        with copy.open("wb") as file:
            while data := read_range(path, file.tell(), _AT_ONCE):
                file.write(data)
        yield copy


def identity(path: Path) -> tuple[str | int, ...]:
    """Return attributes of a file that change with its content, without reading it; nothing if there is no such file."""
    if is_remote(path):
        try:
            info = path.fs.info(path.path)  # type: ignore[attr-defined]
            attributes = [str(info.get(key)) for key in _CHANGES]  # for HTTP, ukey is only the URL
            return (path.name, path.fs.ukey(path.path), *attributes)  # type: ignore[attr-defined]
        except Exception:  # noqa: BLE001  each file system has exceptions of its own
            return ()
    try:
        status = path.stat()
    except OSError:
        return ()
    # anyone can set the mtime, so that two files may share it; nobody can set ctime and inode
    return (path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def beside(path: Path, name: str) -> Path:
    """Return the path of a file in the folder of another one; in that of the file to which a link leads, if only there is one."""
    own = path.with_name(name)
    if path.is_symlink() and not own.exists():
        linked = Path(os.path.realpath(path)).with_name(name)
        return linked if linked.exists() else own
    return own


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe would block, and a device might never end.

    Raises `OSError` if it cannot be opened, or is not a regular file.
    """
    if is_remote(path):
        try:
            return path.open("rb")
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  each file system has exceptions of its own
            raise OSError(errno.EIO, str(error) or type(error).__name__, str(path)) from None
    if "\0" in str(path):
        raise OSError(errno.ENOENT, "the name holds a NUL", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return cast("BinaryIO", io.FileIO(fd, "rb"))
