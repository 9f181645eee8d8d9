"""Checking a file against hashing it on one thread."""

from __future__ import annotations

from benchmarks.context import Context
from benchmarks.report import Section, at_least
from benchmarks.timing import QFORMAT, interleaved, run_process
from benchmarks.yardsticks import hash_file
from qformat.container.verify import verify


def run(context: Context) -> Section:
    """Measure it."""
    path = context.container
    assert all(report.ok for report in verify([str(path)]))
    seconds = interleaved(
        {
            "sha": lambda: hash_file(path),
            "library": lambda: verify([str(path)], jobs=2) and None,
            "command": lambda: run_process([QFORMAT, "verify", "--jobs", "2", path]).wall,
        },
        context.rounds(9),
    )
    size = path.stat().st_size
    rate = {name: size / value / 1e9 for name, value in seconds.items()}
    rows = [
        at_least("verify(jobs=2)", rate["library"], rate["sha"], "GB/s", "SHA-256, one thread", 1.5),
        at_least("qformat verify --jobs 2, whole command", rate["command"], rate["sha"], "GB/s", "SHA-256, one thread"),
    ]
    return Section(f"Verify: {size / 1e6:.0f} MB from the page cache", rows)
