"""One file of a conversion: the whole result, a shard, the head of shards, or a part that is joined with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from qformat.container.partial import Journal, NullTarget, PartialFile
from qformat.container.reader import ContainerReader
from qformat.container.writer import ContainerWriter
from qformat.converters.split import with_digest
from qformat.errors import FormatError
from qformat.pipeline.encode import Plan, Progress, write_tensors
from qformat.records import ShardRecord, TensorRecord

_NO_ROOT = "0" * 64


@dataclass(frozen=True)
class WriteOptions:
    """How to convert.

    Attributes
    ----------
    overwrite
        Replace a file that stands at the output.
    resume
        Continue a run with the same fingerprint that was killed, and keep the finished tensors if this one raises. A finished file
        is left as it is.
    dry_run
        Write nothing; predict the length of the files, exactly. If it depends on values, this takes as long as writing.
    shard_size
        If the tensors take more bytes than this, they go into several files beside the output, which is their head then.
    jobs, allow_nonfinite, allow_zeroed, progress
        As in `qformat.pipeline.encode.write_tensors`.
    """

    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    shard_size: int | None = None
    jobs: int | None = None
    allow_nonfinite: bool = False
    allow_zeroed: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class FileContents:
    """The contents of a file.

    Attributes
    ----------
    path
        The final path.
    fingerprint
        Identifies everything that decides the bytes; empty if that is unknown.
    start, stop
        The range of plans to encode into it.
    parts
        Names of files written before, whose tensors are copied into it instead.
    shards
        Names of files written before, of which it is the head; theirs get a digest when they are placed.
    assets, metadata
        As in `qformat.pipeline.source.Checkpoint`.
    """

    path: Path
    fingerprint: str = ""
    start: int = 0
    stop: int = 0
    parts: Sequence[str] = ()
    shards: Sequence[str] = ()
    assets: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileResult:
    """A file that was written; `root` is None in a dry run, `resumed` the number of tensors that an earlier run had written.

    `nonfinite` has the names of tensors whose codes were copied, and decode to NaN or infinity.
    """

    records: Sequence[TensorRecord]
    assets: Mapping[str, int]
    nbytes: int
    root: str | None
    resumed: int = 0
    nonfinite: Sequence[str] = ()


def write_file(
    contents: FileContents,
    plans: Sequence[Plan],
    written: Mapping[str, FileResult],
    folder: Path | None,
    options: WriteOptions,
) -> FileResult:
    """Write a file into the folder of a workspace, or find its length if that is None.

    `plans` are those of the whole conversion, `written` the files that were written before, by name. Raises as
    `qformat.pipeline.encode.write_tensors` does, and `FormatError` if a part is damaged.
    """
    plans = plans[contents.start : contents.stop]
    drafts = [draft for plan in plans if (draft := plan.draft)] if folder is None else []
    predicted = folder is None and len(drafts) == len(plans)
    nonfinite: list[str] = []
    path = folder / contents.path.name if folder else None
    with (
        PartialFile(path, contents.path, kept=options.resume) if path else NullTarget() as file,
        _journal(contents, path, options) as journal,
        ContainerWriter(file, metadata=contents.metadata, journal=journal) as writer,
    ):
        resumed = len(writer.records)
        writer.shards = [*shard_records(contents, written).values()]
        for name in sorted(contents.assets)[len(writer.assets) :]:
            writer.asset(name, contents.assets[name]())
        if contents.parts and folder:
            _join(writer, [folder / name for name in contents.parts])
            resumed = sum(written[name].resumed for name in contents.parts)
            nonfinite = [tensor for name in contents.parts for tensor in written[name].nonfinite]
        elif predicted:
            for draft in drafts:
                writer.reserve(draft)
        else:
            nonfinite = write_tensors(
                writer,
                plans,
                jobs=options.jobs,
                progress=options.progress,
                allow_nonfinite=options.allow_nonfinite,
                allow_zeroed=options.allow_zeroed,
            )
    sizes = {asset.name: asset.size for asset in writer.assets}
    records = [replace(record, error=None) for record in writer.records] if predicted else writer.records
    return FileResult(records, sizes, writer.file_size, writer.root if folder else None, resumed, nonfinite)


def shard_records(head: FileContents, written: Mapping[str, FileResult]) -> dict[str, ShardRecord]:
    """Return what a head says of its shards, which were written before, by the names under which they were written."""
    roots = {name: written[name].root or _NO_ROOT for name in head.shards}
    return {name: ShardRecord(with_digest(name, root), written[name].nbytes, root) for name, root in roots.items()}


def _journal(contents: FileContents, path: Path | None, options: WriteOptions) -> Journal | nullcontext[None]:
    if path is None or not contents.fingerprint:
        return nullcontext()
    return Journal(path, contents.path, contents.fingerprint, kept=options.resume)


def _join(writer: ContainerWriter, parts: Sequence[Path]) -> None:
    """Copy the tensors of several files, which follow each other by name, but those that the writer has already."""
    done = len(writer.records)
    for path in parts:
        with ContainerReader(path) as part:
            for record in part.tensors[done:]:
                try:
                    writer.copy(record, part.segments(record.segments))
                except FormatError as error:
                    raise FormatError(error.cause, path=path) from None
            done = max(0, done - len(part.tensors))
