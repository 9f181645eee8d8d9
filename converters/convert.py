"""A checkpoint into a container file: the main job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qformat.container.target import check_target
from qformat.container.writer import ContainerWriter, predict_size
from qformat.encode import Plan, Progress, make_plans, write_tensors
from qformat.errors import TargetError
from qformat.recipe import Recipe
from qformat.records import TensorRecord
from qformat.source import Checkpoint


@dataclass(frozen=True)
class Conversion:
    """What a conversion made, or will make.

    Attributes
    ----------
    output
        The file.
    plans
        What became of each tensor.
    records
        What the file says of each tensor, in the same order; after a dry run without errors, unless all values were read.
    assets
        Length of each file that was taken along, by its name.
    nbytes
        Length of the file.
    root
        SHA-256 of its index; None after a dry run.
    seconds
        Time that it took.
    """

    output: Path
    plans: list[Plan]
    records: list[TensorRecord]
    assets: dict[str, int]
    nbytes: int
    root: str | None
    seconds: float

    @property
    def params(self) -> int:
        """Number of weights."""
        return sum(plan.matrix.elements for plan in self.plans)

    @property
    def bpw(self) -> float:
        """Bits of all tensors together for each weight."""
        stored = sum(record.nbytes for record in self.records)
        return stored * 8 / self.params if self.params else 0.0

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors in the checkpoint."""
        return sum(plan.matrix.elements * plan.source.dtype.size for plan in self.plans)

    def to_json(self) -> dict[str, Any]:
        """Return the values under the names of the JSON contract."""
        return {
            "output": str(self.output),
            "tensors": len(self.plans),
            "params": self.params,
            "bytes": self.nbytes,
            "source_bytes": self.source_bytes,
            "bpw": self.bpw,
            "assets": self.assets,
            "root_sha256": self.root,
            "seconds": self.seconds,
        }


def convert(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    allow_nonfinite: bool = False,
    allow_vanished: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Store a checkpoint as a container file.

    Parameters
    ----------
    checkpoint
        What `qformat.converters.detect.open_checkpoint` found.
    output
        The file to write.
    recipe
        Which type for which tensor.
    overwrite
        Replace a file at `output`.
    metadata
        Strings to store along; None takes those of the checkpoint.
    dry_run
        Write nothing; predict the length of the file, exactly. If it depends on values, this takes as long as writing.
    jobs, allow_nonfinite, allow_vanished, progress
        As in `qformat.encode.write_tensors`.

    Raises
    ------
    SourceError
        If a tensor cannot be stored as asked.
    TypeSpecError
        If an override of the recipe matches nothing.
    TargetError
        If the file cannot be written; nothing is left at `output` then.
    """
    start = time.perf_counter()
    metadata = checkpoint.metadata if metadata is None else metadata
    check_target(output, overwrite=overwrite or dry_run)
    _check_not_source(checkpoint, output)
    plans = make_plans(checkpoint.tensors, recipe, allow_nonfinite=allow_nonfinite)
    sizes: dict[str, int] = {}

    def assets() -> Iterator[tuple[str, bytes]]:
        for name, read in sorted(checkpoint.assets.items()):
            data = read()
            sizes[name] = len(data)
            yield name, data

    if dry_run and not any(plan.codec.chunked or plan.codec.layered for plan in plans):
        records = [plan.record for plan in plans]
        size = predict_size(assets(), records, metadata)
        unmeasured = [replace(record, error=None) for record in records]
        return Conversion(output, plans, unmeasured, sizes, size, None, time.perf_counter() - start)
    with ContainerWriter(None if dry_run else output, overwrite=overwrite, metadata=metadata) as writer:
        for name, data in assets():
            writer.asset(name, data)
        write_tensors(
            writer,
            plans,
            jobs=jobs,
            progress=progress,
            allow_nonfinite=allow_nonfinite,
            allow_vanished=allow_vanished,
        )
    seconds = time.perf_counter() - start
    root = None if dry_run else writer.root
    return Conversion(output, plans, writer.records, sizes, writer.file_size, root, seconds)


def _check_not_source(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse to replace what is being converted, whatever `overwrite` says."""
    for path in checkpoint.files:
        if output.exists() and path.exists() and output.samefile(path):
            raise TargetError(f"{output}: is a file of the checkpoint that is to be converted; give another name")
