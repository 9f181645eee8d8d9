"""Kill a commit before each of its system calls in turn, and run again: ``kill_commits.py FOLDER SCENARIO RENAMEAT2``."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import qformat
from qformat.container import workspace
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe

CALLS = ("fsync", "mkdir", "rmdir", "rename", "replace", "link", "unlink", "ftruncate", "pwrite", "open")
folder, (scenario, _, force) = Path(sys.argv[1]), sys.argv[2].partition(" --force")
KILLED = 9


def run(number: int, target: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Make a target of the checkpoint of a number; the old one is 0, the new one 1."""
    source = folder / f"{number}.qf"
    size = 2000 if scenario == "shards" or (scenario == "other shards" and number) else 4000
    if scenario == "hf":
        export(source, target, "hf", overwrite=overwrite)
    else:
        options = {"shard_size": None if scenario == "file" else size, "overwrite": overwrite, "resume": resume}
        convert(open_checkpoint(source), target, Recipe.parse("f32"), jobs=1, **options)


def state(target: Path) -> str:
    """Return a digest of a target that can be read, or nothing if it is absent."""
    if not os.path.lexists(target):
        return ""
    if target.is_dir():
        data = b"".join(file.read_bytes() for file in sorted(target.iterdir()))
    else:
        with qformat.safe_open(target, verify=True) as file:
            data = b"".join(file.get_tensor(name).tobytes() for name in file.keys())  # noqa: SIM118
    return hashlib.sha256(data).hexdigest()


def killed(count: int, target: Path, *, resume: bool) -> bool:
    """Run in a process of its own, which ends before a system call of the commit; return whether it came so far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    left = [count]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    commit = workspace.Workspace.commit

    def patched(self: Any, **options: Any) -> None:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        workspace._renameat2 = counted(workspace._renameat2)
        commit(self, **options)

    workspace.Workspace.commit = patched  # type: ignore[method-assign]
    run(1, target, overwrite=bool(force), resume=resume)
    os._exit(0)


def main() -> None:
    rng = np.random.default_rng(0)
    for number in (0, 1):
        arrays = {f"w{i}": rng.normal(size=(8, 32)).astype(np.float32) for i in range(4)}
        qformat.save_file(arrays, folder / f"{number}.qf", assets={"config.json": b"{}"})
    if sys.argv[3] == "0":

        def missing(*_: object) -> None:
            raise OSError(errno.ENOSYS, "not there")

        workspace._renameat2 = missing
    for number in (0, 1):
        (folder / f"whole{number}").mkdir()
        run(number, folder / f"whole{number}" / "m", overwrite=False)
    old, new = (state(folder / f"whole{number}" / "m") for number in (0, 1))
    count, more = 0, True
    while more:
        place = folder / str(count)
        place.mkdir()
        target, resume = place / "m", scenario != "hf" and count % 2 == 1
        if force:
            run(0, target, overwrite=True)
        more = killed(count, target, resume=resume)
        found = state(target)
        atomic = sys.argv[3] == "1" and scenario != "shards"
        assert found in ((old if force else "", new) if atomic else (old if force else "", "", new)), (count, found)
        try:
            run(1, target, overwrite=bool(force), resume=resume)
        except qformat.TargetError as error:  # killed when nothing was left to do
            if found != new or "exists already" not in str(error):
                raise
        assert state(target) == new, count
        assert sorted(path.name for path in place.iterdir()) == sorted(
            path.name for path in (folder / "whole1").iterdir()
        ), count
        shutil.rmtree(place)
        count += 1
    print(count)


main()
