"""Checks of an output before anything is written, and the names of what stands beside it while it is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from qformat.errors import TargetError

_LONGEST = 255  # bytes of a name, where the file system does not say


def longest_name(folder: Path) -> int:
    """Return how many bytes a name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return _LONGEST


def suffixed(path: Path, suffix: str) -> Path:
    """Return a path with a suffix; the name is cut, and a digest of it stands for the rest, if it would be too long."""
    name = path.name
    longest = longest_name(path.parent)
    if len(os.fsencode(name + suffix)) > longest:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        while len(os.fsencode(f"{name}~{digest}{suffix}")) > longest:
            name = name[:-1]
        name = f"{name}~{digest}"
    return path.with_name(name + suffix)


def there(path: Path) -> bool:
    """Return whether something has this name; raise `OSError` if that cannot be found out, unlike `os.path.lexists`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def followed(path: Path) -> Path:
    """Return the file that an output is, where its path is a link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114  a name too long is no error here


def check_target(path: Path, replaceable: Callable[[str], bool] | None = None, *, overwrite: bool) -> None:
    """Raise `TargetError` if an output must not or cannot be made at `path`.

    `replaceable` is given for a directory, and accepts the names of its files that may be lost; None is for a file.
    """
    if path.name in ("", ".."):
        raise TargetError(f"{path}: has no name of its own; give the name of the output")
    real = followed(path)
    check_length(path, real)
    found = os.path.lexists(path)
    if replaceable is None and path.is_dir():
        raise TargetError(f"{path}: is a directory; give the name of a file")
    if found and not overwrite:
        raise TargetError(f"{path}: exists already; use --force to replace it")
    if real.is_symlink():
        raise TargetError(f"{path}: is a link that leads to itself; remove it or give another name")
    if replaceable is None and real.exists() and not real.is_file():
        raise TargetError(f"{path}: is not a regular file; give another name")
    if replaceable and os.path.lexists(real):
        if not real.is_dir():
            raise TargetError(f"{path}: is not a directory; give another name")
        for file in real.rglob("*"):
            name = file.relative_to(real).as_posix()
            if (file.is_symlink() or not file.is_dir()) and not replaceable(name):
                raise TargetError(f"{path}: holds {name}, which would be lost; remove it or give another name")
    if not real.parent.is_dir():
        raise TargetError(f"{path}: the directory {real.parent} does not exist; make it first")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise TargetError(f"{path}: the directory {real.parent} is not writable")


def check_length(path: Path, real: Path) -> None:
    """Raise `TargetError` if the name of an output, or of one of its shards, is longer than the file system permits."""
    length, longest = len(os.fsencode(real.name)), longest_name(real.parent)
    if length > longest:
        what = "its name" if real.name == path.name else f"the name {real.name}"
        raise TargetError(f"{path}: {what} is too long: {length} bytes, and {longest} are allowed; give a shorter one")


def check_not_source(path: Path, sources: Iterable[Path]) -> None:
    """Raise `TargetError` if an output is one of the files that it is made of, whatever may be replaced."""
    if os.path.exists(path) and any(os.path.exists(source) and path.samefile(source) for source in sources):  # noqa: PTH110
        raise TargetError(f"{path}: is a file of the checkpoint that is to be read, or a part of it; give another name")
