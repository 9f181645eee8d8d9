"""Cost of quantization: the error of each tensor under each type, before anything is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Encoder, ErrorSum, TensorEncoder
from qformat.codecs.layout import Array, Chunk, Chunks
from qformat.dtypes import F32, Elements
from qformat.errors import SourceError
from qformat.kernels import load
from qformat.parallel import default_jobs
from qformat.pipeline.encode import Plan, encode_chunk, on_pool, prepare
from qformat.pipeline.source import SourceTensor

# |error| is counted by the upper 20 bits of its float32 pattern: 11 bits of mantissa, so a quantile is known to 1 part in 2048.
_BUCKET_SHIFT = 12
_BUCKETS = 1 << (31 - _BUCKET_SHIFT)


@dataclass
class ErrorStats:
    """Errors of one tensor, or of many, under one type.

    Attributes
    ----------
    tensor
        The tensor's name; ``"total"`` for a sum.
    type
        The type string.
    shape
        The tensor's shape; empty for a sum.
    nbytes
        Bytes of the tensor's segments.
    entropies
        For each chunk the order-0 entropy of its streams, in bits; empty if the type is not entropy-coded.
    histograms
        How often each code occurs as ``histogram``, and what else the type counts by name.
    params
        Number of weights.
    zeroed
        Number of blocks that become zero because their weights are too small for the type.
    largest
        Largest absolute error.
    squares, source_sums, source_squares
        For each chunk the sum of squared errors, of weights and of squared weights. They are added exactly at the end, so that
        the results do not depend on the number of threads.
    errors
        How many absolute errors fall into each bucket; None after `seal`.
    p95, median
        Bounds, at most 1/2048 too large, that this share of the absolute errors does not exceed; set by `seal`.
    """

    tensor: str
    type: str
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    entropies: list[float] = field(default_factory=list)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    params: int = 0
    zeroed: int = 0
    largest: float = 0.0
    squares: list[float] = field(default_factory=list)
    source_sums: list[float] = field(default_factory=list)
    source_squares: list[float] = field(default_factory=list)
    p95: float = 0.0
    median: float = 0.0
    errors: NDArray[np.int64] | None = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))

    def add(self, other: ErrorStats) -> None:
        """Take in the errors of other elements."""
        self.nbytes += other.nbytes
        self.entropies += other.entropies
        self.params += other.params
        self.zeroed += other.zeroed
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.source_sums += other.source_sums
        self.source_squares += other.source_squares
        if self.errors is None or other.errors is None:
            raise ValueError("sealed statistics cannot be added")
        self.errors += other.errors
        self.add_histograms(other.histograms)

    def add_histograms(self, histograms: dict[str, NDArray[np.int64]]) -> None:
        """Take in how often each code occurs in other elements."""
        for name, counts in histograms.items():
            self.histograms[name] = self.histograms[name] + counts if name in self.histograms else counts

    @property
    def bpw(self) -> float:
        """Bits for each weight."""
        return self.nbytes * 8 / self.params if self.params else 0.0

    @property
    def entropy_bpw(self) -> float | None:
        """The entropy for each weight; None if the type is not entropy-coded."""
        return math.fsum(self.entropies) / max(1, self.params) if self.entropies else None

    @property
    def rmse(self) -> float:
        """Root mean square error, in the unit of the weights."""
        return math.sqrt(math.fsum(self.squares) / self.params) if self.params else 0.0

    @property
    def source_std(self) -> float:
        """Standard deviation of the weights."""
        if not self.params:
            return 0.0
        mean = math.fsum(self.source_sums) / self.params
        return math.sqrt(max(0.0, math.fsum(self.source_squares) / self.params - mean * mean))

    @property
    def rel_rmse(self) -> float:
        """The rmse over the standard deviation of the weights; 0 if both are 0."""
        if self.source_std == 0:
            return 0.0 if self.rmse == 0 else math.inf
        return self.rmse / self.source_std

    def seal(self) -> None:
        """Compute the quantiles and drop the histogram of errors, which is large."""
        if self.errors is not None:
            reached = np.cumsum(self.errors)
            self.p95, self.median = (self._quantile(reached, q) for q in (0.95, 0.5))
            self.errors = None

    def _quantile(self, reached: NDArray[np.int64], q: float) -> float:
        if not self.params:
            return 0.0
        bucket = int(np.searchsorted(reached, max(1, math.ceil(q * self.params))))
        upper = np.array([((bucket + 1) << _BUCKET_SHIFT) - 1], np.uint32).view(np.float32)[0]
        return min(float(upper), self.largest)

    def line(self) -> str:
        """Return the classic line of quantize-stats."""
        size = "" if self.entropy_bpw is None else f", {self.bpw:.4f} bits/weight, entropy {self.entropy_bpw:.4f}"
        return (
            f"{self.type}::{self.tensor} : rmse {self.rmse:.8f}, maxerr {self.largest:.8f}, "
            f"95pct<{_above(self.p95)}, median<{_above(self.median)}{size}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the measured values under the names of the JSON contract."""
        return {
            "type": self.type,
            "bpw": self.bpw,
            "entropy": self.entropy_bpw,
            "rmse": self.rmse,
            "rel_rmse": self.rel_rmse if math.isfinite(self.rel_rmse) else None,
            "maxerr": self.largest,
            "p95": self.p95,
            "median": self.median,
            "histogram": None,
        } | {name: counts.tolist() for name, counts in self.histograms.items()}


