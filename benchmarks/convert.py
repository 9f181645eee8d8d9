"""A whole conversion against reading, hashing and writing alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.context import Context
from benchmarks.encoding import convert_directory
from benchmarks.inputs import Llama, normal
from benchmarks.report import Row, Section, below, figure
from benchmarks.timing import QFORMAT, interleaved, run_process
from benchmarks.yardsticks import REFERENCE_GGUF, REFERENCE_MEMCPY, gguf_quantizer, memcpy, read_files, write_file

_BASELINE = 350.0  # MB/s of source on the reference machine; the target is four times that
_PEAK = 600.0  # MB
_MEMORY_DISK = Path("/dev/shm")


class _Runs:
    """The functions that are interleaved; every run writes the same file again."""

    def __init__(self, context: Context) -> None:
        self.checkpoint = context.checkpoint
        self.data = memoryview(context.container.read_bytes())
        self.floor_parts: dict[tuple[Path, str], list[float]] = defaultdict(list)
        self.peaks: list[int] = []

    def in_process(self, output: Path) -> float:
        output.unlink(missing_ok=True)
        start = time.perf_counter()
        convert_directory(self.checkpoint.directory, output, "q4_0")
        return time.perf_counter() - start

    def command(self, output: Path) -> float:
        output.unlink(missing_ok=True)
        cost = run_process([QFORMAT, "convert", self.checkpoint.directory, output])
        self.peaks.append(cost.peak_rss)
        return cost.wall

    def floor(self, output: Path) -> float:
        start = time.perf_counter()
        read_files(*self.checkpoint.files)
        read = time.perf_counter()
        hashlib.sha256(self.data).digest()
        hashed = time.perf_counter()
        parts = {
            "read": read - start,
            "SHA-256": hashed - read,
            "write and fsync": write_file(output, self.data, sync=True),
        }
        for name, seconds in parts.items():
            self.floor_parts[output, name].append(seconds)
        return sum(parts.values())

    def same(self, output: Path) -> Row:
        """Return whether `convert` writes the same bytes as the command."""
        self.in_process(output)
        same = output.read_bytes() == self.data
        return Row("convert() and the command: bytes", "the same" if same else "different", "", None, "the same", same)


def run(context: Context) -> Section:
    """Measure it."""
    runs = _Runs(context)
    weights = normal(context.weights // 4)
    output = context.workdir / "out.qf"
    functions = {
        "floor": partial(runs.floor, output),
        "in_process": partial(runs.in_process, output),
        "command": partial(runs.command, output),
        "gguf": gguf_quantizer(weights),
        "memcpy": memcpy(weights),
    }
    with _memory_disk(2 * len(runs.data)) as directory:
        if directory:
            functions |= {
                "floor, no disk": partial(runs.floor, directory / "out.qf"),
                "in process, no disk": partial(runs.in_process, directory / "out.qf"),
            }
        seconds = interleaved(functions, context.rounds(5))
    megabytes = runs.checkpoint.nbytes / 1e6
    gguf = weights.size / seconds["gguf"] / 1e6 / REFERENCE_GGUF
    memory = weights.nbytes / seconds["memcpy"] / 1e9 / REFERENCE_MEMCPY
    rows = [
        *_judge("convert(), kernels loaded", seconds["in_process"], seconds["floor"], megabytes, gguf, memory),
        *_judge("qformat convert, whole command", seconds["command"], seconds["floor"], megabytes, gguf, memory),
        below("qformat convert: peak memory", max(runs.peaks) / 1e6, _PEAK, "MB"),
        runs.same(output),
    ]
    output.unlink()
    if context.full:
        rows.append(_large(context))
    if directory:
        own, floor = seconds["in process, no disk"], seconds["floor, no disk"]
        rows.append(Row("convert() to a file in memory", figure(own, "s"), f"floor {figure(floor, 's')}", own / floor))
    parts = ", ".join(
        f"{name} {statistics.median(values[1:]):.3f} s"
        for (path, name), values in runs.floor_parts.items()
        if path == output
    )
    size = len(runs.data) / 1e6
    return Section(
        f"Convert: {megabytes:,.0f} MB of bfloat16 in 2 shards to q4_0 (search=table), hashed and synced",
        rows,
        [
            f"Floor, alone and one after the other on one thread: {parts} ({size:.0f} MB of output).",
            f"Scale of this machine: {gguf:.2f} by gguf's quantizer, {memory:.2f} by memcpy; the lower one counts.",
        ],
    )


@contextmanager
def _memory_disk(nbytes: int) -> Iterator[Path | None]:
    """Make a directory on a file system in memory; None if there is no such file system with that much space."""
    if not os.access(_MEMORY_DISK, os.W_OK | os.X_OK) or shutil.disk_usage(_MEMORY_DISK).free < nbytes:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=_MEMORY_DISK) as directory:
        yield Path(directory)


def _judge(name: str, seconds: float, floor: float, megabytes: float, gguf: float, memory: float) -> list[Row]:
    """Compare with the floor and with the scaled baseline; one of the two targets must be met."""
    rate = megabytes / seconds
    baseline = _BASELINE * min(gguf, memory)
    met = seconds <= 2 * floor or rate >= 4 * baseline
    scaled = f"350 MB/s scaled: {_BASELINE * gguf:.0f} by gguf, {_BASELINE * memory:.0f} by memcpy"
    return [
        Row(name, figure(seconds, "s"), f"floor {figure(floor, 's')}", seconds / floor, "<= 2 x, or the next", met),
        Row(f"{name}: source", figure(rate, "MB/s"), scaled, rate / baseline, ">= 4 x, or the last", met),
    ]


def _large(context: Context) -> Row:
    """Convert 4 GB of zeros and return a row with the peak memory."""
    name = "qformat convert, 4 GB: peak memory"
    checkpoint = Llama(context.workdir / "large", 2 if context.quick else 43, zeros=True)
    if shutil.disk_usage(context.workdir).free < checkpoint.nbytes:
        return Row(name, "not measured: too little disk space")
    output = context.workdir / "large.qf"
    cost = run_process([QFORMAT, "convert", checkpoint.written.directory, output])
    shutil.rmtree(checkpoint.directory)
    output.unlink()
    return below(f"{name} ({checkpoint.nbytes / 1e6:,.0f} MB of zeros)", cost.peak_rss / 1e6, _PEAK, "MB")
