"""The hot loops on one thread, from memory to memory."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from benchmarks.context import Context
from benchmarks.inputs import normal, to_bf16
from benchmarks.report import Section, at_least
from benchmarks.timing import interleaved
from benchmarks.yardsticks import gguf_quantizer, memcpy
from qformat.kernels import load
from qformat.kernels.plain import q4_0 as plain


def _quantizer(kernels: ModuleType, source: np.ndarray, blocks: np.ndarray):
    lanes = np.zeros(load("floats").LANES)
    return lambda: kernels.quantize(source, blocks, lanes) and None


def run(context: Context) -> Section:
    """Measure them."""
    matrix = normal(context.weights)
    weights = matrix.reshape(-1)
    halves = to_bf16(weights)
    blocks = np.zeros(weights.size // 32 * 18, np.uint8)
    decoded = np.zeros_like(weights)
    compiled = load("q4_0")
    compiled.quantize(weights, blocks, np.zeros(load("floats").LANES))  # so that dequantize meets real blocks
    other = np.zeros_like(blocks)
    few = weights.size // 4  # the slow ones need no more
    seconds = interleaved(
        {
            "gguf": gguf_quantizer(matrix[: len(matrix) // 4]),
            "memcpy": memcpy(weights),
            "f32": _quantizer(compiled, weights, other),
            "bf16": _quantizer(compiled, halves, other),
            "decode": lambda: compiled.dequantize(blocks, decoded),
            "plain": _quantizer(plain, weights[:few], other[: few // 32 * 18]),
            "plain decode": lambda: plain.dequantize(blocks[: few // 32 * 18], decoded[:few]),
        },
        context.rounds(9),
    )
    memory = weights.nbytes / seconds["memcpy"] / 1e9
    peer = few / seconds["gguf"] / 1e6
    quick = weights.size / 1e6
    slow = few / 1e6
    reads = weights.nbytes / seconds["f32"] / 1e9
    reads_bf16 = halves.nbytes / seconds["bf16"] / 1e9
    writes = weights.nbytes / seconds["decode"] / 1e9
    name = compiled.__name__.split(".")[-2]
    rows = [
        at_least("quantize f32", quick / seconds["f32"], peer, "Mw/s", "gguf", 8),
        at_least("quantize f32, bytes read", reads, memory, "GB/s", "memcpy", 0.5),
        at_least("quantize bf16", quick / seconds["bf16"], peer, "Mw/s", "gguf"),
        at_least("quantize bf16, bytes read", reads_bf16, memory, "GB/s", "memcpy"),
        at_least("dequantize to f32, bytes written", writes, memory, "GB/s", "memcpy", 0.35),
        at_least("dequantize to f32", quick / seconds["decode"], peer, "Mw/s", "gguf's quantizer"),
        at_least("numpy fallback: quantize f32", slow / seconds["plain"], peer, "Mw/s", "gguf"),
        at_least("numpy fallback: dequantize", slow / seconds["plain decode"], peer, "Mw/s", "gguf's quantizer"),
    ]
    title = f"Kernels: q4_0, one thread, {weights.nbytes / 1e6:.0f} MB of float32 in memory ({name} kernels)"
    return Section(title, rows)