def _above(value: float) -> str:
    """Return `value` with four decimals, rounded up so that "less than" stays true."""
    return f"{math.floor(value * 1e4 + 1) / 1e4:.4f}"


def measure(
    tensors: Iterable[SourceTensor],
    encoders: Sequence[Encoder],
    *,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[ErrorStats]:
    """Quantize tensors, decode them again and compare.

    Parameters
    ----------
    tensors
        Floating tensors.
    encoders
        The types to compare.
    jobs
        Threads; None is one for each processor.
    progress
        Callback; receives the number of weights that were just measured.

    Yields
    ------
    ErrorStats
        For each tensor, for each encoder.

    Raises
    ------
    SourceError
        If a tensor holds NaN or infinity, or values that a type cannot hold; it names the tensor.
    """
    jobs = jobs or default_jobs()
    stopped = threading.Event()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="qformat-stats")
    try:
        for tensor in tensors:
            for encoder in encoders:
                if not encoder.accepts(tensor.dtype):
                    raise SourceError(f"tensor {tensor.name!r}: type {encoder} cannot hold {tensor.dtype.name}")
                plan = Plan(tensor, encoder)
                prepared = prepare(plan, on_pool(pool, 3 * jobs))
                arrays = [part for part in prepared.codec.layout(plan.matrix) if isinstance(part, Array)]
                total = ErrorStats(tensor.name, str(encoder), tuple(tensor.shape))
                total.nbytes = sum(part.length(plan.matrix) for part in arrays)
                if not prepared.codec.has_fixed_size:
                    total.entropies.append(0.0)  # so that a tensor without elements has an entropy, too
                chunks = list(plan.matrix.chunks(prepared.codec.chunk_alignment(plan.matrix)))
                shares = [chunks[i::jobs] for i in range(min(jobs, len(chunks)))]
                parts = [pool.submit(_measure, plan, prepared, share, progress, stopped) for share in shares]
                for part in parts:
                    total.add(part.result())
                yield total
    finally:
        stopped.set()  # nothing is under way any more, unless something failed or the user has stopped the run
        pool.shutdown(cancel_futures=True)


def _measure(
    plan: Plan,
    prepared: TensorEncoder,
    share: Sequence[Chunk],
    progress: Callable[[int], None] | None,
    stopped: threading.Event,
) -> ErrorStats:
    floats = load("floats")
    stats = ErrorStats(plan.source.name, str(plan.encoder))
    for chunk in share:
        if stopped.is_set():
            break
        values = np.ascontiguousarray(plan.source.read_chunk(chunk).to_f32()).reshape(-1)
        decoded = _decoded(plan, prepared, chunk, values, stats)
        lanes = np.zeros(floats.LANES)
        largest = floats.difference(values, decoded, lanes)
        error = ErrorSum.of(values.size, lanes, largest)
        floats.error_histogram(values, decoded, stats.errors)
        stats.params += error.count
        stats.largest = max(stats.largest, error.maximum)
        stats.squares.append(error.squares)
        stats.source_sums.append(float(values.sum(dtype=np.float64)))
        stats.source_squares.append(float(np.square(values, dtype=np.float64).sum()))
        if progress:
            progress(values.size)
    return stats


def _decoded(
    plan: Plan, prepared: TensorEncoder, chunk: Chunk, values: NDArray[np.float32], stats: ErrorStats
) -> NDArray[np.float32]:
    """Encode and decode a chunk, and count its codes and bytes."""
    codec, encoded = prepared.codec, encode_chunk(plan, prepared, chunk)
    name, type_ = plan.source.name, plan.encoder
    if not encoded.finite:
        raise SourceError(f"tensor {name!r} holds NaN or infinity; leave it out with --exclude")
    if encoded.overflowed:
        raise SourceError(f"tensor {name!r} holds values too large for type {type_}; leave it out with --exclude")
    if not Elements(F32, values).all_finite():
        raise SourceError(f"tensor {name!r} holds values beyond float32; leave it out with --exclude")
    stats.add_histograms(codec.histograms(encoded.parts, chunk))
    layout = codec.layout(plan.matrix)
    streams = [data for part, data in zip(layout, encoded.parts, strict=True) if isinstance(part, Chunks)]
    stats.nbytes += sum(len(data) + 4 for data in streams)  # and an entry in the table of lengths
    if streams:
        stats.entropies.append(encoded.entropy)
    stats.zeroed += encoded.zeroed
    dtype = codec.decoded_from(plan.source.dtype)
    out = np.empty(chunk.shape, dtype.storage)
    codec.decode(encoded.parts, out)
    return np.ascontiguousarray(Elements(dtype, out).to_f32()).reshape(-1)


def collect(results: Iterable[ErrorStats]) -> tuple[list[ErrorStats], list[ErrorStats]]:
    """Return the results, and their sum for each type in the order in which the types first occur; all sealed."""
    every: list[ErrorStats] = []
    sums: dict[str, ErrorStats] = {}
    for result in results:
        sums.setdefault(result.type, ErrorStats("total", result.type)).add(result)
        result.seal()
        every.append(result)
    for total in sums.values():
        total.seal()
    return every, list(sums.values())
