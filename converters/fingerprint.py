"""Whether what a run left is what another one is asked for (see `qformat.container.journal`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import qformat
from qformat.container.layout import MAJOR, MINOR
from qformat.container.reader import ContainerReader
from qformat.container.target import mark_at, tidy
from qformat.errors import FormatError
from qformat.files import identity
from qformat.pipeline.encode import Plan
from qformat.pipeline.source import Checkpoint


def request_of(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    metadata: Mapping[str, str],
    cuts: Sequence[int] = (),
    *,
    allow_nonfinite: bool = False,
    allow_zeroed: bool = False,
) -> str:
    """Return a digest of what decides the bytes of a file, with the sizes and times of the source's files for their contents.

    It is empty if there are no files. `cuts` is how many tensors each shard has, if there are some; what is allowed decides whether
    there is a file at all.
    """
    if not checkpoint.files:
        return ""
    files = [identity(path) for path in checkpoint.files]
    tensors = [
        (p.source.name, p.source.shape, p.source.dtype.name, type(p.encoder).__name__, str(p.encoder)) for p in plans
    ]
    every = [
        qformat.__version__,
        MAJOR,
        MINOR,
        files,
        sorted(checkpoint.assets),
        checkpoint.variant,
        dict(metadata),
        tensors,
        list(cuts),
        allow_nonfinite,
        allow_zeroed,
    ]
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def open_finished(output: Path, request: str) -> ContainerReader | None:
    """Open the complete file that an earlier run has made of the same request, with its shards; None if there is none."""
    marked, root = mark_at(output)
    if not request or marked != request:
        return None
    try:
        container = ContainerReader(output)
    except (FormatError, OSError):
        return None
    if container.root != root:  # another file was written over it
        container.close()
        return None
    tidy(output)
    return container
