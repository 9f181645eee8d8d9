"""Check files: containers segment by segment, and any file against a SHA256SUMS list. Needs no codec."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qformat.container import sums
from qformat.container.index import check_sorted
from qformat.container.layout import MAGIC, align
from qformat.container.reader import ContainerReader
from qformat.errors import FormatError, IntegrityError, PathLike
from qformat.files import beside, open_regular
from qformat.records import AssetRecord, Segment, ShardRecord

#: called with the number of bytes that were just checked
Progress = Callable[[int], None]

_CHUNK = 1 << 20
_MAX_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a file.

    Attributes
    ----------
    what
        What is wrong.
    tensor, asset
        Name of what it belongs to, if it is one.
    segment
        Name of its segment.
    """

    what: str
    tensor: str | None = None
    asset: str | None = None
    segment: str | None = None


@dataclass
class FileReport:
    """What checking one file found.

    Attributes
    ----------
    path
        The file, as it was named.
    errors
        Empty if all is well.
    root
        Root digest of a container whose index is intact.
    outdated
        Whether an older writer made it.
    """

    path: str
    errors: list[Damage] = field(default_factory=list)
    root: str | None = None
    outdated: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


def sha256_of(path: PathLike, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal; raise `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(Path(path)) as file:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := os.readv(file.fileno(), [view]):
            digest.update(view[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def verify(
    paths: list[str], *, quick: bool = False, jobs: int = 1, progress: Progress | None = None
) -> list[FileReport]:
    """Check containers, and the files that SHA256SUMS lists name.

    Parameters
    ----------
    paths
        Containers and lists, told apart by their content.
    quick
        Only check header, index and trailer of a container; the files of a list are hashed all the same.
    jobs
        Threads that hash.
    progress
        Told of the bytes that were checked.

    Returns
    -------
    list of FileReport
        One for each container, and one for each line of a list.
    """
    reports = []
    stopped = threading.Event()

    def watched(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        if progress:
            progress(count)

    pool = ThreadPoolExecutor(jobs, thread_name_prefix="qformat-verify")
    try:
        for path in paths:
            try:
                if _is_list(path):
                    reports += _verify_list(path, pool, watched)
                else:
                    reports += _verify_containers(path, pool, watched, quick=quick)
            except OSError as error:
                reports.append(FileReport(path, [Damage(_cannot_read(error))]))
    finally:
        stopped.set()  # nothing is under way any more, unless the user has stopped the run
        pool.shutdown(cancel_futures=True)
    return reports


def _cannot_read(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _verify_containers(path: str, pool: ThreadPoolExecutor, progress: Progress, *, quick: bool) -> list[FileReport]:
    """Check a container, and its shards if it is the head of some."""
    head, shards, names = _verify_container(path, pool, progress, quick=quick)
    reports = [head]
    for shard in shards:
        report, more = _verify_shard(str(beside(Path(path), shard.name)), shard, pool, progress, quick=quick)
        names += more
        reports.append(report)
    try:
        check_sorted("tensor", names)
    except FormatError as error:
        head.errors.append(Damage(f"its shards do not fit together: {error.cause}"))
    return reports


def _verify_shard(
    path: str, shard: ShardRecord, pool: ThreadPoolExecutor, progress: Progress, *, quick: bool
) -> tuple[FileReport, list[str]]:
    """Check a file that has to be a certain shard, and return the tensors that it names."""
    try:
        report, _, names = _verify_container(path, pool, progress, quick=quick, shard=shard)
    except OSError as error:
        return FileReport(path, [Damage(_cannot_read(error))]), []
    return report, names


def _verify_container(
    path: str, pool: ThreadPoolExecutor, progress: Progress, *, quick: bool, shard: ShardRecord | None = None
) -> tuple[FileReport, tuple[ShardRecord, ...], list[str]]:
    """Check one file, which may have to be a certain shard, and return the shards and the tensors that it names."""
    report = FileReport(path)
    try:
        container = ContainerReader(path, alone=True)
    except FormatError as error:
        at = f" (at byte {error.offset})" if error.offset is not None else ""
        report.errors.append(Damage(error.cause + at))
        return report, (), []
    with container:
        if shard:
            try:
                container.check_is(shard)
            except FormatError as error:
                report.errors.append(Damage(error.cause))
        report.root = container.root
        report.outdated = container.outdated
        if not quick:
            _check_segments(container, report, pool, progress)
            _check_assets(container, report)
            try:
                container.check_unchanged()
            except IntegrityError as error:
                report.errors.append(Damage(error.cause))
        return report, container.index.shards, [record.name for record in container.index.tensors]


def _check_segments(
    container: ContainerReader, report: FileReport, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    # The longest first, so that no thread ends long after the others
    owned = sorted(container.index.segments(), key=lambda item: -item[1].length)
    found = pool.map(lambda item: _check_segment(container, item[1], progress), owned)
    damaged = [(owner, segment, what) for (owner, segment), what in zip(owned, found, strict=True) if what]
    for owner, segment, cause in sorted(damaged, key=lambda item: item[1].offset):
        what = f"{cause} (its bytes are {segment.offset} to {segment.stop - 1})"
        if isinstance(owner, AssetRecord):
            report.errors.append(Damage(what, asset=owner.name))
        else:
            report.errors.append(Damage(what, tensor=owner.name, segment=segment.name))


def _check_assets(container: ContainerReader, report: FileReport) -> None:
    """Decode the assets whose bytes are right."""
    damaged = {damage.asset for damage in report.errors}
    for asset in container.index.assets:
        if asset.name not in damaged and not asset.refusal:
            try:
                container.asset(asset.name)
            except FormatError as error:
                report.errors.append(Damage(error.cause, asset=asset.name))


def _check_segment(container: ContainerReader, segment: Segment, progress: Progress) -> str:
    """Return what is wrong with a segment or the padding after it, or an empty string."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_CHUNK, segment.length))
    position, stop = segment.offset, segment.stop
    padding_size = align(stop) - stop
    try:
        while position < stop:
            view = memoryview(buffer)[: stop - position]
            container.fill(view, position)
            digest.update(view)
            position += len(view)
            progress(len(view))
        padding = bytearray(padding_size)
        container.fill(memoryview(padding), stop)
    except OSError as error:
        return _cannot_read(error)
    except IntegrityError as error:
        return error.cause
    if digest.hexdigest() != segment.sha256:
        return "SHA-256 does not match: it is damaged"
    if any(padding):
        return "the padding after it is not zero: bytes were changed"
    return ""


def _is_list(path: str) -> bool:
    with open_regular(Path(path)) as file:
        start = file.read(1 << 16)
    return not start.startswith(MAGIC[:4]) and sums.is_list(start)


def _verify_list(path: str, pool: ThreadPoolExecutor, progress: Progress) -> list[FileReport]:
    reports: list[FileReport] = []
    checks = []
    for entry in _entries(path):
        if entry.problem:
            reports.append(FileReport(path, [Damage(f"line {entry.number} {entry.problem}")]))
            continue
        report = FileReport(str(_listed(path, entry)))
        reports.append(report)
        checks.append((report, pool.submit(_check_sum, Path(report.path), entry.digest, progress)))
    for report, check in checks:
        what = check.result()
        if what:
            report.errors.append(Damage(what))
    listed = {os.path.normpath(report.path) for report, _ in checks}
    for report, _ in checks:
        if (
            report.ok
        ):  # the digests of a head's shards are in the head: they are checked even if the list is silent about them
            reports += _verify_unlisted_shards(report, listed, pool, progress)
    return reports


def _verify_unlisted_shards(
    head: FileReport, listed: set[str], pool: ThreadPoolExecutor, progress: Progress
) -> list[FileReport]:
    with open_regular(Path(head.path)) as file:
        if file.read(len(MAGIC)) != MAGIC:
            return []
    try:
        with ContainerReader(head.path, alone=True) as container:
            shards = container.index.shards
    except FormatError as error:
        head.errors.append(Damage(error.cause))
        return []
    places = [(str(beside(Path(head.path), shard.name)), shard) for shard in shards]
    return [
        _verify_shard(path, shard, pool, progress, quick=False)[0]
        for path, shard in places
        if os.path.normpath(path) not in listed
    ]


def _entries(path: str) -> list[sums.Entry]:
    with open_regular(Path(path)) as file:
        if os.fstat(file.fileno()).st_size > _MAX_LIST_BYTES:
            raise OSError(errno.EFBIG, "the list is too long", path)
        return list(sums.parse(file.read()))


def _listed(path: str, entry: sums.Entry) -> Path:
    """Return the file of an entry: beside the list, whatever the working directory."""
    return Path(path).parent / entry.name


def _check_sum(path: Path, digest: str, progress: Progress) -> str:
    try:
        found = sha256_of(path, progress)
    except OSError as error:
        return _cannot_read(error)
    return "" if found == digest else "SHA-256 does not match the list"


def bytes_to_check(paths: list[str]) -> int:
    """Return about how many bytes `verify` will read, for a progress bar; what cannot be read counts as nothing."""
    total = 0
    for path in paths:
        with suppress(OSError, FormatError):
            if _is_list(path):
                targets = [_listed(path, entry) for entry in _entries(path) if entry.name]
            else:
                with ContainerReader(path, alone=True) as container:
                    shards = [beside(Path(path), shard.name) for shard in container.index.shards]
                targets = [Path(path), *shards]
            for target in targets:
                with suppress(OSError, ValueError):
                    total += target.stat().st_size
    return total
