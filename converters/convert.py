"""A checkpoint into a container file: the main job."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from qformat.converters.cluster import Cluster, Part
from qformat.converters.resume import request_of
from qformat.converters.split import shard_paths, split
from qformat.converters.written import Beside, WriteOptions, Written, join_files, write_file

from qformat.container.target import check_target, remove_files
from qformat.encode import Plan, Progress, make_plans
from qformat.errors import TargetError
from qformat.files import is_remote
from qformat.recipe import Recipe
from qformat.records import ShardRecord, TensorRecord
from qformat.source import Checkpoint

_NO_ROOT = "0" * 64
_PART = 512 << 20  # bytes of the files that a cluster writes and that are joined then


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
        Length of the file, and of its shards.
    root
        SHA-256 of its index; None after a dry run.
    seconds
        Time that it took.
    resumed
        How many tensors an earlier run had finished.
    shards
        The files that hold the tensors, if it is not `output`.
    """

    output: Path
    plans: list[Plan]
    records: list[TensorRecord]
    assets: dict[str, int]
    nbytes: int
    root: str | None
    seconds: float
    resumed: int = 0
    shards: Sequence[Path] = ()

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
        return sum(plan.source_bytes for plan in self.plans)

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
            "resumed_tensors": self.resumed,
            "shards": [str(path) for path in self.shards],
        }


def convert(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    shard_size: int | None = None,
    cluster: Cluster | None = None,
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
        What `qformat.converters.sources.detect.open_checkpoint` found.
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
    resume
        Go on where an earlier run that was asked for the same was when it was killed; one that ends in an exception leaves what it
        has done. A file that was finished is left as it is.
    shard_size
        If the tensors take more bytes than this, they go into several files beside `output`, which is their head then.
    cluster
        Where to do the work; None is here. The bytes do not depend on it.
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
    options = WriteOptions(overwrite, dry_run, resume, jobs, allow_nonfinite, allow_vanished, progress)
    check_target(output, overwrite=overwrite or dry_run or resume)
    plans = make_plans(checkpoint.tensors, recipe, allow_nonfinite=allow_nonfinite)
    groups = [plans] if shard_size is None else list(split(plans, shard_size))
    paths = [] if len(groups) == 1 else shard_paths(output, len(groups))
    for path in (output, *paths):
        check_target(path, overwrite=overwrite or dry_run or resume)
        _check_not_source(checkpoint, path)
    beside = Beside(request_of(checkpoint, plans, metadata), checkpoint.assets, metadata)
    if dry_run:
        cluster = None
    if paths:
        parts = _write_parts(paths, groups, beside.request, options, cluster)
        shards = [
            ShardRecord(path.name, part.nbytes, part.root or _NO_ROOT) for path, part in zip(paths, parts, strict=True)
        ]
        written = [*parts, write_file(output, [], replace(beside, shards=shards), options)]
    elif cluster:
        written = [_write_joined(output, plans, beside, options, cluster)]
    else:
        written = [write_file(output, plans, beside, options)]
    return Conversion(
        output,
        plans,
        [record for file in written for record in file.records],
        written[-1].assets,
        sum(file.nbytes for file in written),
        written[-1].root,
        time.perf_counter() - start,
        sum(file.resumed for file in written),
        paths,
    )


def _write_parts(
    paths: Sequence[Path],
    groups: Sequence[list[Plan]],
    request: str,
    options: WriteOptions,
    cluster: Cluster | None,
) -> list[Written]:
    """Write one file for each group of plans; if one fails, none is left, unless another run shall go on with them."""
    requests = [request and f"{request}/{path.name}" for path in paths]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        if cluster:
            # A job may be done twice if the worker that had done it is lost
            own = replace(options, overwrite=True, resume=True, jobs=1, progress=None)
            stops = list(accumulate(len(group) for group in groups))
            parts = [
                Part(cluster.request, stop - len(group), stop, path.absolute(), digest, _weights(group), own)
                for path, group, stop, digest in zip(paths, groups, stops, requests, strict=True)
            ]
            return cluster.write(parts, options.progress)
        return [
            write_file(path, group, Beside(digest), options)
            for path, group, digest in zip(paths, groups, requests, strict=True)
        ]
    except BaseException:
        if not options.resume and not options.dry_run:
            for path in new:
                remove_files(path)
        raise


def _write_joined(output: Path, plans: list[Plan], beside: Beside, options: WriteOptions, cluster: Cluster) -> Written:
    """Let a cluster write parts of a file, and join them."""
    groups = list(split(plans, _PART))
    folder = output.with_name(output.name + ".parts")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:05}.qf" for number in range(len(groups))]
    try:
        parts = _write_parts(paths, groups, beside.request, options, cluster)
        joined = join_files(output, paths, beside, replace(options, progress=None))
    except BaseException:
        if not options.resume:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    return replace(joined, resumed=sum(part.resumed for part in parts))


def _weights(plans: Sequence[Plan]) -> int:
    return sum(plan.matrix.elements for plan in plans)


def _check_not_source(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse to replace what is being converted, whatever `overwrite` says."""
    for path in checkpoint.files:
        if output.exists() and not is_remote(path) and path.exists() and output.samefile(path):
            raise TargetError(f"{output}: is a file of the checkpoint that is to be converted; give another name")
