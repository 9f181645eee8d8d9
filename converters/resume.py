"""Whether what a run left is what another one is asked for (see `qformat.container.journal`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import qformat
from qformat.container.index import Index
from qformat.container.layout import MAJOR, MINOR
from qformat.container.reader import ContainerReader
from qformat.container.target import request_at, tidy
from qformat.encode import Plan
from qformat.errors import FormatError
from qformat.files import identity
from qformat.source import Checkpoint


def request_of(checkpoint: Checkpoint, plans: Sequence[Plan], metadata: Mapping[str, str]) -> str:
    """Return a digest of what decides the bytes of a file, with the sizes and times of the source's files for their contents.

    It is empty if there are no files.
    """
    if not checkpoint.files:
        return ""
    files = [identity(path) for path in checkpoint.files]
    tensors = [(plan.record.to_json(), str(plan.codec)) for plan in plans]
    every = [
        qformat.__version__,
        MAJOR,
        MINOR,
        files,
        sorted(checkpoint.assets),
        checkpoint.variant,
        dict(metadata),
        tensors,
    ]
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def find_finished(output: Path, request: str) -> tuple[Index, str] | None:
    """Return the index and the root of the complete file that an earlier run has made of the same request, or None."""
    if not request or request_at(output) != request:
        return None
    try:
        with ContainerReader(output) as container:
            tidy(output)
            return container.index, container.root
    except (FormatError, OSError):
        return None
