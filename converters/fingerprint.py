"""The fingerprint of a conversion: a digest of everything that decides its bytes. By it, ``--resume`` knows the work of an earlier run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import qformat
from qformat.container.layout import MAJOR, MINOR
from qformat.container.reader import ContainerReader
from qformat.converters.output import FileResult, WriteOptions
from qformat.errors import FormatError, TargetError
from qformat.files import identity
from qformat.pipeline.encode import Plan
from qformat.pipeline.source import Checkpoint

_ATTRIBUTE = "user.qformat.finished"


def fingerprint_of(checkpoint: Checkpoint, plans: Sequence[Plan], cuts: Sequence[int], options: WriteOptions) -> str:
    """Return the fingerprint, in which sizes and times of the source's files stand for their contents; empty without files.

    `cuts` holds the number of tensors of each shard. The options that allow something decide whether there is a file at all.
    """
    if not checkpoint.files:
        return ""
    every = [
        qformat.__version__,
        MAJOR,
        MINOR,
        [identity(path) for path in checkpoint.files],
        sorted(checkpoint.assets),
        checkpoint.variant,
        dict(checkpoint.metadata),
        [(plan.record.to_json(), str(plan.codec)) for plan in plans],
        list(cuts),
        options.allow_nonfinite,
        options.allow_zeroed,
    ]
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def mark_finished(path: Path, fingerprint: str, root: str) -> None:
    """Record the fingerprint of a complete file in an extended attribute, where the file system has them.

    The root is there because writing another file over this one, as cp does, leaves the attribute.
    """
    with suppress(OSError, AttributeError):  # macOS has no setxattr
        os.setxattr(path, _ATTRIBUTE, f"{fingerprint} {root}".encode())


def find_finished(path: Path, fingerprint: str, options: WriteOptions, *, completed: bool) -> FileResult | None:
    """Return the complete file of an earlier run with the same fingerprint, after a check of all its bytes; None if there is none.

    Parameters
    ----------
    path
        The file.
    fingerprint
        The fingerprint of this run.
    options
        The file is looked for with `resume`; a damaged one is made again with `overwrite`.
    completed
        Whether the commit of that run was just completed: then it is looked for without `resume`, too.

    Raises
    ------
    TargetError
        If the file is damaged.
    """
    try:
        marked, _, root = os.getxattr(path, _ATTRIBUTE).decode("ascii", "replace").partition(" ")
    except (OSError, AttributeError):
        marked, root = "", ""
    marked_so = options.resume and not options.dry_run and marked == fingerprint
    if not fingerprint or not (completed or marked_so):
        return None
    try:
        with ContainerReader(path) as container:
            if not completed and container.root != root:
                return None
            for record in container.tensors:
                home = container.home(record.name)
                for segment, data in zip(record.segments, home.segments(record.segments), strict=True):
                    home.check(segment, data, record.label)
            sizes = {asset.name: len(container.asset(asset.name)) for asset in container.index.assets}
            if options.progress:
                options.progress(sum(record.elements for record in container.tensors))
            count = len(container.tensors)
            return FileResult(container.tensors, sizes, container.total_size, container.root, count)
    except (FormatError, OSError) as error:
        if options.overwrite:
            return None
        raise TargetError(f"{path}: exists already, but is damaged: {error}; use --force to make it again") from None
