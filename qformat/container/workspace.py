"""Workspace: the locked folder beside an output in which it is made, until one commit puts it in place.

The output of a run is a file, a head file with its shards, or a directory. It is made in the folder ``NAME.partial``, which holds

* ``NAME.lock``: marks the folder as a workspace, and is locked by the process that owns it;
* the files, or the directory, and a journal for each container file (`qformat.container.partial`);
* ``NAME.commit``, once all of them are complete and synced: how they are put in place (`qformat.container.commit`).

The next run to the same output undoes or finishes what a killed one has begun, before anything else.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qformat.container.commit import Commit, Shard, sync_directory
from qformat.container.partial import PartialFile, count_finished, take_lock, write_all, writing_failed
from qformat.container.replaced import is_shard, shards_of
from qformat.container.target import check_not_source, check_target, followed, suffixed, there
from qformat.errors import TargetError
from qformat.records import ShardRecord

_MARKER = b"qformat workspace\n"
_TRIES = 10
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EXDEV, errno.ENOSYS)
_log = logging.getLogger(__name__)


class NullWorkspace:
    """Stands in for a `Workspace` in a dry run, with the checks for ``overwrite``; it has no folder."""

    folder = None
    removed: Sequence[Path] = ()
    left: Sequence[Path] = ()

    def __init__(self, target: Path, sources: Collection[Path] = ()) -> None:
        check_target(target, overwrite=True)
        check_not_source(target, sources)
        self.target = followed(target)

    def claim(self, fingerprint: str = "") -> None:
        """Do nothing."""

    def commit(self, *, fingerprint: str = "", shards: Mapping[str, ShardRecord] | None = None) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Workspace:
    """The folder in which one output is made; a context manager, which removes it unless a later run may resume.

    Parameters
    ----------
    target
        The file or directory to make; of a head with shards, the head. If it is a link, it is followed.
    overwrite
        Whether to replace what stands there.
    resume
        Keep the files of an earlier run that was killed, and those of this one if it raises; None if no run can go on with them.
    replaceable
        As for `check_target`.
    sources
        Files that the output is made of, which are neither replaced nor removed.

    Attributes
    ----------
    target
        The file or directory to make, if `target` is a link the one that this leads to.
    folder
        Where to write: the target under its own name.
    removed, left
        After the commit, the shards of a replaced head: those that were removed, and those that stay.

    Raises
    ------
    TargetError
        If the output must not or cannot be made, or another process is making it.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool,
        resume: bool | None = None,
        replaceable: Callable[[str], bool] | None = None,
        sources: Collection[Path] = (),
    ) -> None:
        self._label, self.target = target, followed(target)
        self._overwrite, self._replaceable, self._sources = overwrite, replaceable, sources
        self._resume, self._resumable = bool(resume), resume is not None
        self._target = self.target.absolute()
        check_not_source(target, sources)
        self.folder = suffixed(self._target, ".partial")
        check_target(target, replaceable, overwrite=overwrite or self._resume or os.path.lexists(self.folder))
        lock, commit, draft = (
            suffixed(self.folder / self._target.name, f".{name}") for name in ("lock", "commit", "draft")
        )
        self._lock, self._commit, self._draft = lock, commit, draft
        self._finished = ""  # the fingerprint of a run that was killed after its commit
        self._claimed = self._placed = False
        self.removed: Sequence[Path] = ()
        self.left: Sequence[Path] = ()
        self._fd: int | None = self._take()
        try:
            self._recover()
            check_target(target, replaceable, overwrite=overwrite or self._resume or bool(self._finished))
        except BaseException:
            self._end(keep=True)
            raise

    def _take(self) -> int:
        """Make the folder or take it over, and return its lock."""
        while True:
            fd, locked = -1, False
            try:
                with suppress(FileExistsError):
                    self.folder.mkdir(0o700)
                self._check_ours()
                fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
                take_lock(fd, self._label)
                if os.path.samestat(os.fstat(fd), self._lock.lstat()):
                    locked = True
                    _mark(fd)
                    fd, lock = -1, fd
                    return lock
            except TargetError:
                raise
            except FileNotFoundError:  # another process has just removed the folder
                check_target(self._label, self._replaceable, overwrite=True)  # or the one that it is in
                continue
            except OSError as error:
                with suppress(OSError):
                    if [*self.folder.iterdir()] == [self._lock] and (locked or not self._lock.stat().st_size):
                        self._lock.unlink()
                with suppress(OSError):  # which fails unless it is empty
                    self.folder.rmdir()
                raise writing_failed(self.folder if fd < 0 else self._label, error, kept=False) from None
            finally:
                if fd >= 0:
                    os.close(fd)

    def _check_ours(self) -> None:
        """Raise `TargetError` unless the folder is a workspace of this user. A run killed at once leaves it empty, or the lock."""
        status = self.folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            paths = [*self.folder.iterdir()]
            lock = self._lock.is_file() and not self._lock.is_symlink()
            marker = self._lock.read_bytes()[: len(_MARKER) + 1] if lock else b""
            if not paths or marker == _MARKER or (paths == [self._lock] and _MARKER.startswith(marker)):
                return
        raise TargetError(f"{self.folder}: exists, but is not the workspace of an interrupted run; move it away")

    def claim(self, fingerprint: str = "") -> None:
        """Begin to make the output; raise `TargetError` if it cannot be made.

        A run may replace the output of an earlier one with the same fingerprint that was killed after its commit: it is the same.
        """
        self._overwrite |= bool(fingerprint) and fingerprint == self._finished
        check_target(self._label, self._replaceable, overwrite=self._overwrite)
        self._claimed = True
        # Only now: a run that fails before, for a misspelt option say, keeps the work of an earlier one.
        if self._resume:
            keep = {path for path in self.folder.iterdir() if path.is_file()}
        else:
            keep = {self._lock}
            if count := count_finished(self.folder):
                _log.warning(
                    "%s: the finished tensors (%d) of an interrupted run are discarded; --resume would have kept them",
                    self._label,
                    count,
                )
        self._clear(keep)

    def commit(self, *, fingerprint: str = "", shards: Mapping[str, ShardRecord] | None = None) -> None:
        """Put everything in place, and remove the folder. All files must be complete and synced.

        `shards` holds, by their names in the folder, the records of the target's shards. `fingerprint` identifies everything that
        decides the output, see `claim`. If `TargetError` is raised, nothing has changed, unless it says so.
        """
        try:
            commit = self._prepared(shards or {}, fingerprint)
            if self._replaceable:  # files that were added to the old directory meanwhile must not be lost
                check_target(self._label, self._replaceable, overwrite=self._overwrite)
            # 1. The names of the files reach the disk before the commit file, which refers to them.
            for folder in (self.folder, *self.folder.rglob("*/")):
                sync_directory(folder)
            # 2. The commit file. Killed up to here: the folder is like that of a run killed while it encoded.
            with PartialFile(self._draft, self._label, kept=self._resume) as file:
                file.cut(0)
                file.write(commit.encode(), 0)
            self._carry_out(commit)
        except FileExistsError:
            raise TargetError(
                f"{self._label}: a file has appeared there in the meantime; nothing was replaced"
            ) from None
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> TargetError:
        """Return the error of a commit that failed."""
        if self._placed:
            what = "it is complete and in place, but not everything that it replaces is removed; the next run to it does that"
        elif self._commit.exists():
            what = "what was put in place could not be taken back; the next run to it does that"
        else:
            return writing_failed(self._label, error, kept=self._resume)
        return TargetError(f"{self._label}: {error.strerror}: {what}")

    def _prepared(self, shards: Mapping[str, ShardRecord], fingerprint: str) -> Commit:
        """Return the commit to carry out; raise `TargetError` if a shard must not take its place."""
        placed = []
        for made, record in shards.items():
            place = self._target.with_name(record.name)
            found = there(place)
            if found and not (place.is_file() and (self._overwrite or is_shard(place, record))):
                raise TargetError(f"{self._label.with_name(record.name)}: exists already; move it away")
            placed.append(Shard(made, record, new=not found))
        replaced: Sequence[ShardRecord] = ()
        if self._overwrite and self._target.is_file():
            kept = {self._target.name, *(record.name for record in shards.values())}
            replaced = [record for record in shards_of(self._target) if record.name not in kept]
            sources = {_identity(path) for path in self._sources} - {None} if replaced else set()
            replaced = [record for record in replaced if _identity(self._target.with_name(record.name)) not in sources]
        inode = (self.folder / self._target.name).lstat().st_ino
        return Commit(self.folder, self._target, inode, placed, replaced, fingerprint)

    def _carry_out(self, commit: Commit) -> None:
        try:
            self._draft.replace(self._commit)
            sync_directory(self.folder)
            # 3. The moves. Killed before the last of them: the next run undoes the others.
            commit.place(overwrite=self._overwrite)
            self._placed = True
        except BaseException:
            if commit.is_done:  # interrupted just after the last move
                self._placed = True
            else:
                commit.undo()
                self._commit.unlink(missing_ok=True)
            raise
        self._finish(commit)

    def _finish(self, commit: Commit) -> None:
        # 4. The moves reach the disk before anything old is lost. Killed from here on: the next run finds them done and comes here.
        commit.finish()
        old = [self._target.with_name(record.name) for record in commit.replaced]
        self.left = [self.target.with_name(path.name) for path in old if there(path)]
        left = {path.name for path in self.left}
        self.removed = [self.target.with_name(path.name) for path in old if path.name not in left]
        # 5. A directory that was exchanged or put aside. The commit file goes last but for the lock, so this can be repeated, too.
        self._end(keep=False)

    def _recover(self) -> None:
        """Finish a commit that was interrupted, or undo it if its target is not in place."""
        try:
            commit = Commit.parse(self._commit.read_bytes(), self.folder, self._target)
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            raise TargetError(f"{self._commit}: is damaged; move {self.folder} away") from None
        try:
            if not commit.is_done:
                commit.undo()
                self._commit.unlink()
                return
            self._finish(commit)
        except FileExistsError as error:
            raise TargetError(
                f"{error.filename}: an earlier run was killed while it put its files in place; move what stands there away "
                "and run again"
            ) from None
        except OSError as error:
            self._placed = commit.is_done
            raise self._failed(error) from None
        self._finished = commit.fingerprint
        self._fd = self._take()

    def _clear(self, keep: Collection[Path]) -> None:
        """Remove what is in the folder but for some files, as far as possible."""
        for path in [*self.folder.iterdir()]:
            if path not in keep:
                with suppress(OSError):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

    def _remove(self) -> None:
        """Remove the folder, to which an abandoned task of a cluster may still add a file."""
        for _ in range(_TRIES):
            with suppress(OSError):
                self._clear(keep={self._lock, self._commit})
                if {*self.folder.iterdir()} <= {self._lock, self._commit}:
                    self._clear(keep={self._lock})
                if [*self.folder.iterdir()] == [self._lock]:
                    self._lock.unlink()
                    self.folder.rmdir()
                    return
            if not self._is_locked_again():
                return

    def _is_locked_again(self) -> bool:
        """Put a removed lock back, without which the folder is no workspace; return whether the folder is still ours."""
        assert self._fd is not None
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:  # that of another run, which came between
            return os.path.samestat(os.fstat(self._fd), self._lock.lstat())
        except OSError:
            return False
        os.close(self._fd)
        self._fd = fd
        take_lock(fd, self._label)
        with suppress(OSError):
            _mark(fd)
        return True

    def _end(self, *, keep: bool) -> None:
        """Remove the folder and unlock it; keep one that holds something for a later run."""
        if self._fd is not None:
            with suppress(OSError):  # removed already, when the user stopped the run
                if not keep or [*self.folder.iterdir()] == [self._lock]:
                    self._remove()
            fd, self._fd = self._fd, None
            with suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None and (self._resume or not self._claimed) and not self._placed
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._state())
        self._end(
            keep=failed or self._commit.exists()
        )  # a commit that was not finished or undone is left to the next run

    def _state(self) -> str:
        """Return what an interrupted run leaves."""
        if self._placed:
            return f"{self._label} is complete"
        count = 0
        with suppress(OSError):
            count = count_finished(self.folder)
        kept = self._resume or not self._claimed
        state = f"nothing was left at {self._label}"
        if count:
            state = f"{self._label}: the finished tensors ({count}) are {'kept' if kept else 'discarded'}"
        if kept:
            return f"{state}; the same command with --resume goes on from there" if count else state
        return f"{state}; with --resume, a run keeps what it has finished" if self._resumable else state


