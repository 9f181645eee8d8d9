"""Shards of heads: those that a head names, and those that a folder still needs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qformat.container.index import MAX_INDEX_BYTES, Index
from qformat.container.layout import HEADER_SIZE, MAGIC, TRAILER_SIZE, Trailer
from qformat.container.target import there
from qformat.errors import FormatError
from qformat.files import open_regular
from qformat.records import ShardRecord

_NUMBERED = re.compile(r".+-[0-9]{5}-of-[0-9]{5}(-[0-9a-f]+)?(\.[^.]*)?", re.DOTALL)
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EISDIR)


def shards_of(path: Path) -> tuple[ShardRecord, ...]:
    """Return the shards that a file names if it is the head of some; none if it is none, or is damaged or not there."""
    with _opened(path) as file:
        trailer = file and _trailer(file)
        if not file or not trailer or trailer.index_length > MAX_INDEX_BYTES:
            return ()
        data = _read(file, trailer.index_offset, trailer.index_length)
    try:
        return Index.parse(data).shards if b'"shards"' in data else ()
    except FormatError:
        return ()


def is_shard(path: Path, record: ShardRecord) -> bool:
    """Return whether a file is the one that a head names, by its length and the digest of its index."""
    with _opened(path) as file:
        trailer = file and _trailer(file)
        if not file or not trailer:
            return False
        return (os.fstat(file.fileno()).st_size, trailer.index_sha256.hex()) == (record.nbytes, record.root)


def needed_in(folder: Path) -> set[str]:
    """Return the names of all shards that heads in a folder name. Raise `OSError` if that cannot be found out."""
    with os.scandir(folder) as entries:
        paths = [Path(entry) for entry in entries if entry.is_file()]
    return {shard.name for path in paths for shard in shards_of(path)}


def remove_unneeded(folder: Path, shards: Iterable[ShardRecord]) -> None:
    """Remove shards of a head that is gone.

    One that another head in the folder names stays, and so does another file of that name; nor does a head, which may be hostile,
    have files removed that are not called as shards are.
    """
    shards = [shard for shard in shards if there(folder / shard.name)]
    needed = needed_in(folder) if shards else set()
    for shard in shards:
        if _NUMBERED.fullmatch(shard.name) and shard.name not in needed and is_shard(folder / shard.name, shard):
            (folder / shard.name).unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """Yield an open file; None if there is none that can be read. Raise `OSError` if the disk fails."""
    try:
        file = open_regular(path)
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        yield None
    else:
        with file:
            yield file


def _trailer(file: BinaryIO) -> Trailer | None:
    """Return the trailer of a container; None if the file is none, or is damaged."""
    size = os.fstat(file.fileno()).st_size
    try:
        if size < HEADER_SIZE + TRAILER_SIZE or _read(file, 0, len(MAGIC)) != MAGIC:
            return None
        return Trailer.parse(_read(file, size - TRAILER_SIZE, TRAILER_SIZE), size)
    except FormatError:
        return None


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    parts = []
    while length and (data := os.pread(file.fileno(), length, offset)):
        parts.append(data)
        offset, length = offset + len(data), length - len(data)
    return b"".join(parts)
