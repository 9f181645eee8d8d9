"""Medians of interleaved runs, and the cost of a process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAUNCH = Path(__file__).with_name("launch.py")
QFORMAT = Path(sysconfig.get_path("scripts"), "qformat")


def interleaved(functions: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, float]:
    """Run functions in turn, A B A B ..., so that other load on the machine affects all of them alike.

    Parameters
    ----------
    functions
        Functions by name. One that returns a number has timed itself; for others wall-clock seconds are taken.
    rounds
        Number of rounds, after one that does not count.

    Returns
    -------
    dict
        The median of each function.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            own = function()
            seconds = time.perf_counter() - start
            if number:
                samples[name].append(seconds if own is None else own)
    return {name: statistics.median(values) for name, values in samples.items()}


def processor_seconds(run: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> Callable[[], float]:
    """Return a function that runs another one and returns its processor seconds, which depend less on other load.

    If the function returns a float, it has timed itself. The clock is that of this thread; ``time.process_time`` suits functions
    that start threads.
    """

    def measured() -> float:
        start = clock()
        own = run()
        return own if isinstance(own, float) else clock() - start

    return measured


@dataclass(frozen=True)
class Cost:
    """Cost of a process: wall-clock seconds, processor seconds (user and system), peak resident bytes."""

    wall: float
    cpu: float
    peak_rss: int


def run_process(command: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None) -> Cost:
    """Run a command, discard its output and return its cost.

    A small process starts it, because Linux counts the memory of the process that calls exec into the new one's peak, and this
    process holds large arrays.

    Raises
    ------
    RuntimeError
        If the command fails.
    """
    result = subprocess.run(
        [sys.executable, "-I", "-S", _LAUNCH, *command],
        capture_output=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {result.stderr.decode(errors='replace').strip()}")
    return Cost(**json.loads(result.stdout))
