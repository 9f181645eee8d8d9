"""The peer and the limits of the machine that everything else is compared with."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.context import Context
from benchmarks.inputs import normal
from benchmarks.report import Row, Section, at_least, figure
from benchmarks.timing import interleaved

#: the machine that the targets in rates were set on
REFERENCE_GGUF = 246.0  # Mweights/s
REFERENCE_MEMCPY = 17.0  # GB/s

CHUNK = 1 << 20


def gguf_quantizer(weights: np.ndarray) -> Callable[[], None]:
    """Return a function that quantizes the weights to Q4_0 with gguf's numpy code."""
    from gguf import GGMLQuantizationType, quants

    def quantize() -> None:
        quants.quantize(weights, GGMLQuantizationType.Q4_0)

    return quantize


def memcpy(source: np.ndarray) -> Callable[[], None]:
    """Return a function that copies the array to another one."""
    target = np.zeros_like(source)

    def copy() -> None:
        np.copyto(target, source)

    return copy


def read_files(*paths: Path) -> None:
    """Read files from front to back."""
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def hash_file(path: Path) -> None:
    """Read and hash a file on one thread."""
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])


def write_file(path: Path, data: memoryview, *, sync: bool) -> float:
    """Write data to a new file; return the seconds, without those for removing an old one."""
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for offset in range(0, len(data), CHUNK):
            file.write(data[offset : offset + CHUNK])
        if sync:
            os.fsync(file.fileno())
    return time.perf_counter() - start


@dataclass(frozen=True)
class Scales:
    """Speed of this machine relative to the reference machine, by two yardsticks."""

    gguf: float
    memcpy: float

    def judge(self, name: str, rate: float, wanted: float | None, unit: str = "Mw/s") -> Row:
        """Return a row; gguf's scale counts, because codecs compute more than they copy, and the other one stands beside it."""
        if wanted is None:
            return Row(name, figure(rate, unit))
        by = {"gguf": wanted * self.gguf, "memcpy": wanted * self.memcpy}
        verdicts = ", ".join(f"{limit:.0f} by {who} ({'yes' if rate >= limit else 'NO'})" for who, limit in by.items())
        limit = by["gguf"]
        return Row(
            name, figure(rate, unit), f"scaled: {verdicts}", rate / limit, f">= {wanted:g} scaled", rate >= limit
        )

    def notes(self) -> list[str]:
        """Return notes that explain the rows."""
        return [
            f"This machine does {self.gguf:.2f} (gguf) and {self.memcpy:.2f} (memcpy) of what the reference does.",
            "Targets hold for the reference machine, scaled by gguf's quantizer; both verdicts are given.",
            "Seconds are those of the processor, user and system.",
        ]


class Yardsticks:
    """The two yardsticks, measured among other functions.

    Attributes
    ----------
    functions
        Functions to measure, by name.
    """

    def __init__(self, context: Context) -> None:
        self._weights, self._bytes = normal(context.weights // 8), normal(context.weights)
        self.functions = {"gguf": gguf_quantizer(self._weights), "memcpy": memcpy(self._bytes)}

    def scales(self, seconds: Mapping[str, float]) -> Scales:
        """Return the machine's relative speed, from the seconds of `functions`."""
        gguf = self._weights.size / seconds["gguf"] / 1e6 / REFERENCE_GGUF
        return Scales(gguf, self._bytes.nbytes / seconds["memcpy"] / 1e9 / REFERENCE_MEMCPY)


def run(context: Context) -> Section:
    """Measure them."""
    weights = normal(context.weights // 2)
    data = weights.reshape(-1).view(np.uint8).data
    cached, written = context.workdir / "cached", context.workdir / "written"
    write_file(cached, data, sync=True)
    seconds = interleaved(
        {
            "gguf": gguf_quantizer(weights),
            "memcpy": memcpy(weights),
            "sha": lambda: hashlib.sha256(data).digest() and None,
            "read": lambda: read_files(cached),
            "write": lambda: write_file(written, data, sync=False),
            "sync": lambda: write_file(written, data, sync=True),
        },
        context.rounds(7),
    )
    cached.unlink()
    written.unlink()
    rate = {name: data.nbytes / value / 1e9 for name, value in seconds.items()}
    rows = [
        at_least(
            "gguf's numpy Q4_0 quantizer",
            weights.size / seconds["gguf"] / 1e6,
            REFERENCE_GGUF,
            "Mw/s",
            "reference machine",
        ),
        at_least("memcpy (np.copyto)", rate["memcpy"], REFERENCE_MEMCPY, "GB/s", "reference machine"),
        Row("SHA-256 (hashlib)", figure(rate["sha"], "GB/s")),
        Row("read from the page cache", figure(rate["read"], "GB/s")),
        Row("write to a new file", figure(rate["write"], "GB/s")),
        Row("the same and fsync", figure(rate["sync"], "GB/s")),
    ]
    return Section(f"Yardsticks, one thread, {data.nbytes / 1e6:.0f} MB", rows)
