"""The fingerprint of a conversion: a digest of everything that decides its bytes, by which ``--resume`` knows its own files."""

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
from qformat.container.verify import verify
from qformat.converters.output import FileResult, WriteOptions
from qformat.errors import TargetError
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
    tensors = [
        (p.source.name, p.source.shape, p.source.dtype.name, type(p.encoder).__name__, str(p.encoder)) for p in plans
    ]
    every = [
        qformat.__version__,
        MAJOR,
        MINOR,
        [identity(path) for path in checkpoint.files],
        sorted(checkpoint.assets),
        checkpoint.variant,
        dict(checkpoint.metadata),
        tensors,
        list(cuts),
        options.allow_nonfinite,
        options.allow_zeroed,
    ]
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def mark_finished(folder: Path | None, name: str, fingerprint: str, root: str | None) -> None:
    """Record the fingerprint of a complete file in an extended attribute, where the file system has them.

    The root is there because writing another file over this one, as cp does, leaves the attribute.
    """
    if folder and fingerprint:
        with suppress(OSError, AttributeError):  # macOS has no setxattr
            os.setxattr(folder / name, _ATTRIBUTE, f"{fingerprint} {root}".encode())


def find_finished(path: Path, fingerprint: str, options: WriteOptions) -> dict[str, FileResult]:
    """Return the result of an earlier, finished run after verifying all bytes; empty if there is none.

    Raise `TargetError` if it is damaged and must not be replaced.
    """
    if options.dry_run or not options.resume or not fingerprint:
        return {}
    try:
        marked, _, root = os.getxattr(path, _ATTRIBUTE).decode("ascii", "replace").partition(" ")
    except (OSError, AttributeError):
        return {}
    if marked != fingerprint:
        return {}
    damaged = [report.path for report in verify([str(path)]) if not report.ok]
    if damaged and not options.overwrite:
        raise TargetError(f"{damaged[0]}: exists already, but is damaged; use --force to make it again")
    if damaged:
        return {}
    with ContainerReader(path) as container:
        if container.root != root:
            return {}
        if options.progress:
            options.progress(sum(record.elements for record in container.tensors))
        sizes = {asset.name: asset.size for asset in container.index.assets}
        count = len(container.tensors)
        return {path.name: FileResult(container.tensors, sizes, container.total_size, container.root, count)}
