"""The hot loops on one thread, from memory to memory, called chunk by chunk as the codec calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from benchmarks.context import Context
from benchmarks.encoding import CHUNK_ELEMENTS
from benchmarks.inputs import normal, to_bf16
from benchmarks.report import Section, at_least
from benchmarks.timing import interleaved
from benchmarks.yardsticks import gguf_quantizer, memcpy
from qformat.kernels import load
from qformat.kernels.numpy import q4_0 as plain


def _chunks(weights: np.ndarray, blocks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, weights.size, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, weights.size)
        yield weights[start:stop], blocks[start // 32 * 18 : stop // 32 * 18]


def _quantizer(kernels: ModuleType, weights: np.ndarray, blocks: np.ndarray) -> Callable[[], None]:
    def quantize() -> None:
        for source, target in _chunks(weights, blocks):
            kernels.quantize(source, target, np.zeros(load("blocks").LANES))

    return quantize


def _dequantizer(kernels: ModuleType, weights: np.ndarray, blocks: np.ndarray) -> Callable[[], None]:
    def dequantize() -> None:
        for target, source in _chunks(weights, blocks):
            kernels.dequantize(source, target)

    return dequantize


def run(context: Context) -> Section:
    """Measure them."""
    matrix = normal(context.weights)
    few = matrix[: len(matrix) // 8]  # the slow ones need no more
    weights = matrix.reshape(-1)
    halves = to_bf16(weights)
    blocks = np.zeros(weights.size // 32 * 18, np.uint8)
    decoded = np.zeros_like(weights)
    some = decoded[: few.size]
    compiled = load("q4_0")
    seconds = interleaved(
        {
            "gguf": gguf_quantizer(few),
            "memcpy": memcpy(weights),
            "bf16": _quantizer(compiled, halves, blocks),
            "f32": _quantizer(compiled, weights, blocks),
            "decode": _dequantizer(compiled, decoded, blocks),
            "plain": _quantizer(plain, few.reshape(-1), blocks),
            "plain decode": _dequantizer(plain, some, blocks),
        },
        context.rounds(15),
    )
    peer = few.size / seconds["gguf"] / 1e6
    memory = weights.nbytes / seconds["memcpy"] / 1e9

    def against_gguf(name: str, key: str, count: int, peer_name: str = "gguf", target: float | None = None):
        return at_least(name, count / seconds[key] / 1e6, peer, "Mw/s", peer_name, target)

    def against_memcpy(name: str, key: str, nbytes: int, target: float | None = None):
        return at_least(name, nbytes / seconds[key] / 1e9, memory, "GB/s", "memcpy", target)

    rows = [
        against_gguf("quantize f32", "f32", weights.size, target=8),
        against_memcpy("quantize f32, bytes read", "f32", weights.nbytes, 0.5),
        against_gguf("quantize bf16", "bf16", weights.size),
        against_memcpy("quantize bf16, bytes read", "bf16", halves.nbytes),
        against_memcpy("dequantize to f32, bytes written", "decode", weights.nbytes, 0.35),
        against_gguf("dequantize to f32", "decode", weights.size, "gguf's quantizer"),
        against_gguf("numpy fallback: quantize f32", "plain", few.size),
        against_gguf("numpy fallback: dequantize", "plain decode", few.size, "gguf's quantizer"),
    ]
    title = f"Kernels: q4_0, one thread, {weights.nbytes / 1e6:.0f} MB of float32 in memory"
    kind = compiled.__name__.split(".")[-2]
    return Section(
        title, rows, [f"Kernels: {kind}. quantize also sums the squared errors and finds the largest; gguf's does not."]
    )
