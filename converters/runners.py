"""Parts of a conversion on a Dask cluster: each worker opens the checkpoint and writes some of its tensors to a file.

All of them have to see the files of the checkpoint and of the result under the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import qformat
from qformat.converters.output import Extras, WriteOptions, Written, write_file
from qformat.converters.request import Request
from qformat.errors import QFormatError, SourceError, install_hint
from qformat.parallel import default_jobs
from qformat.pipeline.encode import Plan

_RETRIES = 3


@dataclass(frozen=True)
class Part:
    """A job: the tensors from `start` to before `stop`, in the order of their names, into one file.

    Attributes
    ----------
    source
        Identifies the checkpoint as it is now, and all that is asked for.
    path
        The file.
    digest
        Identifies what decides its bytes, so that a worker goes on with what a lost one has left.
    elements
        Number of weights.
    version
        Of the package that asks: another one may write other bytes.
    """

    request: Request
    source: str
    start: int
    stop: int
    path: Path
    digest: str
    elements: int
    options: WriteOptions
    version: str = qformat.__version__


@lru_cache(2)  # jobs of the same conversion come to the same workers; a source that has changed is another one
def _plans(request: Request, source: str) -> list[Plan]:
    del source
    return request.plans()


def write_part(part: Part) -> Written:
    """Do a job; anywhere, any number of times."""
    if part.version != qformat.__version__:
        raise SourceError(
            f"a worker has qformat {qformat.__version__} and not {part.version}; install the same everywhere"
        )
    plans = _plans(part.request, part.source)[part.start : part.stop]
    return write_file(part.path, plans, Extras(part.digest), part.options)


@dataclass(frozen=True)
class Cluster:
    """Where to do jobs.

    Attributes
    ----------
    request
        What is converted.
    address
        Of the scheduler; None starts a cluster on this machine.
    workers
        How many processes that one has; None is one for each processor.
    """

    request: Request
    address: str | None = None
    workers: int | None = None

    def write(self, parts: Sequence[Part], progress: Callable[[int], None] | None) -> list[Written]:
        """Do jobs; those of workers that are lost are done again by others.

        Raises
        ------
        SourceError
            If the cluster cannot be reached or a job loses all its workers; and whatever jobs raise.
        """
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
                return _done(client, parts, progress)
            except KilledWorker as error:
                raise SourceError(
                    f"workers died at the same part again and again, out of memory perhaps: {_line(error)}"
                ) from None
            except (QFormatError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  what jobs raise, and what befalls the scheduler
                raise SourceError(f"the work on the cluster failed: {_line(error)}") from None


def _done(client: Any, parts: Sequence[Part], progress: Callable[[int], None] | None) -> list[Written]:
    """Do jobs, and return what they do in order."""
    from distributed import as_completed

    futures = client.map(write_part, parts, pure=False, retries=_RETRIES)
    numbers = {future.key: number for number, future in enumerate(futures)}
    written: dict[int, Written] = {}
    for future in as_completed(futures):
        number = numbers[future.key]
        written[number] = future.result()
        if progress:
            progress(parts[number].elements)
    return [written[number] for number in range(len(parts))]


def _line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
