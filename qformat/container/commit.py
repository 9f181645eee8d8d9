"""The commit of an output: the moves that put it in place, how they are undone, and what is removed after them.

The head of shards, a single file or a directory is placed by the last move, and by one system call where the operating system has
one: before it nothing has happened, after it everything has. So a commit that was interrupted is undone as long as that move is not
done, and finished otherwise. Shards are named by their content: those of the new head never take the places of those of the old
one, which stay until the new head is in place.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformat.container.replaced import is_shard, needed_in, remove_unneeded
from qformat.container.target import suffixed, there
from qformat.records import ShardRecord

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Shard:
    """A shard to place: its name in the workspace, its record in the head, and whether nothing stood in its place."""

    made: str
    record: ShardRecord
    new: bool


@dataclass(frozen=True)
class Commit:
    """What is to be placed from a folder beside it.

    Attributes
    ----------
    folder
        The folder in which everything was made.
    target
        The file or directory to place last.
    inode
        Its inode, by which it is known after it was exchanged for another one.
    shards
        The shards to place before it.
    replaced
        The shards of the head that it replaces.
    fingerprint
        Identifies everything that decides the output; empty if that is unknown.
    """

    folder: Path
    target: Path
    inode: int
    shards: Sequence[Shard] = ()
    replaced: Sequence[ShardRecord] = ()
    fingerprint: str = ""

    @classmethod
    def parse(cls, data: bytes, folder: Path, target: Path) -> Commit:
        """Return a commit that was written as bytes; raise `ValueError` if it is malformed."""
        try:
            value = json.loads(data)
            shards = [Shard(_plain(made), _record(record), bool(new)) for made, record, new in value["shards"]]
            replaced = [_record(record) for record in value["replaced"]]
            return cls(folder, target, int(value["inode"]), shards, replaced, str(value["fingerprint"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None

    def encode(self) -> bytes:
        """Return the commit as bytes."""
        value = {
            "inode": self.inode,
            "shards": [(shard.made, shard.record.to_json(), shard.new) for shard in self.shards],
            "replaced": [shard.to_json() for shard in self.replaced],
            "fingerprint": self.fingerprint,
        }
        return json.dumps(value).encode()

    @property
    def _made(self) -> Path:
        return self.folder / self.target.name

    @property
    def _aside(self) -> Path:
        return suffixed(self._made, ".old")

    @property
    def is_done(self) -> bool:
        """Whether the target is in place."""
        try:
            made = self._made.lstat()
        except FileNotFoundError:
            return True
        try:
            placed = self.target.lstat()
        except FileNotFoundError:
            return False
        return placed.st_ino == self.inode and (made.st_ino != self.inode or os.path.samestat(made, placed))

    def place(self, *, overwrite: bool) -> None:
        """Put everything in place, the target last.

        Raises
        ------
        FileExistsError
            If another file stands in the place of one.
        OSError
            If a move fails.
        """
        for shard in self.shards:
            made, place = self.folder / shard.made, self.target.with_name(shard.record.name)
            if shard.new:
                move(made, place)
            else:  # the same shard, which may be damaged, or another file that is to be replaced
                made.replace(place)
        if self.shards:
            sync_directory(self.target.parent)  # after a power cut, too, no head is without its shards
        if not overwrite or not there(self.target):
            move(self._made, self.target)
        elif not self._made.is_dir():
            self._made.replace(self.target)
        else:
            self._exchange()

    def _exchange(self) -> None:
        """Put a directory in the place of another."""
        try:
            _renameat2(self._made, self.target, _EXCHANGE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            # None stands there for a moment. After a kill there, the next run puts the old one back.
            move(self.target, self._aside)
            move(self._made, self.target)

    def undo(self) -> None:
        """Move everything back that was placed; only while `is_done` is false. May be repeated.

        Raises
        ------
        FileExistsError
            If another file stands in the place of one that was put aside.
        OSError
            If a move fails.
        """
        if there(self._aside):
            move(self._aside, self.target)
        placed = [shard for shard in self.shards if shard.new and self._is_placed(shard)]
        needed = needed_in(self.target.parent) if placed else set()
        for shard in placed:
            made, place = self.folder / shard.made, self.target.with_name(shard.record.name)
            if shard.record.name in needed:
                continue
            if there(made):  # a second link
                place.unlink()
            else:
                place.rename(made)
        sync_directory(self.folder)
        sync_directory(self.target.parent)

    def _is_placed(self, shard: Shard) -> bool:
        made, place = self.folder / shard.made, self.target.with_name(shard.record.name)
        if not there(place):
            return False
        return place.samefile(made) if there(made) else is_shard(place, shard.record)

    def finish(self) -> None:
        """Remove what the placed target has replaced, after the moves have reached the disk. May be repeated."""
        sync_directory(self.target.parent)
        remove_unneeded(self.target.parent, self.replaced)


def sync_directory(path: Path) -> None:
    """Fsync a directory, where the file system supports it."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # one that may be written, but not read
        return
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EBADF):
            raise
    finally:
        os.close(directory)


def move(old: Path, new: Path) -> None:
    """Rename a file or directory to a free name; raise `FileExistsError` if it is taken."""
    try:
        _renameat2(old, new, _NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    else:
        return
    try:
        os.link(old, new)  # fails if the name is taken
    except FileExistsError:
        raise
    except OSError:  # a directory, or a file system without hard links
        if there(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        old.rename(new)
    else:
        old.unlink()


def _renameat2(old: Path, new: Path, flags: int) -> None:
    """Call Linux's renameat2; raise `OSError` of ENOSYS where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(new))


def _plain(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is not a file name")
    return name


def _record(value: Any) -> ShardRecord:
    return ShardRecord(_plain(value["name"]), int(value["bytes"]), str(value["root_sha256"]))
