"""A checkpoint into a container file: the main job."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from qformat.container.directory import new_parts
from qformat.container.reader import ContainerReader
from qformat.container.target import check_target, mark_at, move, sync_directory
from qformat.converters.fingerprint import request_of
from qformat.converters.output import Extras, WriteOptions, Written, find_written, join_files, write_file
from qformat.converters.runners import Cluster, Part
from qformat.converters.split import shard_paths, split, stored_bytes
from qformat.errors import FormatError, TargetError
from qformat.files import is_remote
from qformat.pipeline.encode import Plan, Progress, make_plans
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import ShardRecord, TensorRecord

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
    left
        Shards of a head that was replaced, which no longer belong to anything.
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
    left: Sequence[Path] = ()

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
        return sum(plan.source.nbytes for plan in self.plans)

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
            "left_shards": [str(path) for path in self.left],
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
    allow_zeroed: bool = False,
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
    jobs, allow_nonfinite, allow_zeroed, progress
        As in `qformat.pipeline.encode.write_tensors`.

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
    options = WriteOptions(overwrite, dry_run, resume, jobs, allow_nonfinite, allow_zeroed, progress)
    check_target(output, overwrite=overwrite or dry_run or resume)
    plans = make_plans(checkpoint.tensors, recipe, allow_nonfinite=allow_nonfinite)
    groups = [plans] if shard_size is None else list(split(plans, stored_bytes, shard_size))
    paths = [] if len(groups) == 1 else shard_paths(output, len(groups))
    cuts = [len(group) for group in groups] if paths else []
    request = request_of(checkpoint, plans, metadata, cuts, allow_nonfinite=allow_nonfinite, allow_zeroed=allow_zeroed)
    extras = Extras(request, checkpoint.assets, metadata)
    for path in (output, *paths):
        asked = request if path == output else _request_of_part(request, path)
        ours = resume and bool(asked) and mark_at(path)[0] == asked
        check_target(path, overwrite=overwrite or dry_run or ours)
        _check_not_source(checkpoint, path)
    left = _shards_at(output) if overwrite else []
    finished = find_written(output, request, options)
    if finished:
        written = [finished]
    elif paths and dry_run:
        parts = [write_file(path, group, Extras(""), options) for path, group in zip(paths, groups, strict=True)]
        written = [*parts, write_file(output, [], replace(extras, shards=_shards(paths, parts)), options)]
    elif paths:
        written = _write_shards(output, paths, groups, extras, options, cluster)
    elif cluster and not dry_run:
        written = [_write_joined(output, plans, extras, options, cluster)]
    else:
        written = [write_file(output, plans, extras, options)]
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
        [path for path in left if path not in paths and path.exists()],
    )


def _shards_at(output: Path) -> list[Path]:
    """Return the shards of a head that is about to be replaced."""
    try:
        with ContainerReader(output, alone=True) as head:
            return [output.parent / shard.name for shard in head.index.shards]
    except (FormatError, OSError):
        return []


def _request_of_part(request: str, path: Path) -> str:
    """Return what identifies a shard, or a part of a file, by all that is asked for and its name."""
    return request and f"{request}/{path.name}"


def _shards(paths: Sequence[Path], parts: Sequence[Written]) -> list[ShardRecord]:
    return [ShardRecord(path.name, part.nbytes, part.root or _NO_ROOT) for path, part in zip(paths, parts, strict=True)]


def _write_shards(
    output: Path,
    paths: Sequence[Path],
    groups: Sequence[list[Plan]],
    extras: Extras,
    options: WriteOptions,
    cluster: Cluster | None,
) -> list[Written]:
    """Write shards and their head, and put them in their places when all are complete."""
    with new_parts(output, resume=options.resume) as folder:
        places = {folder / path.name: path for path in paths}
        if options.resume:  # of a run that was killed while it put them in their places
            for part, path in places.items():
                if not part.exists() and mark_at(path)[0] == _request_of_part(extras.request, path):
                    move(path, part, overwrite=False)
        parts = _write_parts([*places], groups, extras.request, options, cluster)
        head = folder / output.name
        own = replace(options, overwrite=True, resume=False)
        written = write_file(head, [], replace(extras, shards=_shards(paths, parts)), own)
        _put_in_place(places | {head: output}, options)
    return [*parts, written]


def _put_in_place(places: Mapping[Path, Path], options: WriteOptions) -> None:
    """Move complete files; if one cannot be, those that were not there before are removed, unless another run shall go on."""
    new = []
    try:
        for part, path in places.items():
            there = os.path.lexists(path)
            try:
                move(part, path, overwrite=options.overwrite)
            except FileExistsError:
                raise TargetError(f"{path}: a file has appeared there meanwhile; nothing was replaced") from None
            except OSError as error:
                raise TargetError(f"{path}: writing failed: {error.strerror}") from None
            if not there:
                new.append(path)
    except BaseException:
        for path in [] if options.resume else new:
            with suppress(OSError):
                path.unlink()
        raise
    sync_directory(path.parent)


def _write_parts(
    paths: Sequence[Path],
    groups: Sequence[list[Plan]],
    request: str,
    options: WriteOptions,
    cluster: Cluster | None,
) -> list[Written]:
    """Write one file for each group of plans, in a folder of our own."""
    requests = [_request_of_part(request, path) for path in paths]
    own = replace(options, overwrite=True)
    if cluster:
        # A job may be done twice if the worker that had done it is lost
        own = replace(own, resume=True, jobs=1, progress=None)
        stops = list(accumulate(len(group) for group in groups))
        parts = [
            Part(cluster.request, request, stop - len(group), stop, path, digest, _weights(group), own)
            for path, group, stop, digest in zip(paths, groups, stops, requests, strict=True)
        ]
        return cluster.write(parts, options.progress)
    return [
        write_file(path, group, Extras(digest), own)
        for path, group, digest in zip(paths, groups, requests, strict=True)
    ]


def _write_joined(output: Path, plans: list[Plan], extras: Extras, options: WriteOptions, cluster: Cluster) -> Written:
    """Let a cluster write parts of a file, and join them."""
    groups = list(split(plans, stored_bytes, _PART))
    with new_parts(output, resume=options.resume) as folder:
        paths = [folder / f"{number:05}.qf" for number in range(len(groups))]
        parts = _write_parts(paths, groups, extras.request, options, cluster)
        joined = join_files(output, paths, extras, replace(options, progress=None))
    return replace(joined, resumed=sum(part.resumed for part in parts))


def _weights(plans: Sequence[Plan]) -> int:
    return sum(plan.matrix.elements for plan in plans)


def _check_not_source(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse to replace what is being converted, whatever `overwrite` says."""
    for path in checkpoint.files:
        if output.exists() and not is_remote(path) and path.exists() and output.samefile(path):
            raise TargetError(f"{output}: is a file of the checkpoint that is to be converted; give another name")
