"""A large checkpoint in shards into q4_0, against gguf-py doing the same; in one file, in shards and on a Dask cluster."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

from benchmarks.context import Context
from benchmarks.inputs import Llama
from benchmarks.report import Row, Section, below, figure
from benchmarks.timing import QFORMAT, interleaved, run_process

_PEER = Path(__file__).with_name("gguf_convert.py")
_FASTER = 3.0
_PEAK = 700.0  # MB
_LAYERS = 20  # 2.06 GB


def run(context: Context) -> Section:
    """Measure it."""
    layers, vocab = (1, 4000) if context.quick else (_LAYERS, 32000)
    checkpoint = Llama(context.workdir / "sharded", layers, vocab, shards=4).written
    outputs = context.workdir / "outputs"
    peaks: dict[str, list[float]] = {}

    def timed(name: str, *command: object) -> float:
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()
        cost = run_process([*command])
        peaks.setdefault(name, []).append(cost.peak_rss / 1e6)
        return cost.wall

    convert = (QFORMAT, "convert", checkpoint.directory, outputs / "model.qf", "-t", "q4_0:search=naive")
    commands: dict[str, tuple[object, ...]] = {
        "gguf-py": (sys.executable, _PEER, checkpoint.directory, outputs / "model.gguf"),
        "qformat convert": convert,
        "qformat convert, q4_0 as by default": (*convert[:-1], "q4_0"),
        "qformat convert --shard-size 250MB": (*convert, "--shard-size", "250MB"),
        "qformat convert --engine dask": (*convert, "--engine", "dask"),
    }
    seconds = interleaved(
        {name: partial(timed, name, *command) for name, command in commands.items()}, context.rounds(3)
    )
    shutil.rmtree(outputs)
    shutil.rmtree(checkpoint.directory)
    peer = seconds.pop("gguf-py")
    rows = []
    for name, taken in seconds.items():
        ratio = peer / taken
        target = (f">= {_FASTER:g} x", ratio >= _FASTER) if name == "qformat convert" else ("", None)
        rows.append(Row(name, figure(taken, "s"), f"gguf-py {figure(peer, 's')}", ratio, *target))
    rows.append(below("qformat convert: peak memory", max(peaks["qformat convert"]), _PEAK, "MB"))
    rows.append(Row("gguf-py: peak memory", figure(max(peaks["gguf-py"]), "MB"), "", None))
    return Section(
        f"Sources: {checkpoint.nbytes / 1e9:.2f} GB of bfloat16 in 4 shards to q4_0, whole commands",
        rows,
        [
            "gguf-py reads tensor by tensor and writes each at once (benchmarks/gguf_convert.py); it makes neither digests nor",
            "measures errors, and does not sync. Both write the same blocks with search=naive.",
        ],
    )