def finish_interrupted(path: Path) -> None:
    """Finish or take back what a killed run to an output has begun, and remove its workspace."""
    if there(suffixed(followed(path).absolute(), ".partial")):
        with Workspace(path, overwrite=True):
            pass


def write_bytes(path: Path, data: bytes) -> None:
    """Make a new file that holds `data`, or none; raise `TargetError` if that fails or there is a file already."""
    check_target(path, overwrite=False)
    try:
        fd = os.open(path.parent, os.O_WRONLY | getattr(os, "O_TMPFILE", os.O_DIRECTORY) | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, data, 0)
            os.fsync(fd)
            # A file without a name is gone if the run is killed. (Without src_dir_fd, the link itself would be linked.)
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)
        sync_directory(path.parent)
    except FileExistsError:
        raise TargetError(f"{path}: a file has appeared there in the meantime; nothing was replaced") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise writing_failed(path, error, kept=False) from None
        with Workspace(path, overwrite=False) as workspace:
            workspace.claim()
            with PartialFile(workspace.folder / path.name, path) as file:
                file.write(data, 0)
            workspace.commit()


def _mark(fd: int) -> None:
    """Write the marker into a locked file, unless it is there."""
    if os.pread(fd, len(_MARKER) + 1, 0) != _MARKER:
        write_all(fd, _MARKER, 0)
        os.fsync(fd)  # after a power cut, synced work in a folder without its marker would look foreign


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others; None if there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
