"""Parts of a conversion on a Dask cluster: each worker opens the checkpoint and writes some of its tensors to a file.

All of them have to see the files of the checkpoint and of the result under the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qformat.converters.request import Request
from qformat.converters.written import Beside, WriteOptions, Written, write_file

from qformat.encode import Plan
from qformat.errors import SourceError
from qformat.parallel import default_jobs

_RETRIES = 3


@dataclass(frozen=True)
class Part:
    """A job: the tensors from `start` to before `stop`, in the order of their names, into one file.

    Attributes
    ----------
    path
        The file.
    digest
        Identifies what decides its bytes, so that a worker goes on with what a lost one has left.
    elements
        Number of weights.
    """

    request: Request
    start: int
    stop: int
    path: Path
    digest: str
    elements: int
    options: WriteOptions


@lru_cache(2)  # jobs of the same conversion come to the same workers
def _plans(request: Request) -> list[Plan]:
    return request.plans()


def write_part(part: Part) -> Written:
    """Do a job; anywhere, any number of times."""
    plans = _plans(part.request)[part.start : part.stop]
    return write_file(part.path, plans, Beside(part.digest), part.options)


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
            from distributed import Client, KilledWorker, LocalCluster, as_completed
        except ImportError:
            raise SourceError("dask is needed to convert on a cluster; pip install 'qformat[dask]'") from None
        local = None
        try:
            if self.address is None:
                local = LocalCluster(
                    n_workers=self.workers or default_jobs(),
                    threads_per_worker=1,
                    dashboard_address=":0",
                    silence_logs="ERROR",
                )
            client = Client(local or self.address, timeout="30s")
        except (OSError, ValueError, TimeoutError) as error:
            if local:
                local.close()
            raise SourceError(f"the cluster at {self.address or 'this machine'} cannot be reached: {error}") from None
        try:
            futures = client.map(write_part, parts, pure=False, retries=_RETRIES)
            numbers = {future.key: number for number, future in enumerate(futures)}
            written: dict[int, Any] = {}
            for future in as_completed(futures):
                number = numbers[future.key]
                written[number] = future.result()
                if progress:
                    progress(parts[number].elements)
            return [written[number] for number in range(len(parts))]
        except KilledWorker as error:
            raise SourceError(
                f"workers died at the same part again and again, out of memory perhaps: {error}"
            ) from None
        finally:
            client.close()
            if local:
                local.close()
