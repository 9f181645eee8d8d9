"""How fast each codec encodes and decodes on one thread, from memory to memory, called chunk by chunk as the pipeline does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

from benchmarks.catalogue import AFFINE, EVERY, GGUF, LUT, NLM, NLM_MAX, Q4_0, Q4_1, available
from benchmarks.context import Context
from benchmarks.encoding import CHUNK_ELEMENTS, ChunkEncoder, Prepared, decode_all, encode_all
from benchmarks.ggml import BLOCKS, NONE, SEARCHING, Library
from benchmarks.inputs import minilm_matrices, normal
from benchmarks.report import Row, Section
from benchmarks.timing import interleaved, processor_seconds
from benchmarks.yardsticks import Scales, Yardsticks

_REAL, _NORMAL, _SPARSE, _TERNARY = "real weights", "N(0, 1)", "90 % zeros", "ternary"
#: encoders: type, data, million weights a second of the reference machine
_ENCODERS = {
    **{(Q4_0[2], data): rate for data, rate in ((_REAL, 100), (_SPARSE, 40), (_TERNARY, 40))},
    **{(Q4_0[1], data): 350 for data in (_REAL, _NORMAL)},
    **{(Q4_1[2], data): 80 for data in (_REAL, _NORMAL)},
    **{(Q4_1[1], data): 250 for data in (_REAL, _NORMAL)},
    **{(text, data): 400 for text in NLM.values() for data in (_REAL, _NORMAL)},
}
_DECODERS = {text: 1500 if text.startswith(("lut", "nlm")) else 2000 for text in EVERY}
#: types whose decoder runs on the same input as that of another type
_SAME_DECODER = {*Q4_0[1:], *Q4_1[1:], *NLM_MAX.values(), *LUT[1:3], *AFFINE[1:3]}
_SECONDS = 0.08  # aim for a run; slow encoders get fewer weights

Timed = Callable[[], None]


@dataclass(frozen=True)
class _Task:
    """A function to be timed and the number of weights that it processes."""

    run: Timed
    weights: int


def _sized(make: Callable[[int], _Task], most: int) -> _Task:
    """Return a task that takes about `_SECONDS`, of at most `most` weights."""
    few = min(CHUNK_ELEMENTS, most)
    trial = make(few)
    trial.run()
    rate = trial.weights / processor_seconds(trial.run)()
    chunks = int(rate * _SECONDS) // CHUNK_ELEMENTS
    return make(min(most, chunks * CHUNK_ELEMENTS)) if chunks > 1 and most > few else trial


def _cut(tensors: Sequence[np.ndarray], weights: int) -> list[np.ndarray]:
    """Return tensors of about `weights` weights in all: whole ones, typical sizes first, and rows of the last one."""
    chosen = []
    for array in sorted(tensors, key=lambda array: abs(math.log2(array.size / CHUNK_ELEMENTS))):
        rows = min(len(array), -(-weights * len(array) // array.size))
        if rows > 0:
            chosen.append(array[:rows])
            weights -= chosen[-1].size
    return chosen


def _encoder(codec: ChunkEncoder, tensors: Sequence[np.ndarray]) -> Callable[[int], _Task]:
    def make(weights: int) -> _Task:
        cut = _cut(tensors, weights)

        def encode() -> None:
            for array in cut:
                tensor = Prepared(codec, array)
                for chunk in tensor.chunks:
                    tensor.encode(chunk)

        return _Task(encode, sum(array.size for array in cut))

    return make


def _decoder(codec: ChunkEncoder, rows: np.ndarray, out: np.ndarray) -> _Task:
    """Decode a large array; its chunks are those of a few rows again and again, each with bytes of its own."""
    encoded = encode_all(codec, rows)
    work = []
    flat = out.reshape(-1)
    start = 0
    while start < out.size:
        for chunk, parts in encoded:
            size = chunk.rows * chunk.cols
            if start + size <= out.size:
                copies = tuple(bytes(bytearray(part)) for part in parts)
                work.append((copies, flat[start : start + size].reshape(chunk.rows, chunk.cols)))
            start += size

    return _Task(lambda: decode_all(codec, work), sum(target.size for _, target in work))


def _gguf(kind: str, rows: np.ndarray) -> dict[str, _Task]:
    type_ = GGMLQuantizationType[kind.upper()]
    blocks = quants.quantize(rows, type_)

    def encode() -> None:
        quants.quantize(rows, type_)

    def decode() -> None:
        quants.dequantize(blocks, type_)

    return {"encode": _Task(encode, rows.size), "decode": _Task(decode, rows.size)}


def _ggml(library: Library, kind: str, rows: np.ndarray, out: np.ndarray) -> dict[str, _Task]:
    few = rows[: (1 << 18 if kind in SEARCHING else rows.size) // rows.shape[1]]
    blocks = np.tile(library.quantize(kind, few), out.size // few.size)

    def encode() -> None:
        for start in range(0, len(few), CHUNK_ELEMENTS // few.shape[1]):
            library.quantize(kind, few[start : start + CHUNK_ELEMENTS // few.shape[1]])

    return {
        "encode": _Task(encode, few.size),
        "decode": _Task(lambda: library.dequantize(kind, blocks, out), out.size),
    }


def _data(context: Context) -> dict[str, list[np.ndarray]]:
    rows = normal(context.weights // 2, sd=1.0)
    real = list(minilm_matrices().values())
    rng = np.random.default_rng(2)
    few = rows[: len(rows) // 8]
    sparse = few * (rng.random(few.shape, np.float32) < 0.1)
    ternary = np.float32(0.037) * rng.integers(-1, 2, few.shape, np.int8)
    return {_REAL: real, _NORMAL: [rows], _SPARSE: [sparse], _TERNARY: [ternary.astype(np.float32)]}


def _tasks(context: Context, out: np.ndarray) -> dict[tuple[str, str, str], _Task]:
    """Return the tasks by (who, encode or decode, data)."""
    data = _data(context)
    (rows,) = data[_NORMAL]
    few = rows[: (1 << 21) // rows.shape[1]]
    most = CHUNK_ELEMENTS if context.quick else rows.size
    tasks = {}
    for text, codec in available(EVERY)[0].items():
        kinds = (_REAL, _NORMAL, _SPARSE, _TERNARY) if text in Q4_0[1:] else (_REAL, _NORMAL)
        for kind in kinds:
            tasks[text, "encode", kind] = _sized(_encoder(codec, data[kind]), most)
        if text not in _SAME_DECODER:
            tasks[text, "decode", _NORMAL] = _decoder(codec, few, out)
    for kind in GGUF:
        tasks |= {(f"gguf {kind}", what, _NORMAL): task for what, task in _gguf(kind, few).items()}
    for library in context.ggml:
        for kind in BLOCKS:
            named = _ggml(library, kind, few, out).items()
            tasks |= {(f"{library.name} {kind}", what, _NORMAL): task for what, task in named}
    return tasks


def _rows(rates: dict[tuple[str, str, str], float], scales: Scales) -> Iterator[Row]:
    for (who, what, data), rate in rates.items():
        wanted = _ENCODERS.get((who, data)) if what == "encode" else _DECODERS.get(who)
        yield scales.judge(f"{who}: {what}, {data}", rate, wanted)


def run(context: Context) -> Iterator[Section]:
    """Measure them, all in turn."""
    out = np.zeros((context.weights // 4096, 4096), np.float32)
    tasks = _tasks(context, out)
    yardsticks = Yardsticks(context)
    functions = {key: task.run for key, task in tasks.items()} | yardsticks.functions
    seconds = interleaved({key: processor_seconds(run) for key, run in functions.items()}, context.rounds(5))
    scales = yardsticks.scales(seconds)
    rates = {key: task.weights / seconds[key] / 1e6 for key, task in tasks.items()}
    notes = [
        *scales.notes(),
        "qformat's encoders also sum the squared errors and find the largest; codebooks of whole tensors are part of their time.",
        *available(EVERY)[1],
        *([] if context.ggml else [NONE]),
    ]
    for what, title in (("encode", "Encoding"), ("decode", f"Decoding to {out.nbytes / 1e6:.0f} MB of float32")):
        chosen = {key: rate for key, rate in rates.items() if key[1] == what}
        yield Section(f"Speed: {title}, one thread", list(_rows(chosen, scales)), notes)
        notes = notes[:2]
