"""Runners write the files of a conversion: here on threads, or on the workers of a Dask cluster.

Workers open the checkpoint themselves. They have to see its files and those of the result under the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import qformat
from qformat.converters.output import FileContents, FileResult, WriteOptions, write_file
from qformat.converters.request import Request
from qformat.errors import QFormatError, SourceError, install_hint
from qformat.parallel import default_jobs
from qformat.pipeline.encode import Plan

_RETRIES = 3


class Runner(Protocol):
    """Writes files."""

    @property
    def part_size(self) -> int | None:
        """Bytes of tensors in each of the parts of a file, which are written apart and then joined; None to write it at once."""

    def write(
        self, files: Sequence[FileContents], plans: Sequence[Plan], folder: Path | None, options: WriteOptions
    ) -> dict[str, FileResult]:
        """Write files into the folder of a workspace, or find their length if that is None; return the results by name."""


@dataclass(frozen=True)
class ThreadRunner:
    """Writes files one after the other, each on several threads."""

    part_size: None = None

    def write(
        self, files: Sequence[FileContents], plans: Sequence[Plan], folder: Path | None, options: WriteOptions
    ) -> dict[str, FileResult]:
        """Write files in order."""
        written: dict[str, FileResult] = {}
        for contents in files:
            written[contents.path.name] = write_file(contents, plans, written, folder, options)
        return written


# The tasks of one conversion come to the same workers; a source that has changed has another fingerprint.
@lru_cache(2)
def _plans(request: Request, fingerprint: str) -> list[Plan]:
    del fingerprint
    return request.plans()


def write_on_worker(
    contents: FileContents, request: Request, folder: Path, options: WriteOptions, version: str
) -> FileResult:
    """Write a file of tensors only, on any machine and any number of times.

    All arguments are plain values. `version` is that of the package that calls: another one may write other bytes.
    """
    if version != qformat.__version__:
        raise SourceError(f"a worker has qformat {qformat.__version__} and not {version}; install the same everywhere")
    plans = _plans(request, contents.fingerprint.partition("/")[0])
    return write_file(contents, plans, {}, folder, options)


@dataclass(frozen=True)
class DaskRunner:
    """Writes shards, or parts of a file, on the workers of a Dask cluster; and joins parts, or writes the head, here.

    Attributes
    ----------
    request
        Opens the checkpoint that is converted.
    address
        Of the scheduler; None starts a cluster on this machine.
    workers
        Number of processes of that one; None is one for each processor.
    """

    request: Request
    address: str | None = None
    workers: int | None = None
    part_size: int = 512 << 20

    def write(
        self, files: Sequence[FileContents], plans: Sequence[Plan], folder: Path | None, options: WriteOptions
    ) -> dict[str, FileResult]:
        """Write files; those of workers that are lost are written again by others. `SourceError` if the cluster fails."""
        assert folder is not None
        own = replace(options, jobs=1, progress=None)
        tasks: list[FileContents] = []
        joined: list[FileContents] = []
        for file in files:
            (joined if file.parts or file.shards else tasks).append(file)
        written: dict[str, FileResult] = {}
        with self._client() as client:
            from distributed import as_completed

            arguments = {"request": self.request, "folder": folder, "options": own, "version": qformat.__version__}
            futures = client.map(write_on_worker, tasks, **arguments, pure=False, retries=_RETRIES)
            contents = {future.key: task for future, task in zip(futures, tasks, strict=True)}
            for future in as_completed(futures):
                file = contents[future.key]
                written[file.path.name] = future.result()
                if options.progress:
                    options.progress(sum(plan.matrix.elements for plan in plans[file.start : file.stop]))
        for file in joined:
            written[file.path.name] = write_file(file, plans, written, folder, replace(options, progress=None))
        return written

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Yield a client of the cluster; its errors become ours."""
        try:
            from distributed import Client, KilledWorker, LocalCluster
        except ImportError:
            raise SourceError(f"dask is needed to convert on a cluster; {install_hint('dask')}") from None
        with ExitStack() as stack:
            try:
                address = self.address or stack.enter_context(
                    LocalCluster(
                        n_workers=self.workers or default_jobs(),
                        threads_per_worker=1,
                        dashboard_address=":0",
                        silence_logs="ERROR",
                    )
                )
                client = stack.enter_context(Client(address, timeout="30s"))
            except Exception as error:  # noqa: BLE001  of many kinds, by protocol
                where = self.address or "this machine"
                raise SourceError(f"the cluster at {where} cannot be reached: {_line(error)}") from None
            try:
                yield client
            except KilledWorker as error:
                raise SourceError(
                    f"workers died repeatedly on the same part, possibly from lack of memory: {_line(error)}"
                ) from None
            except (QFormatError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  what tasks raise, and errors of the scheduler
                raise SourceError(f"the work on the cluster failed: {_line(error)}") from None


def _line(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
