"""Searches against exhaustive ones, which are too slow for more than samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.catalogue import LUT_LLOYD, Q4_0, Q4_1, available
from benchmarks.context import Context
from benchmarks.encoding import ChunkEncoder, default_jobs, encode_all
from benchmarks.models import Model, models
from benchmarks.oracle_lut import long_lloyd, near_optimum
from benchmarks.oracle_q4_0 import DISTRIBUTIONS, SIZE, exact_q4_0, sample
from benchmarks.oracle_q4_1 import exact_q4_1
from benchmarks.report import Row, Section
from benchmarks.scoring import score_codec

_TOLERANCE = 1e-9
_NEAR_LLOYD = 1.005  # of the root mean square error
_TENSORS, _LARGEST = 12, 1 << 19  # tensors of a model, and weights of each, for a long run of Lloyd's algorithm


def _errors(codec: ChunkEncoder, blocks: np.ndarray) -> np.ndarray:
    """Return the sum of squared errors of each block, in float64."""
    decoded = np.empty(blocks.shape, np.float32)
    ((_, parts),) = encode_all(codec, blocks)
    codec.decode(parts, decoded)
    return np.square(blocks.astype(np.float64) - decoded).sum(axis=1)


def _in_parallel(oracle, blocks: np.ndarray) -> np.ndarray:
    with ThreadPoolExecutor(default_jobs()) as pool:
        return np.concatenate(list(pool.map(oracle, np.array_split(blocks, 4 * default_jobs()))))


def _q4_0(context: Context) -> Iterator[Row]:
    """Compare the exact search with all binary16 scales."""
    codec = available([Q4_0[2]])[0].get(Q4_0[2])
    if codec is None:
        return
    count = 16 if context.quick else 128
    exact_q4_0(np.zeros((1, SIZE)))  # compiles it
    for name in DISTRIBUTIONS:
        blocks = sample(name, count)
        best = _in_parallel(exact_q4_0, blocks)
        energy = np.square(blocks.astype(np.float64)).sum(axis=1)
        excess = np.divide(_errors(codec, blocks) - best, energy, out=np.zeros(count), where=energy > 0)
        worst = excess[np.abs(excess).argmax()]
        met = bool(np.abs(worst) <= _TOLERANCE)
        what = f"{codec}: {name}, squared error above the least"
        least = f"{count} blocks, {(excess == 0).sum()} equal to the bit"
        yield Row(what, f"{worst:.1e} of the energy", least, target=f"<= {_TOLERANCE:g}", met=met)


def _blocks_of(model: Model, count: int) -> np.ndarray:
    """Return blocks from anywhere in a model, float32."""
    rng = np.random.default_rng(1)
    whole = [array.reshape(-1) for _, array in model.tensors]
    sizes = np.array([flat.size // SIZE for flat in whole])
    chosen = rng.choice(len(whole), count, p=sizes / sizes.sum())
    starts = [int(rng.integers(sizes[number])) * SIZE for number in chosen]
    return np.array([whole[n][s : s + SIZE] for n, s in zip(chosen, starts, strict=True)], np.float32)


def _exact_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Return the least sum of squared errors of each block."""
    return np.array([exact_q4_1(block) for block in blocks])


def _q4_1(context: Context, model: Model) -> Iterator[Row]:
    """Compare the searches for Q4_1 with the best pair of scale and minimum."""
    codecs = available(Q4_1)[0]
    if not codecs:
        return
    blocks = _blocks_of(model, 16 if context.quick else 96)
    best = math.sqrt(_exact_q4_1(blocks).sum() / blocks.size)
    for text, codec in codecs.items():
        limit = 1.005 if text == Q4_1[2] else None
        own = math.sqrt(_errors(codec, blocks).sum() / blocks.size)
        target, met = ("", None) if limit is None else (f"<= {limit}", own / best <= limit)
        name = f"{text} / exact: {model.name}, {len(blocks)} blocks, rmse"
        yield Row(name, f"{own:.4e}", f"{best:.4e}", own / best, target, met, digits=5)


def _rows(array: np.ndarray) -> np.ndarray:
    """Return the first rows, at most `_LARGEST` weights."""
    return array[: max(1, _LARGEST * len(array) // array.size)]


def _lut(model: Model) -> Iterator[Row]:
    """Compare the codebooks of whole tensors with those of long runs of Lloyd's algorithm."""
    codec = available([LUT_LLOYD])[0].get(LUT_LLOYD)
    if codec is None:
        return
    small = Model(
        model.name, [(name, _rows(array)) for name, array in model.tensors[:: -(-len(model.tensors) // _TENSORS)]]
    )
    score = score_codec(codec, small)
    owners = np.array([tensor for tensor, _ in small.cuts])
    own = np.array([score.squares[owners == number].sum() for number in range(len(small.tensors))])
    for oracle, what, limit in ((long_lloyd, "long run of Lloyd", _NEAR_LLOYD), (near_optimum, "near-optimum", None)):
        with ThreadPoolExecutor(default_jobs()) as pool:
            best = np.array(list(pool.map(lambda tensor, oracle=oracle: oracle(tensor[1], codec.size), small.tensors)))
        ratios = np.sqrt(np.divide(own, best, out=np.ones_like(own), where=best > 0))
        worst = int(ratios.argmax())
        tensor, array = small.tensors[worst]
        rmse = f"{math.sqrt(own[worst] / array.size):.4e}", f"{math.sqrt(best[worst] / array.size):.4e}"
        name = f"{codec} / {what}: {model.name}, worst of {len(ratios)} tensors"
        target, met = ("", None) if limit is None else (f"<= {limit}", bool(ratios[worst] <= limit))
        peer = f"{rmse[1]}; median ratio {np.median(ratios):.5f}"
        yield Row(name, f"{rmse[0]} ({tensor})", peer, float(ratios[worst]), target, met, digits=5)


def run(context: Context) -> Section:
    """Measure it."""
    _, notes = available([Q4_0[2], *Q4_1, LUT_LLOYD])
    rows = [*_q4_0(context)]
    for model in models(quick=context.quick):
        rows += [*_q4_1(context, model), *_lut(model)]
    return Section("Optimum: searches against exhaustive ones, on samples", rows, notes)
