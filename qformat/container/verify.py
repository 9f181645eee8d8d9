"""Check files: containers segment by segment, and any file against a SHA256SUMS list. Needs no codec."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qformat.container.index import check_sorted
from qformat.container.layout import MAGIC, align
from qformat.container.reader import ContainerReader
from qformat.errors import FormatError, PathLike
from qformat.files import beside, open_regular
from qformat.records import AssetRecord, Segment, ShardRecord

#: called with the number of bytes that were just checked
Progress = Callable[[int], None]

_CHUNK = 1 << 20
_SUM_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
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


def sums_line(path: str, digest: str) -> str:
    r"""Return the line that ``sha256sum`` prints: names with a line end or backslash are escaped, which a leading ``\`` tells."""
    if any(c in path for c in "\\\n\r"):
        escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        return f"\\{digest}  {escaped}"
    return f"{digest}  {path}"


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
        place = str(beside(Path(path), shard.name))
        try:
            report, _, more = _verify_container(place, pool, progress, quick=quick, shard=shard)
            names += more
        except OSError as error:
            report = FileReport(place, [Damage(_cannot_read(error))])
        reports.append(report)
    try:
        check_sorted("tensor", names)
    except FormatError as error:
        head.errors.append(Damage(f"its shards do not fit together: {error.cause}"))
    return reports


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
        return report, container.index.shards, [record.name for record in container.index.tensors]


def _check_segments(
    container: ContainerReader, report: FileReport, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    # The longest first, so that no thread ends long after the others
    owned = sorted(container.index.segments(), key=lambda item: -item[1].length)
    found = pool.map(lambda item: _check_segment(container.fileno(), item[1], progress), owned)
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


def _check_segment(fd: int, segment: Segment, progress: Progress) -> str:
    """Return what is wrong with a segment or the padding after it, or an empty string."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_CHUNK, segment.length))
    position, stop = segment.offset, segment.stop
    padding_size = align(stop) - stop
    try:
        while position < stop:
            view = memoryview(buffer)[: stop - position]
            count = os.preadv(fd, [view], position)
            if count == 0:
                return "the file became shorter while it was read"
            digest.update(view[:count])
            position += count
            progress(count)
        padding = os.pread(fd, padding_size, stop)
    except OSError as error:
        return _cannot_read(error)
    if digest.hexdigest() != segment.sha256:
        return "SHA-256 does not match: it is damaged"
    if any(padding) or len(padding) != padding_size:
        return "the padding after it is not zero: bytes were changed"
    return ""


def _is_list(path: str) -> bool:
    """Return whether a file's first line is one of a SHA256SUMS list."""
    with open_regular(Path(path)) as file:
        start = file.read(1 << 16)
    first = next((line for line in start.splitlines() if line.strip() and not line.startswith(b"#")), b"")
    return not start.startswith(MAGIC[:4]) and _SUM_LINE.match(first) is not None


def _verify_list(path: str, pool: ThreadPoolExecutor, progress: Progress) -> list[FileReport]:
    reports: list[FileReport] = []
    checks = []
    for number, digest, target in _entries(path):
        if target is None:
            reports.append(FileReport(path, [Damage(f"line {number} is not of the form 'SHA256  NAME'")]))
            continue
        report = FileReport(str(target))
        reports.append(report)
        checks.append((report, pool.submit(_check_sum, target, digest, progress)))
    for report, check in checks:
        what = check.result()
        if what:
            report.errors.append(Damage(what))
    return reports


def _entries(path: str) -> Iterator[tuple[int, str, Path | None]]:
    """Yield (line number, digest, file) of a list; the file is None for a line that is none of a list."""
    if Path(path).stat().st_size > _MAX_LIST_BYTES:
        raise OSError(errno.EFBIG, "the list is too long", path)
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        line = line.removesuffix(b"\r")  # noqa: PLW2901
        if not line.strip() or line.startswith(b"#"):
            continue
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            yield number, "", None
        else:
            escaped, digest, name = match.groups()
            # beside the list, whatever the working directory
            yield number, digest.decode().lower(), Path(path).parent / os.fsdecode(_unescape(name) if escaped else name)


def _unescape(name: bytes) -> bytes:
    letters = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}
    return re.sub(rb"\\([nr\\])", lambda match: letters[match[1]], name)


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
                targets = [target for _, _, target in _entries(path)]
            else:
                with ContainerReader(path, alone=True) as container:
                    shards = [beside(Path(path), shard.name) for shard in container.index.shards]
                targets = [Path(path), *shards]
            for target in targets:
                with suppress(OSError, ValueError):
                    total += target.stat().st_size if target else 0
    return total
