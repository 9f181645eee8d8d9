"""``lossless``: bits and speed on natural weights, against zstandard, zipnn and lmzip."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import zstandard

from benchmarks.context import Context
from benchmarks.inputs import minilm_matrices, whisper
from benchmarks.report import Row, Section
from benchmarks.timing import interleaved, processor_seconds
from benchmarks.yardsticks import Yardsticks
from qformat.codecs.base import Buffer, Matrix, pieces
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, F16, F32, DType, Elements

Tensors = Sequence[Elements]

_CODEC = parse_type("lossless")
_LIMITS = {"MiniLM as f32": 26.2, "MiniLM as f16": 13.55, "MiniLM as bf16": 10.6}
_ZIPNN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_SAFETENSORS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_DECODE, _ENCODE = 1000.0, 300.0  # MB/s of the reference machine
_LARGE = 1 << 24  # bytes of a model that is judged by its speed
_MISSING = "Left out, for they are not installed (benchmarks/peers.txt): {}."


def _as(dtype: DType, arrays: Sequence[np.ndarray]) -> Tensors:
    return [Elements(dtype, np.ascontiguousarray(Elements(F32, array).cast(dtype))) for array in arrays]


def _arrays(arrays: Sequence[np.ndarray]) -> Tensors:
    by_name = {"float16": F16, "float32": F32}
    return [Elements(by_name[array.dtype.name], np.ascontiguousarray(array)) for array in arrays]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(package)
    return Path(spec.origin).parent


def _glassllm() -> Tensors:
    with np.load(_folder("glassllm") / "weights" / "en.npz", allow_pickle=False) as file:
        return _arrays([file[name] for name in file.files if file[name].dtype.kind == "f"])


def _torch(path: Path, key: str = "") -> Tensors:
    """Return the floating tensors of a checkpoint; of those that share their memory one."""
    import torch

    state = torch.load(path, weights_only=True, map_location="cpu")
    tensors = {t.data_ptr(): t for t in (state[key] if key else state).values() if t.is_floating_point()}
    names = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
    return [
        Elements(names[t.dtype], t.contiguous().view(torch.uint8).numpy().view(names[t.dtype].storage).reshape(t.shape))
        for t in tensors.values()
        if t.dim()
    ]


def _models() -> tuple[dict[str, Tensors], list[str]]:
    """Return what is measured, and the packages that are missing."""
    minilm = list(minilm_matrices().values())
    models = {f"MiniLM as {dtype.name}": _as(dtype, minilm) for dtype in (F32, F16, BF16)}
    models["Whisper-base"] = _arrays(list(whisper().values()))
    albert = ("models", "transformers", "albert_heads_8_uspto_all_1310k", "pytorch_model.bin")
    more: dict[str, Callable[[], Tensors]] = {
        "glassllm": _glassllm,
        "rxnmapper": lambda: _torch(_folder("rxnmapper").joinpath(*albert)),
        "metatronnanoguard": lambda: _torch(_folder("nanoguard") / "assets" / "model.pt", "model_state_dict"),
    }
    missing = []
    for name, read in more.items():
        try:
            models[name] = read()
        except ImportError:
            missing.append(name)
    return models, missing


@dataclass
class _Coded:
    """A model as this project stores it."""

    tensors: Tensors

    def __post_init__(self) -> None:
        self.work: list[tuple[Elements, tuple[Buffer, ...], np.ndarray]] = []
        self.nbytes = 0
        for tensor in self.tensors:
            matrix, flat = Matrix.of(tensor.data.shape), tensor.data.reshape(-1)
            for piece in pieces(matrix, 1):
                part = flat[piece.elements(matrix)].reshape(piece.rows, piece.cols)
                encoded = _CODEC.encode(Elements(tensor.dtype, part))
                self.work.append((Elements(tensor.dtype, part), encoded.parts, np.empty_like(part)))
                self.nbytes += len(encoded.parts[0]) + 4

    def encode(self) -> None:
        """Encode everything again."""
        for elements, _, _ in self.work:
            _CODEC.encode(elements)

    def decode(self) -> None:
        """Decode everything."""
        for _, parts, out in self.work:
            _CODEC.decode(parts, out)

    def check(self) -> None:
        """Raise if it is not what it was."""
        self.decode()
        if any(elements.data.tobytes() != out.tobytes() for elements, _, out in self.work):
            raise RuntimeError("lossless lost something")


def _joined(tensors: Tensors) -> dict[str, bytes]:
    """Return the bytes of all tensors of each dtype."""
    kinds = {tensor.dtype.name for tensor in tensors}
    return {kind: b"".join(t.data.tobytes() for t in tensors if t.dtype.name == kind) for kind in sorted(kinds)}


def _zstd(tensors: Tensors, context: Context) -> int:
    del context
    compressor = zstandard.ZstdCompressor(19)
    return sum(len(compressor.compress(data)) for data in _joined(tensors).values())


def _zipnn(tensors: Tensors, context: Context) -> int:
    del context
    zipnn = import_module("zipnn")

    def size(kind: str, data: bytes) -> int:
        return len(zipnn.ZipNN(bytearray_dtype=_ZIPNN[kind], input_format="byte", threads=1).compress(bytearray(data)))

    each = sum(min(size(t.dtype.name, t.data.tobytes()), t.data.nbytes) for t in tensors)
    return min(each, sum(size(kind, data) for kind, data in _joined(tensors).items()))


def _lmzip(tensors: Tensors, context: Context) -> int:
    source, target = context.workdir / "peer.safetensors", context.workdir / "peer.lmz"
    _write_safetensors(source, tensors)
    target.unlink(missing_ok=True)
    import_module("lmz").compress(str(source), str(target), workers=1)
    return target.stat().st_size


def _write_safetensors(path: Path, tensors: Tensors) -> None:

    header, start = {}, 0
    for number, tensor in enumerate(tensors):
        stop = start + tensor.data.nbytes
        kind = _SAFETENSORS[tensor.dtype.name]
        header[f"t{number}"] = {"dtype": kind, "shape": list(tensor.data.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data.tobytes() for t in tensors))


_PEERS = {"zstd -19": ("zstandard", _zstd), "zipnn": ("zipnn", _zipnn), "lmzip": ("lmz", _lmzip)}


def run(context: Context) -> Iterator[Section]:
    """Measure sizes and speeds."""
    models, missing = _models()
    coded = {name: _Coded(tensors) for name, tensors in models.items()}
    peers = {name: measure for name, (module, measure) in _PEERS.items() if find_spec(module)}
    missing += [name for name in _PEERS if name not in peers]
    rows = []
    for name, one in coded.items():
        one.check()
        weights = sum(tensor.data.size for tensor in one.tensors)
        bits = 8 * one.nbytes / weights
        others = {peer: 8 * size(one.tensors, context) / weights for peer, size in peers.items()}
        best = min(others, key=lambda peer: others[peer])
        shown = ", ".join(f"{peer} {value:.3f}" for peer, value in others.items())
        limit = _LIMITS.get(name)
        met = bits <= others[best] and (limit is None or bits <= limit)
        target = "<= the best" + (f" and {limit}" if limit else "")
        rows.append(Row(name, f"{bits:.3f} bits", shown, bits / others[best], target, met, 4))
    notes = [_MISSING.format(", ".join(missing))] if missing else []
    yield Section("Lossless: bits for each weight", rows, notes)
    yield _speeds(context, coded)


def _speeds(context: Context, coded: dict[str, _Coded]) -> Section:
    yardsticks = Yardsticks(context)
    functions = {key: processor_seconds(run) for key, run in yardsticks.functions.items()}
    tasks: dict[tuple[str, str], Callable[[], object]] = {}
    for name, one in coded.items():
        tasks[name, "decode"], tasks[name, "encode"] = one.decode, one.encode
        if find_spec("zipnn") and name in _LIMITS:
            tasks |= _zipnn_speeds(name, one.tensors)
    seconds = interleaved(functions | {key: _all_threads(run) for key, run in tasks.items()}, context.rounds(5))
    scales = yardsticks.scales({name: seconds[name] for name in functions})
    rows = []
    for name, what in tasks:
        nbytes = sum(tensor.data.nbytes for tensor in coded[name].tensors)
        wanted = {"decode": _DECODE, "encode": _ENCODE}.get(what) if nbytes >= _LARGE else None
        rows.append(scales.judge(f"{name}: {what}", nbytes / seconds[name, what] / 1e6, wanted, "MB/s"))
    notes = [
        *scales.notes(),
        "Of small models, whose tensors have some 20,000 weights, most is spent on each tensor anew.",
    ]
    return Section("Lossless: speed in bytes of the weights, one core", rows, notes)


def _all_threads(run: Callable[[], object]) -> Callable[[], float]:
    """Return a function that gives the processor seconds of all threads, for peers that use several."""

    def measured() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return measured


def _zipnn_speeds(name: str, tensors: Tensors) -> dict[tuple[str, str], Callable[[], object]]:
    """Return zipnn's compression and decompression of the whole model."""
    ((kind, data),) = _joined(tensors).items()
    zipnn = import_module("zipnn").ZipNN(bytearray_dtype=_ZIPNN[kind], input_format="byte", threads=1)
    compressed = zipnn.compress(bytearray(data))
    return {
        (name, "zipnn compress"): lambda: zipnn.compress(bytearray(data)),
        (name, "zipnn decompress"): lambda: zipnn.decompress(compressed),
    }
