"""Workspace: the locked folder beside an output in which it is made, and the commit that puts it in place.

The output of a run is a file, a head file with its shards, or a directory. It is made in the folder ``NAME.partial``, which holds

* ``NAME.lock``: marks the folder as a workspace, and is locked by the process that owns it;
* the files, or the directory, under their final names, and a journal for each container file (`qformat.container.partial`);
* ``NAME.commit``, once all of them are complete and synced: the moves that put them in place;
* ``NAME.old``: a replaced file that was put aside.

Before the first move, a run that is killed has changed nothing outside the folder. After it, the next run to the same output does
the remaining moves before anything else.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

from qformat.container.partial import PartialFile, take_lock, writing_failed
from qformat.errors import TargetError

_MARKER = b"qformat workspace\n"
_TRIES = 10
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def check_target(path: Path, replaceable: Callable[[str], bool] | None = None, *, overwrite: bool) -> None:
    """Raise `TargetError` if an output must not or cannot be made at `path`.

    `replaceable` is given for a directory, and accepts the names of its files that may be lost; None is for a file.
    """
    if path.name in ("", ".."):
        raise TargetError(f"{path}: has no name of its own; give the name of the output")
    there = os.path.lexists(path)
    if replaceable is None and path.is_dir():
        raise TargetError(f"{path}: is a directory; give the name of a file")
    if there and not overwrite:
        raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
    if replaceable is None and path.exists() and not path.is_file():
        raise TargetError(f"{path}: is not a regular file; give another name")
    if replaceable and there:
        if path.is_symlink() or not path.is_dir():
            raise TargetError(f"{path}: is not a directory; give another name")
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if (file.is_symlink() or not file.is_dir()) and not replaceable(name):
                raise TargetError(f"{path}: holds {name}, which would be lost; remove it or give another name")
    if not path.parent.is_dir():
        raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TargetError(f"{path}: the directory {path.parent} is not writable")


def write_bytes(path: Path, data: bytes) -> None:
    """Make a new file that holds `data`, or none; raise `TargetError` if that fails or there is a file already."""
    with Workspace(path, overwrite=False) as workspace:
        workspace.claim([path.name])
        with PartialFile(workspace.folder / path.name, path) as file:
            file.write(data, 0)
        workspace.commit()


class NullWorkspace:
    """Stands in for a `Workspace` in a dry run, with the checks for ``overwrite``; it has no folder."""

    folder = None

    def __init__(self, target: Path) -> None:
        check_target(target, overwrite=True)
        self._target = target

    def claim(self, names: Sequence[str], fingerprint: str = "") -> None:  # noqa: ARG002
        """Check the final names."""
        for name in names:
            check_target(self._target.with_name(name), overwrite=True)

    def commit(self, *, fingerprint: str = "") -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Commit(TypedDict):
    """The content of ``NAME.commit``: moves in their order. The names that exist show which of them are done."""

    aside: list[str]  # names whose files are moved into the workspace, as NAME.old
    place: list[str]  # names that are moved out of the workspace, and must be free
    replace: list[str]  # a name that is moved over a file, or exchanged for a directory
    folder: int  # inode of the workspace: a copy of it, from an archive say, has another one and is never carried out
    inode: int  # of the latter: if another one has its name in the workspace, it was exchanged
    fingerprint: str


class Workspace:
    """The folder in which one output is made; a context manager, which removes it unless a later run may resume.

    Parameters
    ----------
    target
        The file or directory to make; of a head with shards, the head.
    overwrite
        Whether to replace what stands at the final names.
    resume
        Keep the files of an earlier run that was killed, and those of this one if it raises.
    replaceable
        As for `check_target`.

    Attributes
    ----------
    folder
        Where to write; files are named as they will be in the end.

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
        resume: bool = False,
        replaceable: Callable[[str], bool] | None = None,
    ) -> None:
        self._label, self._target = target, target.absolute()
        self._overwrite, self._resume, self._replaceable = overwrite, resume, replaceable
        self.folder = Path(f"{self._target}.partial")
        lock, commit, draft = (f"{self._target.name}.{suffix}" for suffix in ("lock", "commit", "draft"))
        self._lock, self._commit, self._draft = self.folder / lock, self.folder / commit, self.folder / draft
        self._names: Sequence[str] = [target.name]
        self._finished = ""  # the fingerprint of a run that was killed in its commit, which is complete now
        self._claimed = False
        check_target(target, replaceable, overwrite=overwrite or resume or os.path.lexists(self.folder))
        self._fd: int | None = self._take()
        try:
            self._recover()
            check_target(target, replaceable, overwrite=overwrite or resume or bool(self._finished))
        except BaseException:
            self._end(keep=True)
            raise

    def _take(self) -> int:
        """Make the folder or take it over, and return its lock."""
        while True:
            fd = -1
            try:
                with suppress(FileExistsError):
                    self.folder.mkdir(0o700)
                self._check_ours()
                fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
                take_lock(fd, self._label)
                if os.path.samestat(os.fstat(fd), self._lock.lstat()):
                    if os.fstat(fd).st_size == 0:
                        os.pwrite(fd, _MARKER, 0)
                        os.fsync(fd)  # after a power cut, synced work in a folder without its marker would look foreign
                    fd, lock = -1, fd
                    return lock
            except TargetError:
                raise
            except FileNotFoundError:  # another process has just removed the folder
                check_target(self._label, overwrite=True)  # or the one that it is in
                continue
            except OSError as error:
                with suppress(OSError):
                    if self._lock.lstat().st_size == 0:
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
            if not paths or (self._lock.is_file() and self._lock.read_bytes() == _MARKER):
                return
            begun = paths == [self._lock] or self._commit in paths or any(path.suffix == ".journal" for path in paths)
            if begun and self._lock.is_file() and not self._lock.stat().st_size:
                return
        raise TargetError(f"{self.folder}: exists, but is not the workspace of an interrupted run; move it away")

    def claim(self, names: Sequence[str], fingerprint: str = "") -> None:
        """State the final names, the head last, before anything is written; raise `TargetError` if one cannot be made.

        A run may replace the output of an earlier one with the same fingerprint that was killed in its commit: it is the same.
        """
        self._overwrite |= bool(fingerprint) and fingerprint == self._finished
        for name in names:
            check_target(self._label.with_name(name), self._replaceable, overwrite=self._overwrite)
        self._names, self._claimed = names, True
        # Only now: a run that fails before, for a misspelt option say, keeps the work of an earlier one.
        files = [path for path in self.folder.iterdir() if path.is_file()]
        self._clear(keep=files if self._resume else [self._lock])

    def commit(self, *, fingerprint: str = "") -> None:
        """Put everything in place, and remove the folder. All files must be complete and synced.

        `fingerprint` identifies everything that decides the output, see `claim`. If `TargetError` is raised, nothing has changed at
        the final names.
        """
        *shards, head = self._names
        standing = [name for name in (head, *shards) if os.path.lexists(self._final(name))]
        commit = _Commit(aside=[], place=[*self._names], replace=[], folder=0, inode=0, fingerprint=fingerprint)
        commit["folder"] = self.folder.stat().st_ino
        # The head comes last, so that it never names shards that are not there. If new shards need the names of old ones, the old
        # head is put aside first: a kill between two shards leaves no head, rather than one over shards of both runs.
        if self._overwrite and standing == [head]:
            commit |= {"place": shards, "replace": [head], "inode": (self.folder / head).lstat().st_ino}
        elif self._overwrite:
            commit["aside"] = standing
        try:
            if self._replaceable:  # files that were added to the old directory meanwhile must not be lost
                check_target(self._label, self._replaceable, overwrite=self._overwrite)
            # 1. The names of the files reach the disk before the commit file, which refers to them.
            for folder in (self.folder, *self.folder.rglob("*/")):
                _sync_directory(folder)
            try:
                self._carry_out(commit)
            except OSError as error:
                if error.errno not in _UNSUPPORTED or not (commit["replace"] and self._replaceable):
                    raise
                # Where directories cannot be exchanged none stands there for a moment; after a kill there the next run places it.
                self._carry_out(commit | {"aside": [head], "place": [head], "replace": []})
        except FileExistsError:
            raise TargetError(
                f"{self._label}: a file has appeared there in the meantime; nothing was replaced"
            ) from None
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._resume) from None

    def _carry_out(self, commit: _Commit) -> None:
        # 2. The commit file. Killed up to here, or before the first move (see `_recover`): the folder is like that of a run killed
        #    while it encoded.
        with PartialFile(self._draft, self._label) as file:
            file.cut(0)
            file.write(json.dumps(commit).encode(), 0)
        try:
            self._draft.replace(self._commit)
            _sync_directory(self.folder)
            # 3. The moves. Killed between two of them: the next run does the others.
            self._move(commit)
        except BaseException:
            if not self._is_done(self._target.name, commit["inode"]):  # else only the workspace is left to be removed
                self._undo(commit)
            raise
        self._finish()

    def _finish(self) -> None:
        # 4. The moves reach the disk before anything old is lost. Killed from here on: the next run finds them done and comes here.
        _sync_directory(self._target.parent)
        # 5. What was put aside or exchanged. The commit file goes last but for the lock, so that this can be repeated, too.
        self._end(keep=False)

    def _recover(self) -> None:
        """Complete a commit that was interrupted, or discard one that had not begun."""
        try:
            commit: _Commit = json.loads(self._commit.read_bytes())
            names = [*commit["aside"], *commit["place"], *commit["replace"]]
            numbers = [int(commit[key]) for key in ("inode", "folder")]
            sound = all(map(self._is_own, names)) and numbers[1] == self.folder.stat().st_ino
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise TargetError(f"{self._commit}: is damaged, or copied from elsewhere; move {self.folder} away")
        # The target may have changed since the commit file was written: as long as no move is done, nothing need be replaced.
        begun = any(map(os.path.lexists, map(self._aside, commit["aside"]))) or any(map(self._is_done, commit["place"]))
        if not begun and not self._is_done(self._target.name, commit["inode"]):
            self._commit.unlink()
            return
        try:
            self._move(commit)
        except OSError as error:
            raise TargetError(
                f"{error.filename}: {error.strerror}: an earlier run was killed while it put its files in place; move what stands "
                f"there away and run again"
            ) from None
        self._finished = commit["fingerprint"]
        self._finish()
        self._fd = self._take()

    def _move(self, commit: _Commit) -> None:
        """Do the moves that are not done yet."""
        for name in commit["aside"]:
            if not os.path.lexists(self._aside(name)):
                with suppress(FileNotFoundError):
                    self._final(name).rename(self._aside(name))
        for name in commit["place"]:
            if not self._is_done(name):
                _move(self.folder / name, self._final(name))
        for name in commit["replace"]:
            if self._is_done(name, commit["inode"]):
                continue
            if self._replaceable:
                _renameat2(self.folder / name, self._final(name), _EXCHANGE)
            else:
                (self.folder / name).replace(self._final(name))

    def _undo(self, commit: _Commit) -> None:
        for name in reversed(commit["place"]):
            if os.path.lexists(self.folder / name):
                if self._is_done(name):  # a second link
                    self._final(name).unlink()
            else:
                self._final(name).rename(self.folder / name)
        for name in reversed(commit["aside"]):
            if os.path.lexists(self._aside(name)):
                self._aside(name).rename(self._final(name))
        self._commit.unlink(missing_ok=True)

    def _is_done(self, name: str, inode: int = 0) -> bool:
        """Return whether a name was placed, or replaced or exchanged if its inode is given."""
        try:
            status = (self.folder / name).lstat()
            return status.st_ino != inode if inode else os.path.samestat(status, self._final(name).lstat())
        except FileNotFoundError:
            return not os.path.lexists(self.folder / name)

    def _is_own(self, name: str) -> bool:
        """Return whether a name is that of the target or of one of its shards."""
        stem, suffix = map(re.escape, (self._target.stem, self._target.suffix))
        return name == self._target.name or bool(re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}{suffix}", name))

    def _final(self, name: str) -> Path:
        return self._target.with_name(name)

    def _aside(self, name: str) -> Path:
        return self.folder / f"{name}.old"

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
                self._clear(keep=[self._lock, self._commit])
                self._clear(keep=[self._lock])
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
        os.pwrite(fd, _MARKER, 0)
        return True

    def _end(self, *, keep: bool) -> None:
        """Remove the folder and unlock it; keep one that holds something for a later run."""
        if self._fd is not None:
            with suppress(FileNotFoundError):  # removed already, when the user stopped the run
                if not keep or [*self.folder.iterdir()] == [self._lock]:
                    self._remove()
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None and (self._resume or not self._claimed)
        self._end(keep=failed or self._commit.exists())  # moves that could not be undone are left to the next run


def _sync_directory(path: Path) -> None:
    """Fsync a directory, where the file system supports it."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _move(old: Path, new: Path) -> None:
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
        if os.path.lexists(new):
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
