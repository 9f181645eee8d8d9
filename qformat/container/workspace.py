"""Workspace: the locked folder beside an output in which it is made, and the commit that puts it in place.

The output of a run is a file, a head file with its shards, or a directory. It is made in the folder ``NAME.partial``, which holds

* ``NAME.lock``: marks the folder as a workspace, and is locked by the process that owns it;
* the files, or the directory, under their final names, and a journal for each container file (`qformat.container.journal`);
* ``NAME.commit``, once all of them are complete and synced: the steps that put them in place.

Until ``NAME.commit`` has its name, a run that is killed has changed nothing outside the folder. From the first step on, the next run to
the same output carries out the remaining steps before anything else.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from qformat.container.partial import PartialFile, take_lock, writing_failed
from qformat.errors import TargetError

_MARKER = b"qformat workspace\n"
_TRIES = 10
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise `TargetError` if a file must not or cannot be made at `path`."""
    if path.is_dir():
        raise TargetError(f"{path}: is a directory; give the name of a file")
    if not overwrite and os.path.lexists(path):
        raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
    if path.exists() and not path.is_file():
        raise TargetError(f"{path}: is not a regular file; give another name")
    _check_parent(path)


def check_directory(path: Path, replaceable: Callable[[str], bool], *, overwrite: bool) -> None:
    """Raise `TargetError` if a directory must not or cannot be made at `path`; `replaceable` accepts names of files that may be lost."""
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError(f"{path}: exists already; use --force (or overwrite=True) to replace it")
        if path.is_symlink() or not path.is_dir():
            raise TargetError(f"{path}: is not a directory; give another name")
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if (file.is_symlink() or not file.is_dir()) and not replaceable(name):
                raise TargetError(f"{path}: holds {name}, which would be lost; remove it or give another name")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TargetError(f"{path}: the directory {path.parent} is not writable")


def write_bytes(path: Path, data: bytes) -> None:
    """Make a new file that holds `data`, or none.

    Raises
    ------
    TargetError
        If there is a file already, or it cannot be written.
    """
    with Workspace(path, overwrite=False) as workspace:
        with PartialFile(workspace.folder / path.name, path) as file:
            file.write(data, 0)
        workspace.commit()


