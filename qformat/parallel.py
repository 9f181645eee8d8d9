"""Numbers of threads, and loops on threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def default_jobs() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def for_each(work: Callable[[_T], None], items: Iterable[_T], jobs: int) -> None:
    """Call `work` for each item, on `jobs` threads if there are several items; the first exception cancels the items not begun."""
    items = list(items)
    if jobs <= 1 or len(items) <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(jobs, thread_name_prefix="qformat") as pool:
        try:
            for _ in pool.map(work, items):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prefetch(pool: Executor, tasks: Iterable[Callable[[], _T]], window: int) -> Iterator[Future[_T]]:
    """Yield the futures of tasks in order, with up to `window` of them submitted before the caller takes the first."""
    started: deque[Future[_T]] = deque()
    for task in tasks:
        if len(started) == window:
            yield started.popleft()
        started.append(pool.submit(task))
    yield from started
