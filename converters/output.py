"""One file of a conversion: the whole result, a shard of it, the head of shards, or the result joined of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qformat.container.reader import ContainerReader
from qformat.container.writer import ContainerWriter, predict_size
from qformat.converters.fingerprint import open_finished
from qformat.errors import FormatError
from qformat.pipeline.encode import Plan, Progress, write_tensors
from qformat.records import ShardRecord, TensorRecord


@dataclass(frozen=True)
class WriteOptions:
    """How to write; as in `qformat.converters.convert.convert`."""

    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    jobs: int | None = None
    allow_nonfinite: bool = False
    allow_zeroed: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Extras:
    """What a file holds beside tensors, and what identifies all that decides its bytes."""

    request: str
    assets: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    shards: Sequence[ShardRecord] = ()


@dataclass(frozen=True)
class Written:
    """What became of a file; as in `qformat.converters.convert.Conversion`."""

    records: list[TensorRecord]
    assets: dict[str, int]
    nbytes: int
    root: str | None
    resumed: int


def write_file(output: Path, plans: Sequence[Plan], extras: Extras, options: WriteOptions) -> Written:
    """Encode tensors, sorted by name, into a file; or find out how long it would be."""
    records = [draft for plan in plans if (draft := plan.draft)] if options.dry_run else []
    if options.dry_run and len(records) == len(plans):
        contents = [(name, read()) for name, read in sorted(extras.assets.items())]
        size = predict_size(contents, records, extras.metadata, extras.shards)
        sizes = {name: len(data) for name, data in contents}
        return Written([replace(record, error=None) for record in records], sizes, size, None, 0)
    finished = find_written(output, extras.request, options)
    if finished:
        return finished
    with _begun(output, extras, options) as (writer, resumed):
        write_tensors(
            writer,
            plans,
            jobs=options.jobs,
            progress=options.progress,
            allow_nonfinite=options.allow_nonfinite,
            allow_zeroed=options.allow_zeroed,
        )
    return _done(writer, None if options.dry_run else writer.root, resumed)


def join_files(output: Path, parts: Sequence[Path], extras: Extras, options: WriteOptions) -> Written:
    """Copy the tensors of several files, which follow each other by name, into one.

    Raises
    ------
    FormatError
        If a part is damaged.
    """
    finished = find_written(output, extras.request, options)
    if finished:
        return finished
    with _begun(output, extras, options) as (writer, resumed):
        done = len(writer.records)
        for path in parts:
            with ContainerReader(path) as part:
                for record in part.tensors[done:]:
                    try:
                        writer.copy(record, part.segments(record.segments))
                    except FormatError as error:
                        raise FormatError(error.cause, path=path) from None
                done = max(0, done - len(part.tensors))
    return _done(writer, writer.root, resumed)


def find_written(output: Path, request: str, options: WriteOptions) -> Written | None:
    """Return what an earlier run has finished, if this one is to go on with it."""
    container = open_finished(output, request) if options.resume and not options.dry_run else None
    if not container:
        return None
    with container:
        tensors = container.tensors
        sizes = {asset.name: asset.size for asset in container.index.assets}
        if options.progress:
            options.progress(sum(record.elements for record in tensors))
        return Written(tensors, sizes, container.total_size, container.root, len(tensors))


@contextmanager
def _begun(output: Path, extras: Extras, options: WriteOptions) -> Iterator[tuple[ContainerWriter, int]]:
    """Begin a file, and yield its writer after the assets, and how many tensors it has already."""
    with ContainerWriter(
        None if options.dry_run else output,
        overwrite=options.overwrite,
        metadata=extras.metadata,
        request=extras.request,
        resume=options.resume,
    ) as writer:
        writer.shards = [*extras.shards]
        done = {asset.name for asset in writer.assets}
        for name, read in sorted(extras.assets.items()):
            if name not in done:
                writer.asset(name, read())
        yield writer, len(writer.records)


def _done(writer: ContainerWriter, root: str | None, resumed: int) -> Written:
    sizes = {asset.name: asset.size for asset in writer.assets}
    return Written(writer.records, sizes, writer.file_size, root, resumed)
