"""A checkpoint of many small tensors: the processor time that `convert` spends on each tensor rather than on its weights."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.context import Context
from benchmarks.inputs import Stored, normal, write_safetensors
from benchmarks.report import Row, Section, figure
from benchmarks.timing import interleaved, run_process

_TENSORS, _SHAPE = 50_000, (8, 64)
_BEFORE = 33.0  # seconds for 50,000 tensors at 0.5.0, on two cores of an Intel Xeon
_PEER = "import sys; from safetensors.numpy import load_file, save_file; save_file(load_file(sys.argv[1]), sys.argv[2])"


def _checkpoint(path: Path, count: int) -> Path:
    rows, cols = _SHAPE
    weights = normal(1 << 20, cols)
    starts = (number * rows % (len(weights) - rows) for number in range(count))
    parts = (weights[start : start + rows].tobytes() for start in starts)
    tensors = {f"layers.{number}.weight": Stored("F32", _SHAPE, len(data), [data]) for number, data in enumerate(parts)}
    write_safetensors(path, tensors)
    return path


def run(context: Context) -> Section:
    """Measure processor seconds, user and system, of whole commands."""
    count = _TENSORS // 25 if context.quick else _TENSORS
    source = _checkpoint(context.workdir / "small.safetensors", count)
    output, copy = context.workdir / "small.qf", context.workdir / "small-copy.safetensors"
    convert = (sys.executable, "-m", "qformat", "convert", "--force", source, output)
    seconds = interleaved(
        {
            "convert": lambda: run_process(convert).cpu,
            "safetensors": lambda: run_process((sys.executable, "-c", _PEER, source, copy)).cpu,
        },
        context.rounds(2),
    )
    for path in (source, output, copy):
        path.unlink()
    own, peer = seconds["convert"], seconds["safetensors"]
    against = f"safetensors, read and written again: {figure(peer, 's')}"
    rows = [
        Row("qformat convert: processor time", figure(own, "s"), against, own / peer),
        Row("the same for each tensor", figure(1e3 * own / count, "ms")),
    ]
    title = f"Small: {count:,} tensors of {_SHAPE[0]} x {_SHAPE[1]} float32 to q4_0, whole command"
    return Section(
        title, rows, [f"Version 0.5.0 took about {_BEFORE:g} s for {_TENSORS:,} tensors on two cores of a Xeon."]
    )