def sync_directory(path: Path) -> None:
    """Fsync a directory, where the file system supports it."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@dataclass(frozen=True)
class _Step:
    """A step of a commit.

    ``put aside`` moves what stands at the final name into the workspace; the others move `name` out of it: ``place`` to a free name,
    ``replace`` over a file, ``exchange`` against a directory.
    """

    kind: Literal["put aside", "place", "replace", "exchange"]
    name: str
    inode: int = 0  # of the new directory, for `exchange`: afterwards the old one is found in its place


@dataclass(frozen=True)
class _Commit:
    """The content of ``NAME.commit``: the steps in order, files to remove at the end, and the fingerprint of the run."""

    steps: Sequence[_Step]
    remove: Sequence[str] = ()
    fingerprint: str = ""

    @classmethod
    def parse(cls, data: bytes) -> _Commit:
        value = json.loads(data)
        return cls([_Step(**step) for step in value["steps"]], value["remove"], value["fingerprint"])


class NullWorkspace:
    """Stands in for a `Workspace` of files in a dry run; there is no folder."""

    folder = None
    finished = ""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.claim([target.name])

    def claim(self, names: Sequence[str], fingerprint: str = "") -> None:
        """Check the final names, as with ``overwrite``."""
        del fingerprint
        for name in names:
            check_target(self._target.with_name(name) if name else self._target, overwrite=True)

    def commit(self, *, fingerprint: str = "", remove: Sequence[str] = ()) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Workspace:
    """The folder in which one output is made; a context manager, which removes the folder unless a later run may resume it.

    Parameters
    ----------
    target
        The file or directory to make; of a head with shards, the head.
    overwrite
        Whether to replace what stands at the final names.
    resume
        Keep the files of an earlier run that was killed, and those of this one if it raises.
    replaceable
        For a directory: accepts the names of files that may be lost when a directory is replaced. None for files.

    Attributes
    ----------
    folder
        Where to write; files are named as they will be in the end.
    finished
        The fingerprint of a run that was killed within its commit, which is now complete; else empty.

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
        self.finished = ""
        self._names: Sequence[str] = [target.name]
        self._lock: int | None = None
        self._check(target, overwrite=overwrite or resume or os.path.lexists(self.folder))
        self._lock = self._take()
        try:
            self._recover()
            self._check(target, overwrite=overwrite or resume or bool(self.finished))
            if not resume:
                self._clear(keep=[self._own("lock")])
        except BaseException:
            if os.listdir(self.folder) == [self._own("lock")]:
                self._remove()
            self._release()
            raise

    def _own(self, suffix: str) -> str:
        return f"{self._target.name}.{suffix}"

    def _check(self, path: Path, *, overwrite: bool) -> None:
        if self._replaceable is None:
            check_target(path, overwrite=overwrite)
        else:
            check_directory(path, self._replaceable, overwrite=overwrite)

    def _take(self) -> int:
        """Make the folder or take it over, and return its lock."""
        lock = self.folder / self._own("lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            fd = -1
            try:
                with suppress(FileExistsError):
                    self.folder.mkdir(0o700)
                self._check_ours()
                fd = os.open(lock, flags, 0o600)
                take_lock(fd, self._label)
                if os.path.samestat(os.fstat(fd), lock.lstat()):
                    self._mark(fd)
                    return fd
                os.close(fd)
            except FileNotFoundError:  # another process has just removed the folder
                if fd >= 0:
                    os.close(fd)
            except OSError as error:
                if fd >= 0:
                    os.close(fd)
                if isinstance(error, TargetError):
                    raise
                raise TargetError(f"{self.folder}: cannot be made: {error.strerror}") from None

    def _mark(self, lock: int) -> None:
        try:
            if os.fstat(lock).st_size == 0:
                os.pwrite(lock, _MARKER, 0)
        except OSError as error:
            with suppress(OSError):
                (self.folder / self._own("lock")).unlink()
                self.folder.rmdir()
            raise writing_failed(self._label, error, kept=False) from None

    def _check_ours(self) -> None:
        """Raise `TargetError` unless the folder is a workspace of this user. A run killed at once leaves it empty, or the lock."""
        status = self.folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            names = os.listdir(self.folder)
            lock = self.folder / self._own("lock")
            if not names or (lock.is_file() and lock.read_bytes() in (_MARKER, *([b""] if len(names) == 1 else []))):
                return
        raise TargetError(f"{self.folder}: is in the way, and not the remains of a run that was killed; remove it")

    def claim(self, names: Sequence[str], fingerprint: str = "") -> None:
        """State the final names of the files, the head last, before they are written.

        A run with the fingerprint of the one whose commit was just completed may replace its files, for they are the same.

        Raises
        ------
        TargetError
            If one of them must not or cannot be made.
        """
        self._overwrite |= bool(fingerprint) and fingerprint == self.finished
        for name in names:
            self._check(self._label.with_name(name), overwrite=self._overwrite)
        self._names = names

    def commit(self, *, fingerprint: str = "", remove: Sequence[str] = ()) -> None:
        """Put everything in place, and remove the folder. All files must be complete and synced.

        Parameters
        ----------
        fingerprint
            Identifies the run, see `finished`.
        remove
            Names of files beside the target to remove in the end: shards of a head that was replaced.

        Raises
        ------
        TargetError
            If that fails. Nothing has changed at the final names then.
        """
        try:
            self._check_again()
            # 1. The names of the files reach the disk before the commit file, which speaks of them.
            for folder in [path for path in self.folder.rglob("*") if path.is_dir()] if self._replaceable else []:
                sync_directory(folder)
            sync_directory(self.folder)
            try:
                self._carry_out(_Commit(self._steps(), remove, fingerprint))
            except OSError as error:
                if error.errno not in _UNSUPPORTED or self._replaceable is None:
                    raise
                # Without an exchange nothing stands at the target for a moment; a kill there is completed by the next run.
                steps = [_Step("put aside", self._target.name), _Step("place", self._target.name)]
                self._carry_out(_Commit(steps, remove, fingerprint))
        except FileExistsError:
            raise TargetError(f"{self._label}: a file has appeared there meanwhile; nothing was replaced") from None
        except OSError as error:
            raise writing_failed(self._label, error, kept=self._resume) from None

    def _check_again(self) -> None:
        if self._replaceable:  # what was added to the old directory meanwhile must not be lost
            check_directory(self._label, self._replaceable, overwrite=self._overwrite)

    def _steps(self) -> list[_Step]:
        """Return the steps for what stands at the final names now.

        The head comes last, so that it never names shards that are not there. If new shards need the names of old ones, the old head is
        put aside first: a kill between two shards leaves no head, rather than one over shards of both runs.
        """
        *shards, head = self._names
        standing = [name for name in (head, *shards) if os.path.lexists(self._target.with_name(name))]
        if not self._overwrite or not standing:
            return [_Step("place", name) for name in self._names]
        if standing != [head]:
            return [*(_Step("put aside", name) for name in standing), *(_Step("place", name) for name in self._names)]
        if self._replaceable:
            return [_Step("exchange", head, (self.folder / head).lstat().st_ino)]
        return [*(_Step("place", name) for name in shards), _Step("replace", head)]

    def _carry_out(self, commit: _Commit) -> None:
        # 2. The commit point. Killed before the rename: the commit never began, and the workspace is an ordinary rest. After it, but
        #    before a step: the same, see `_recover`.
        path, draft = self.folder / self._own("commit"), self.folder / self._own("draft")
        with PartialFile(draft, self._label) as file:
            file.cut(0)
            file.write(json.dumps(asdict(commit)).encode(), 0)
        draft.replace(path)
        sync_directory(self.folder)
        try:
            # 3. Renames within one file system, each of which is done or not; killed between them: the next run does the others.
            for step in commit.steps:
                self._do(step)
        except BaseException:
            if not self._is_done(
                commit.steps[-1]
            ):  # else the output is complete, and only its workspace is left to be removed
                for step in reversed(commit.steps):
                    self._undo(step)
                path.unlink()
            raise
        self._finish(commit)

    def _finish(self, commit: _Commit) -> None:
        # 4. The renames reach the disk before anything old is lost. Killed from here on: the next run finds all steps done, and
        #    comes here again.
        sync_directory(self._target.parent)
        # 5. Shards of the old head, which no head names any more.
        for name in commit.remove:
            with suppress(OSError):
                self._target.with_name(name).unlink()
        # 6. What was put aside or exchanged; the commit file goes last but for the lock, so that this, too, can be repeated.
        self._remove()

    def _recover(self) -> None:
        """Complete the commit of a run that was killed in its midst, or forget one of which no step was done."""
        path = self.folder / self._own("commit")
        try:
            commit = _Commit.parse(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError):
            raise TargetError(
                f"{path}: is in the way, and not the commit file of a run; remove {self.folder}"
            ) from None
        # What stands at the target now may be other than when the commit was written: with no step done there is no need to replace it.
        if not any(self._is_done(step) for step in commit.steps):
            path.unlink()
            return
        try:
            for step in commit.steps:
                if not self._is_done(step):
                    self._do(step)
        except OSError as error:
            raise TargetError(
                f"{self._target.with_name(step.name)}: {error.strerror}: an earlier run was killed while it put its files in place; "
                f"move what stands there away and run again, or remove {self.folder}"
            ) from None
        self.finished = commit.fingerprint
        self._finish(commit)
        self._lock = self._take()

    def _do(self, step: _Step) -> None:
        new, final, aside = self._places(step)
        if step.kind == "put aside":
            final.rename(aside)
        elif step.kind == "replace":
            new.replace(final)
        elif step.kind == "exchange":
            _renameat2(new, final, _EXCHANGE)
        else:
            _move(new, final)

    def _is_done(self, step: _Step) -> bool:
        new, final, aside = self._places(step)
        if step.kind == "put aside":
            return os.path.lexists(aside)
        try:
            status = new.lstat()
        except FileNotFoundError:
            return True
        if step.kind == "exchange":
            return status.st_ino != step.inode
        with suppress(FileNotFoundError):  # killed between the two halves of a move by a link
            return os.path.samestat(status, final.lstat())
        return False

    def _undo(self, step: _Step) -> None:
        new, final, aside = self._places(step)
        if not self._is_done(step):
            return
        if step.kind == "put aside":
            aside.rename(final)
        elif os.path.lexists(new):  # a move by a link was interrupted in its midst
            final.unlink()
        else:
            final.rename(new)

    def _places(self, step: _Step) -> tuple[Path, Path, Path]:
        """Return where something is in the workspace, its final place, and where what it replaces is put aside."""
        return self.folder / step.name, self._target.with_name(step.name), self.folder / f"{step.name}.old"

    def _clear(self, keep: Collection[str]) -> None:
        """Remove what is in the folder, as far as possible, but some names."""
        for entry in [*os.scandir(self.folder)]:
            if entry.name not in keep:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)

    def _remove(self) -> None:
        """Remove the folder, to which a job of a cluster that nobody waits for any more may still add a file."""
        lock, commit = self._own("lock"), self._own("commit")
        for _ in range(_TRIES):
            with suppress(OSError):
                self._clear(keep=[lock, commit])
                self._clear(keep=[lock])
                if os.listdir(self.folder) != [lock]:
                    continue
                (self.folder / lock).unlink()
                try:
                    self.folder.rmdir()
                except OSError:  # without its lock it would not be known as a workspace
                    (self.folder / lock).write_bytes(_MARKER)
                    continue
                break
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        commits = os.path.lexists(
            self.folder / self._own("commit")
        )  # steps that could not be undone, left to the next run
        if (kind is not None and self._resume) or commits:
            self._release()
        else:
            self._remove()


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
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))
