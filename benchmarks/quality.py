"""Are the bytes those of gguf, and the errors too?"""

from __future__ import annotations

import math

import numpy as np
from gguf import GGMLQuantizationType, quants

from benchmarks.catalogue import Q4_0
from benchmarks.context import Context
from benchmarks.inputs import minilm
from benchmarks.report import Row, Section
from qformat.codecs.registry import parse_type
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.encode import Plan, encode_chunk
from qformat.pipeline.measure import collect, measure
from qformat.pipeline.source import SourceTensor

_Q4_0 = GGMLQuantizationType.Q4_0


def _source(tensor: SourceTensor) -> np.ndarray:
    count = math.prod(tensor.shape)
    return np.asarray(tensor.read(slice(0, count)).to_f32(), np.float32).reshape(tensor.shape)


def _encode(tensor: SourceTensor) -> tuple[bytes, np.ndarray]:
    """Return the blocks that `convert` would write, and the weights that a reader gets."""
    plan = Plan(tensor, parse_type(Q4_0[0]))
    blocks = b"".join(bytes(part) for chunk in plan.chunks() for part in encode_chunk(plan, chunk).parts)
    decoded = np.empty((plan.matrix.rows, plan.matrix.cols), np.float32)
    plan.codec.decode([blocks], decoded)
    return blocks, decoded.reshape(tensor.shape)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def run(context: Context) -> Section:
    """Compare every matrix of MiniLM."""
    del context
    tensors = [t for t in open_checkpoint(minilm()).tensors if len(t.shape) == 2 and t.dtype.floating]
    results, (total,) = collect(measure(tensors, [parse_type(Q4_0[0])]))
    measured = {stats.tensor: stats for stats in results}
    same_bytes = same_values = same_error = 0
    blocks_compared = 0
    sources, squares = [], []
    for tensor in tensors:
        source = _source(tensor)
        blocks, decoded = _encode(tensor)
        peer = quants.quantize(source, _Q4_0)
        peer_decoded = quants.dequantize(peer, _Q4_0)
        same_bytes += blocks == peer.tobytes()
        same_values += decoded.tobytes() == peer_decoded.tobytes()
        error = (source - peer_decoded).astype(np.float64)
        wide = source.astype(np.float64)
        same_error += _close(measured[tensor.name].rel_rmse, math.sqrt(np.mean(error**2)) / wide.std())
        blocks_compared += len(blocks) // 18
        sources.append(wide.reshape(-1))
        squares.append(np.sum(error**2))
    everything = np.concatenate(sources)
    rmse = math.sqrt(math.fsum(squares) / everything.size)
    rel_rmse = rmse / everything.std()
    of = f"of {len(tensors)} tensors"

    def counted(name: str, count: int, peer: str) -> Row:
        return Row(name, f"{count} {of}", peer, count / len(tensors), "all", count == len(tensors))

    def equal(name: str, own: float, peer: float) -> Row:
        return Row(name, f"{own:.9f}", f"gguf {peer:.9f}", own / peer, "equal", _close(own, peer))

    rows = [
        counted("q4_0: blocks identical, byte for byte", same_bytes, f"gguf, {blocks_compared:,} blocks"),
        counted("q4_0: decoded weights identical", same_values, "gguf's dequantize"),
        counted("q4_0: rel_rmse equal", same_error, "gguf, to 1 part in 10^9"),
        equal("q4_0: total rel_rmse (rmse / standard deviation)", total.rel_rmse, rel_rmse),
        equal("q4_0: total rmse", total.rmse, rmse),
    ]
    return Section("Quality: all-MiniLM-L6-v2, every matrix, q4_0 naive", rows)
