"""``lossless``: bits and speed on natural weights, against zstandard, zipnn and lmzip."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from benchmarks.context import Context
from benchmarks.encoding import Parts, Prepared, chunk_slice, decode_all, default_jobs, encode_all, parse_type
from benchmarks.inputs import Stored, minilm_matrices, whisper, write_safetensors
from benchmarks.report import Row, Section
from benchmarks.timing import interleaved, processor_seconds
from benchmarks.yardsticks import Yardsticks
from qformat.dtypes import BF16, F16, F32, DType, Elements

Tensors = Sequence[Elements]

_CODEC = parse_type("lossless")
_LIMITS = {"MiniLM as f32": 26.2, "MiniLM as f16": 13.55, "MiniLM as bf16": 10.6}
_ZIPNN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_DECODE, _ENCODE = 1000.0, 300.0  # MB/s of the reference machine
_LARGE = 1 << 24  # bytes of a model that is judged by its speed
_MISSING = "Left out, because not installed (benchmarks/peers.txt): {}."


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


def _models(context: Context) -> tuple[dict[str, Tensors], list[str]]:
    """Return the models by name, and the missing packages."""
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
    if context.quick:
        models = {name: [_few(tensor) for tensor in tensors] for name, tensors in models.items()}
    return models, missing


def _few(tensor: Elements) -> Elements:
    rows = max(1, (1 << 14) // math.prod(tensor.data.shape[1:]))
    return Elements(tensor.dtype, np.ascontiguousarray(tensor.data[:rows]))


@dataclass
class _Coded:
    """A model as this project stores it."""

    tensors: Tensors

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(tensor.data.size for tensor in self.tensors)

    @property
    def source(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.data.nbytes for tensor in self.tensors)

    def __post_init__(self) -> None:
        self.work: list[tuple[Elements, Parts, np.ndarray]] = []
        self.nbytes = 0
        for tensor in self.tensors:
            shape, flat = tensor.data.shape, tensor.data.reshape(-1)
            for chunk, parts in encode_all(_CODEC, tensor):
                part = flat[chunk_slice(shape, chunk)].reshape(chunk.rows, chunk.cols)
                self.work.append((Elements(tensor.dtype, part), parts, np.empty_like(part)))
                self.nbytes += len(parts[0]) + 4

    def encode(self) -> None:
        """Encode everything again."""
        for tensor in self.tensors:
            prepared = Prepared(_CODEC, tensor)
            for chunk in prepared.chunks:
                prepared.encode(chunk)

    def decode(self) -> None:
        """Decode everything."""
        decode_all(_CODEC, ((parts, out) for _, parts, out in self.work))

    def check(self) -> None:
        """Raise if the decoded weights differ from the source."""
        self.decode()
        if any(elements.data.tobytes() != out.tobytes() for elements, _, out in self.work):
            raise RuntimeError("lossless did not give the source's weights back")


def _joined(tensors: Tensors) -> dict[str, bytes]:
    """Return the bytes of all tensors of each dtype."""
    kinds = {tensor.dtype.name for tensor in tensors}
    return {kind: b"".join(t.data.tobytes() for t in tensors if t.dtype.name == kind) for kind in sorted(kinds)}


def _each(tensors: Tensors) -> list[tuple[str, bytes]]:
    return [(tensor.dtype.name, tensor.data.tobytes()) for tensor in tensors]


class _Peer(ABC):
    """Another compressor and the compressed model.

    Attributes
    ----------
    nbytes
        The smallest size, of tensors compressed one by one and joined.
    """

    nbytes: int

    @abstractmethod
    def __init__(self, tensors: Tensors, workdir: Path) -> None: ...

    @abstractmethod
    def encode(self) -> object:
        """Compress the model again, or return the seconds that it took before."""

    @abstractmethod
    def decode(self) -> object:
        """Decompress the model."""


class _Zstd(_Peer):
    """zstandard at level 19, on all processors because it is slow; `encode` returns the summed seconds."""

    def __init__(self, tensors: Tensors, workdir: Path) -> None:
        del workdir
        each = [data for _, data in _each(tensors)]
        ways = [each, list(_joined(tensors).values())] if sum(map(len, each)) < _LARGE else [each]
        found = [self._compressed(way) for way in ways]
        self.nbytes, self._seconds, self._frames = min(found, key=lambda way: way[0])

    @staticmethod
    def _compressed(parts: Sequence[bytes]) -> tuple[int, float, list[bytes]]:
        def compress(data: bytes) -> tuple[bytes, float]:
            start = time.thread_time()
            return zstandard.ZstdCompressor(19).compress(data), time.thread_time() - start

        with ThreadPoolExecutor(default_jobs()) as pool:
            frames, seconds = zip(*pool.map(compress, parts), strict=True)
        return sum(map(len, frames)), sum(seconds), list(frames)

    def encode(self) -> float:
        return self._seconds

    def decode(self) -> None:
        for frame in self._frames:
            zstandard.ZstdDecompressor().decompress(frame)


class _ZipNN(_Peer):
    """zipnn; its speed is measured on joined tensors, which needs fewer calls."""

    def __init__(self, tensors: Tensors, workdir: Path) -> None:
        del workdir
        self._parts = [(self._coder(kind), bytearray(data)) for kind, data in _joined(tensors).items()]
        self._compressed = [coder.compress(data) for coder, data in self._parts]
        each = sum(min(len(self._coder(kind).compress(bytearray(data))), len(data)) for kind, data in _each(tensors))
        self.nbytes = min(each, sum(map(len, self._compressed)))

    @staticmethod
    def _coder(kind: str) -> Any:
        return import_module("zipnn").ZipNN(bytearray_dtype=_ZIPNN[kind], input_format="byte", threads=1)

    def encode(self) -> None:
        for coder, data in self._parts:
            coder.compress(data)

    def decode(self) -> None:
        for (coder, _), compressed in zip(self._parts, self._compressed, strict=True):
            coder.decompress(compressed)


class _Lmzip(_Peer):
    """lmzip, which reads and writes files: all tensors in one file, with default and smaller chunks, and one file each."""

    def __init__(self, tensors: Tensors, workdir: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=workdir))
        stored = {
            f"t{i}": Stored(t.dtype.name.upper(), t.data.shape, t.data.nbytes, [t.data.tobytes()])
            for i, t in enumerate(tensors)
        }
        self._whole = self._folder / "all.safetensors"
        write_safetensors(self._whole, stored)
        each = self._folder / "each"
        each.mkdir()
        for name, tensor in stored.items():
            write_safetensors(each / f"{name}.safetensors", {name: tensor})
        self.nbytes = min(self._compress(each), self._compress(self._whole, chunk_size=1 << 20))
        self.nbytes = min(self.nbytes, self._compress(self._whole))
        shutil.rmtree(each)

    def _compress(self, source: Path, **options: Any) -> int:
        archive = self._folder / "archive.lmz"
        archive.unlink(missing_ok=True)
        import_module("lmz").compress(str(source), str(archive), workers=1, level=9, **options)
        return archive.stat().st_size

    def encode(self) -> None:
        self._compress(self._whole)

    def decode(self) -> None:
        archive, back = self._folder / "archive.lmz", self._folder / "back"
        import_module("lmz").decompress(str(archive), str(back), workers=1, overwrite=True)


#: module and class of each peer, by name
_PEERS: dict[str, tuple[str, type[_Peer]]] = {
    "zstd -19": ("zstandard", _Zstd),
    "zipnn": ("zipnn", _ZipNN),
    "lmzip": ("lmz", _Lmzip),
}


def run(context: Context) -> Iterator[Section]:
    """Measure sizes, then speeds."""
    models, missing = _models(context)
    coded = {name: _Coded(tensors) for name, tensors in models.items()}
    missing += [name for name, (module, _) in _PEERS.items() if not find_spec(module)]
    kinds = {name: peer for name, (module, peer) in _PEERS.items() if find_spec(module)}
    peers: dict[str, dict[str, _Peer]] = {}
    rows = []
    for name, one in coded.items():
        one.check()
        peers[name] = {peer: kind(one.tensors, context.workdir) for peer, kind in kinds.items()}
        rows.append(_size(name, one, peers[name]))
    notes = [
        "zstd gets large models tensor by tensor only: joined they took at most 1 % less, and the others are 7 % smaller and more.",
        *([_MISSING.format(", ".join(missing))] if missing else []),
    ]
    yield Section("Lossless: bits for each weight", rows, notes)
    yield _speeds(context, coded, peers)


def _size(name: str, one: _Coded, peers: dict[str, _Peer]) -> Row:
    bits = 8 * one.nbytes / one.weights
    others = {peer: 8 * found.nbytes / one.weights for peer, found in peers.items()}
    best = min(others.values())
    shown = ", ".join(f"{peer} {value:.3f}" for peer, value in others.items())
    limit = _LIMITS.get(name) if one.source >= _LARGE else None
    target = "<= the best" + (f" and {limit}" if limit else "")
    met = bits <= best and (limit is None or bits <= limit)
    return Row(name, f"{bits:.3f} bits", shown, bits / best, target, met, 4)


def _speeds(context: Context, coded: dict[str, _Coded], peers: dict[str, dict[str, _Peer]]) -> Section:
    yardsticks = Yardsticks(context)
    functions = {key: processor_seconds(run) for key, run in yardsticks.functions.items()}
    tasks: dict[tuple[str, str, str], Callable[[], object]] = {}
    for name, one in coded.items():
        coders: dict[str, _Coded | _Peer] = {"": one, **peers[name]}
        for who, coder in coders.items():
            tasks |= {(name, who, "decode"): coder.decode, (name, who, "encode"): coder.encode}
    timed = {key: processor_seconds(run, time.process_time) for key, run in tasks.items()}
    seconds = interleaved({**functions, **timed}, context.rounds(5))
    scales = yardsticks.scales({name: seconds[name] for name in functions})
    rows = []
    for name, one in coded.items():
        for what, target in (("decode", _DECODE), ("encode", _ENCODE)):
            rate = {who: one.source / seconds[name, who, what] / 1e6 for who in ("", *peers[name])}
            row = scales.judge(f"{name}: {what}", rate[""], target if one.source >= _LARGE else None, "MB/s")
            others = ", ".join(f"{peer} {rate[peer]:,.0f}" for peer in peers[name])
            rows.append(replace(row, peer="; ".join(filter(None, (row.peer, others)))))
    notes = [
        *scales.notes(),
        "Of small models, whose tensors have some 20,000 weights, most is spent on each tensor anew.",
        "lmzip reads and writes files, in the page cache. zstd's compression is timed once, as it takes so long.",
    ]
    return Section("Lossless: speed in bytes of the weights, one core", rows, notes)
