"""Convert a checkpoint to a container file, or to a head file with shards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from qformat.container.replaced import shards_of
from qformat.container.target import suffixed
from qformat.container.workspace import NullWorkspace, Workspace
from qformat.converters.fingerprint import find_finished, fingerprint_of, mark_finished
from qformat.converters.output import FileContents, WriteOptions, shard_records
from qformat.converters.runners import Runner, ThreadRunner
from qformat.converters.split import shard_paths, split, stored_bytes
from qformat.files import is_remote
from qformat.pipeline.encode import Plan, make_plans
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import ShardRecord, TensorRecord


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, or of its dry run.

    Attributes
    ----------
    output
        The file.
    plans
        The codec chosen for each tensor.
    records
        The record of each tensor in the file, in the same order; after a dry run without errors, unless all values were read.
    assets
        Length of each file that was taken along, by its name.
    nbytes
        Length of the file, and of its shards.
    root
        SHA-256 of its index; None after a dry run.
    seconds
        Time that it took.
    resumed
        Number of tensors that an earlier run had finished.
    shards
        The files that hold the tensors, if it is not `output`.
    removed_shards, orphaned_shards
        Shards of a head that was replaced: those that were removed, and those that stay, as another head needs them.
    nonfinite
        Names of tensors whose codes were copied, and decode to NaN or infinity; without those of an earlier run.
    """

    output: Path
    plans: Sequence[Plan]
    records: Sequence[TensorRecord]
    assets: Mapping[str, int]
    nbytes: int
    root: str | None
    seconds: float = 0.0
    resumed: int = 0
    shards: Sequence[Path] = ()
    removed_shards: Sequence[Path] = ()
    orphaned_shards: Sequence[Path] = ()
    nonfinite: Sequence[str] = ()

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing was written."""
        return self.root is None

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
            "removed_shards": [str(path) for path in self.removed_shards],
            "left_shards": [str(path) for path in self.orphaned_shards],
        }


def convert(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    options: WriteOptions | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    runner: Runner | None = None,
    **changes: Any,
) -> Conversion:
    """Store a checkpoint as a container file.

    Parameters
    ----------
    checkpoint
        The checkpoint, see `qformat.converters.sources.detect.open_checkpoint`.
    output
        The file to write.
    recipe
        The type of each tensor.
    options
        How to convert.
    metadata
        Strings to store; None takes those of the checkpoint.
    runner
        Where to do the work; None is threads of this process. The bytes do not depend on it.
    changes
        Fields of `options` as keywords: ``convert(checkpoint, output, recipe, overwrite=True)``.

    Raises
    ------
    SourceError
        If a tensor cannot be stored as asked.
    TypeSpecError
        If an override of the recipe matches nothing.
    TargetError
        If the file cannot be written; `output` is unchanged then.
    """
    start = time.perf_counter()
    options = replace(options or WriteOptions(), **changes)
    checkpoint = checkpoint if metadata is None else replace(checkpoint, metadata=metadata)
    if runner is None or options.dry_run:
        runner = ThreadRunner()
    with _workspace(checkpoint, output, options) as workspace:
        target = workspace.target
        plans = make_plans(checkpoint.tensors, recipe, allow_nonfinite=options.allow_nonfinite)
        files = cut(checkpoint, plans, target, options, part_size=runner.part_size)
        head = files[-1]
        results = find_finished(target, head.fingerprint, options)
        shards: Sequence[ShardRecord] = shards_of(target) if results else ()
        if not results:
            workspace.claim(head.fingerprint)
            results = runner.write(files, plans, workspace.folder, options)
            mark_finished(workspace.folder, target.name, head.fingerprint, results[target.name].root)
            records = shard_records(head, results)
            shards = [*records.values()]
            workspace.commit(fingerprint=head.fingerprint, shards=records)
    written = [results[name] for name in (*head.shards, target.name) if name in results]
    return Conversion(
        output,
        plans,
        records=[record for file in written for record in file.records],
        assets=written[-1].assets,
        nbytes=sum(file.nbytes for file in written),
        root=written[-1].root,
        seconds=time.perf_counter() - start,
        resumed=sum(file.resumed for file in written),
        shards=[target.with_name(shard.name) for shard in shards],
        removed_shards=workspace.removed,
        orphaned_shards=workspace.left,
        nonfinite=[name for file in written for name in file.nonfinite],
    )


def _workspace(checkpoint: Checkpoint, output: Path, options: WriteOptions) -> Workspace | NullWorkspace:
    sources = [path for path in checkpoint.files if not is_remote(path)]
    if options.dry_run:
        return NullWorkspace(output, sources)
    return Workspace(output, overwrite=options.overwrite, resume=options.resume, sources=sources)


def cut(
    checkpoint: Checkpoint, plans: Sequence[Plan], output: Path, options: WriteOptions, *, part_size: int | None
) -> list[FileContents]:
    """Return the files to write: the shards and their head, or parts and the file that joins them, or a single file."""
    groups = [plans] if options.shard_size is None else list(split(plans, stored_bytes, options.shard_size))
    cuts = [len(group) for group in groups] if len(groups) > 1 else []
    fingerprint = fingerprint_of(checkpoint, plans, cuts, options)
    whole = FileContents(output, fingerprint, assets=checkpoint.assets, metadata=checkpoint.metadata)
    if cuts:
        paths = shard_paths(output, len(groups))
        whole = replace(whole, shards=[path.name for path in paths])
    elif part_size:
        groups = list(split(plans, stored_bytes, part_size))
        paths = [suffixed(output, f".{number}") for number in range(len(groups))]
        whole = replace(whole, parts=[path.name for path in paths])
    else:
        return [replace(whole, stop=len(plans))]
    stops = list(accumulate(len(group) for group in groups))
    return [
        *(
            FileContents(path, fingerprint and f"{fingerprint}/{path.name}", stop - len(group), stop)
            for path, group, stop in zip(paths, groups, stops, strict=True)
        ),
        whole,
    ]
