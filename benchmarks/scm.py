"""``scm``: the error at each rate, the cost of layers and of the residual, the bytes read for a low rate, and speed."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from benchmarks.context import Context
from benchmarks.encoding import default_jobs, save_elements
from benchmarks.inputs import minilm_matrices, normal, whisper
from benchmarks.models import Model, thinned
from benchmarks.oracle_scm import Uniform, decoded
from benchmarks.report import Row, Section
from benchmarks.timing import interleaved, processor_seconds
from benchmarks.yardsticks import Yardsticks
from qformat import safe_open, save_file
from qformat.dtypes import BF16, F16, F32, Elements, from_array

Tensors = dict[str, np.ndarray]

_RATES = (2.0, 2.5, 3.0, 4.0, 4.75, 5.0, 6.0)
_LAYERS = tuple(2 + i / 4 for i in range(17))  # nominal rates of the layers up to 6 bits
_SHOWN = (2.0, 3.0, 4.0, 5.0, 6.0)
_LEAST = 4096  # weights: the tables of smaller tensors count for more than their codes
_SAMPLE = 8  # tensors of each model for single rates, which are slow
_IDEAL, _STRETCH = 1.10, 1.06
_LAYERED = 1.03
_LOSSLESS = 1.01
_TOUCHED = 2.2  # bits for each weight
_DECODE = {"2": 250.0, "3": None, "4": 150.0, "6": None, "lossless": None}  # Mw/s of the reference machine
_ENCODE = {"encode": "scm", "encode to 4 bits": "scm:bpw=4"}
_ENCODE_RATE = 40.0
_TIMED = 1 << 24  # weights of each model
_SAME = 1e-3  # of an error: as near as the file's own figure has to be

#: ways of the baseline: how positions are sent, and where weights are reconstructed
_BASELINES = {
    "best positions": partial(decoded, positions="best", middle=True),
    "truncated": partial(decoded, positions="best", middle=False),
    "bitset": partial(decoded, positions="bitset", middle=True),
}


def _models(context: Context) -> list[Model]:
    models = [Model("MiniLM, float32", list(minilm_matrices().items()))]
    models.append(Model("Whisper-base, float16", list(whisper().items())))
    if not context.quick:
        return models
    few = [Model(model.name, [model.tensors[i] for i in _spread(model.tensors, 4)]) for model in models]
    return [thinned(model, 1 << 15) for model in few]


def _spread(tensors: Sequence[tuple[str, np.ndarray]], count: int) -> list[int]:
    """Return the numbers of some tensors, from the smallest to the largest."""
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i][1].size, tensors[i][0]))
    chosen = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [order[i] for i in chosen]


def _rmse(values: np.ndarray, back: np.ndarray) -> float:
    error = values.astype(np.float64)
    error -= back
    return math.sqrt(float(np.vdot(error, error)) / error.size)


def _q4_1_wide(values: np.ndarray, bpw: float = 6.0) -> np.ndarray:
    """Quantize with naive Q4_1 with scale and minimum in float32, blocks of 32, and decode again."""
    assert bpw == 6
    blocks = np.pad(values.reshape(-1).astype(np.float32), (0, -values.size % 32), "edge").reshape(-1, 32)
    low = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - low) / np.float32(15)
    codes = np.rint(np.divide(blocks - low, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale + low).reshape(-1)[: values.size].reshape(values.shape)


@dataclass(frozen=True)
class _Errors:
    """Root mean square errors of a model's tensors, and the tensors' standard deviations."""

    rmse: np.ndarray
    deviations: np.ndarray

    @property
    def rel(self) -> float:
        """Mean of the tensors' rel_rmse."""
        return float((self.rmse / self.deviations).mean())

    @property
    def mean(self) -> float:
        """Mean of the tensors' rmse."""
        return float(self.rmse.mean())

    def over(self, other: _Errors) -> float:
        """Return the ratio of both means to another one's, whichever is larger."""
        return max(self.rel / other.rel, self.mean / other.mean)

    def __str__(self) -> str:
        return f"{self.rel:.5f} ({self.mean:.6f})"


class _Measured:
    """A model in a file, its errors, and those of others.

    Parameters
    ----------
    model
        The model.
    folder
        Where to put files.
    """

    def __init__(self, model: Model, folder: Path) -> None:
        self.model = model
        self.tensors: Tensors = {name: array for name, array in model.tensors if array.size >= _LEAST}
        self._folder = folder
        self._uniform: dict[str, Uniform] = {}

    @cached_property
    def path(self) -> Path:
        """The file, with all layers."""
        return self._saved("scm")

    @cached_property
    def deviations(self) -> np.ndarray:
        """Standard deviations of the tensors."""
        return self.each(lambda name: float(self.tensors[name].std(dtype=np.float64)))

    def _saved(self, kind: str) -> Path:
        path = self._folder / f"{kind.partition(':')[0]}.qf"
        save_file(dict(self.model.tensors), path, kind, overwrite=True)
        return path

    def each(self, function: Callable[[str], float], names: Sequence[str] = ()) -> np.ndarray:
        """Return the result of a function for each tensor, on all processors, the largest tensors first."""
        names = names or list(self.tensors)
        by_size = sorted(names, key=lambda name: -self.tensors[name].size)
        with ThreadPoolExecutor(default_jobs()) as pool:
            found = dict(zip(by_size, pool.map(function, by_size), strict=True))
        return np.array([found[name] for name in names])

    def own(self, bpw: float) -> tuple[_Errors, np.ndarray]:
        """Return the errors of what is read at a rate, and the bits for each weight that were needed.

        Raises
        ------
        RuntimeError
            If the file records another error for the layer.
        """
        rmse, bits = [], []
        with safe_open(self.path, quality=bpw) as file:
            for name, array in self.tensors.items():
                rmse.append(_rmse(array, file.get_tensor(name, np.float32)))
                layer = min(file.info(name).layers, key=lambda layer: abs(layer.error.rmse - rmse[-1]))
                if not math.isclose(layer.error.rmse, rmse[-1], rel_tol=_SAME):
                    raise RuntimeError(
                        f"{name} at {bpw} bits: rmse {rmse[-1]}, but the file records {layer.error.rmse}"
                    )
                bits.append(layer.bpw)
        return self.errors(np.array(rmse)), np.array(bits)

    def stored(self, kind: str) -> _Errors:
        """Return the errors of another type."""
        with safe_open(self._saved(kind)) as file:
            read = [_rmse(array, file.get_tensor(name, np.float32)) for name, array in self.tensors.items()]
        return self.errors(np.array(read))

    def errors(self, rmse: np.ndarray) -> _Errors:
        """Return errors together with the standard deviations."""
        return _Errors(rmse, self.deviations)

    def peer(self, function: Callable[[np.ndarray, float], np.ndarray], bpw: float) -> _Errors:
        """Return the errors of a function that quantizes and decodes."""
        return self.errors(
            self.each(lambda name: _rmse(self.tensors[name], function(self.tensors[name], bpw))),
        )

    def uniform(self, name: str) -> Uniform:
        """Return uniform quantizers of a tensor."""
        if name not in self._uniform:
            self._uniform[name] = Uniform(self.tensors[name])
        return self._uniform[name]

    def ideal(self, bits: np.ndarray) -> _Errors:
        """Return the errors of ideally coded uniform quantizers, each tensor's at bits of its own."""
        wanted = dict(zip(self.tensors, map(float, bits), strict=True))
        return self.errors(self.each(lambda name: self.uniform(name).ideal(wanted[name])))


def _rate(measured: _Measured, bpw: float) -> Iterator[Row]:
    """Yield rows on a model at a rate."""
    own, bits = measured.own(bpw)
    title = f"{measured.model.name}, {bpw:g} bits"
    peers = {name: measured.peer(function, bpw) for name, function in _BASELINES.items()}
    best = min(peers, key=lambda name: peers[name].rel)
    others = ", ".join(f"{name} {peer.rel:.4f}" for name, peer in peers.items() if name != best)
    ratio = own.over(peers[best])
    yield Row(f"{title} / significance coding", f"{own}", f"{best} {peers[best]}, {others}", ratio, "< 1", ratio < 1, 4)
    ideal = measured.ideal(np.full(len(bits), bpw))
    ratio = own.over(ideal)
    yield Row(
        f"{title} / ideal", f"{own}", f"{ideal}", ratio, f"<= {_IDEAL:g}, better {_STRETCH:g}", ratio <= _IDEAL, 4
    )
    ideal = measured.ideal(bits)
    yield Row(
        f"{title} / ideal at the {bits.mean():.4f} that it takes", f"{own}", f"{ideal}", own.over(ideal), digits=4
    )


def _quality(measured: _Measured) -> Section:
    rows = [row for bpw in _RATES for row in _rate(measured, bpw)]
    blocks = {
        (4.5, 0.68, "q4_0:search=exact"): measured.stored("q4_0:search=exact"),
        (6.0, 0.30, "naive Q4_1 with float32 fields"): measured.peer(_q4_1_wide, 6),
    }
    for (bpw, limit, name), peer in blocks.items():
        own, _ = measured.own(bpw)
        ratio = own.over(peer)
        title = f"{measured.model.name}, {bpw:g} bits / {name}"
        rows.append(Row(title, f"{own}", f"{peer}", ratio, f"<= {limit:g}", ratio <= limit, 4))
    left_out = len(measured.model.tensors) - len(measured.tensors)
    notes = [
        "rel_rmse, the mean of the tensors' own, and in brackets the mean of their rmse; the ratio is the larger one of both.",
        f"{left_out} of {len(measured.model.tensors)} tensors have fewer than {_LEAST} weights and are left out.",
        "Significance coding decodes to the middles of what its bits allow for, unless it is called truncated.",
        "Ideal is a uniform quantizer of each tensor, its codes' entropy the bits, its levels the means.",
    ]
    return Section(f"scm: error of {measured.model.name}, {len(measured.tensors)} tensors", rows, notes)


def _gaps(context: Context, folder: Path) -> Section:
    """Return how far N(0, 1) is from the bound for any code."""
    measured = _Measured(Model("", [("x", normal(1 << (18 if context.quick else 22), sd=1.0))]), folder)
    rows = []
    for bpw in _RATES:
        own, bits = measured.own(bpw)
        others = {name: measured.peer(function, bpw) for name, function in _BASELINES.items()}
        others["ideal uniform"] = measured.ideal(np.array([bpw]))
        shown = ", ".join(f"{name} {bpw + math.log2(other.rel):.3f}" for name, other in others.items())
        gap = float(bits[0]) + math.log2(own.rel)
        rows.append(Row(f"{bits[0]:.4f} bits", f"{gap:.3f} bits more", shown))
    notes = [
        "No code of R bits has a rel_rmse below 2^-R on N(0, 1): the bits for each weight that each needs more than that."
    ]
    return Section("scm: N(0, 1), bits above the bound", rows, notes)


def _embedded(measured: _Measured) -> Section:
    """Compare layers, which begin with those of lower rates, with single rates."""
    every = list(measured.tensors.items())
    names = [every[i][0] for i in _spread(every, _SAMPLE)]
    with safe_open(measured.path) as file:
        layers = {name: file.info(name).layers for name in names}
    ratios = {}
    for number, bpw in enumerate(_LAYERS):
        own = np.array([layers[name][number].error.rmse for name in names])
        wanted = {name: layers[name][number].bpw for name in names}
        single = measured.each(lambda name, wanted=wanted: measured.uniform(name).coded(wanted[name]), names)
        ratios[bpw] = own / single
    rows = [_layer(f"{measured.model.name}: layers up to {bpw:g} bits", ratios[bpw]) for bpw in _SHOWN]
    worst = max(ratios, key=lambda bpw: ratios[bpw].mean())
    rows.append(_layer(f"{measured.model.name}: the worst of {len(_LAYERS)} layers, {worst:g} bits", ratios[worst]))
    notes = [
        f"The ratio of rmse to that of one step for a whole tensor, coded to the same size: the mean of {len(names)} tensors.",
        "A single rate does not pay for its table of what codes mean. The worst layer is the one with the largest mean.",
    ]
    return Section(f"scm: layers against single rates, {measured.model.name}", rows, notes)


def _layer(name: str, ratios: np.ndarray) -> Row:
    ratio = float(ratios.mean())
    shown = f"{ratios.min():.4f} to {ratios.max():.4f} x"
    return Row(name, shown, "single rate, same size", ratio, f"<= {_LAYERED:g}", ratio <= _LAYERED, 4)


def _bits(path: Path, kind: str, tensors: Mapping[str, Elements]) -> float:
    """Return the bits of a whole file for each weight."""
    save_elements(path, tensors, kind)
    size = path.stat().st_size
    path.unlink()
    return 8 * size / sum(elements.data.size for elements in tensors.values())


def _sizes(context: Context, models: Sequence[Model]) -> Section:
    minilm, base = ({name: from_array(array) for name, array in model.tensors} for model in models)
    cases = {
        f"MiniLM as {dtype.name}": {name: Elements(dtype, own.cast(dtype)) for name, own in minilm.items()}
        for dtype in (F32, F16, BF16)
    }
    rows = []
    for name, tensors in {**cases, "Whisper-base": base}.items():
        own, peer = (_bits(context.workdir / "scm-size.qf", kind, tensors) for kind in ("scm", "lossless"))
        ratio = own / peer
        met = ratio <= _LOSSLESS
        rows.append(Row(f"{name}: size", f"{own:.3f} bits", f"lossless {peer:.3f}", ratio, f"<= {_LOSSLESS:g}", met, 4))
    return Section("scm: bits for each weight of the whole file, which is lossless", rows)


class _Counted(io.RawIOBase):
    """A file that counts the bytes read from it.

    Attributes
    ----------
    total
        The bytes.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.total = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self.total += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _touched(measured: Sequence[_Measured]) -> Section:
    rows = []
    for one in measured:
        counted = _Counted(one.path)
        with safe_open(counted, quality=2.0) as file:
            opened = counted.total
            for name in file.keys():  # noqa: SIM118  not a dict
                file.get_tensor(name)
        counted.close()
        scale = 8 / one.model.weights
        bits, index = scale * counted.total, scale * opened
        whole = scale * one.path.stat().st_size
        rows.append(
            Row(
                f"{one.model.name}: bytes read",
                f"{bits:.3f} bits, index {index:.4f} of them",
                f"whole file {whole:.3f}",
                bits / whole,
                f"<= {_TOUCHED:g} bits",
                bits <= _TOUCHED,
                3,
            )
        )
    return Section("scm: bytes read for 2 bits/weight of a file that is lossless", rows)


def _decode(path: Path, quality: float | str) -> None:
    with safe_open(path, quality=quality, jobs=1, verify=False) as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            file.get_tensor(name)


def _several(model: Model) -> Tensors:
    """Return tensors of about `_TIMED` weights in all."""
    chosen: Tensors = {}
    left = _TIMED
    for name, array in model.tensors:
        if array.size <= left:
            chosen[name] = array
            left -= array.size
    return chosen


def _speeds(context: Context, models: Sequence[Model]) -> Section:
    yardsticks = Yardsticks(context)
    functions: dict[tuple[str, str] | str, Callable[[], object]] = dict(yardsticks.functions)
    wanted = {f"decode {quality}": rate for quality, rate in _DECODE.items()} | dict.fromkeys(_ENCODE, _ENCODE_RATE)
    target = context.workdir / "scm-encoded.qf"
    chosen = {model.name: _several(model) for model in models}
    for number, (name, tensors) in enumerate(chosen.items()):
        path = context.workdir / f"scm-speed-{number}.qf"
        save_file(tensors, path, "scm")
        for quality in _DECODE:
            functions[name, f"decode {quality}"] = partial(_decode, path, quality)
        for what, kind in _ENCODE.items():
            functions[name, what] = partial(save_file, tensors, target, kind, overwrite=True, jobs=1)
    timed = {key: processor_seconds(run, time.process_time) for key, run in functions.items()}
    seconds = interleaved(timed, context.rounds(5))
    scales = yardsticks.scales({name: seconds[name] for name in yardsticks.functions})
    rows = []
    for name, tensors in chosen.items():
        weights = sum(array.size for array in tensors.values())
        for what, limit in wanted.items():
            rows.append(scales.judge(f"{name}: {what}", weights / seconds[name, what] / 1e6, limit))
    target.unlink()
    notes = [
        *scales.notes(),
        "Files in the page cache, with jobs=1; decoding is to new arrays of float32 (lossless: as stored), without hashing.",
    ]
    return Section("scm: speed, one core", rows, notes)


def run(context: Context) -> Iterator[Section]:
    """Measure all of it."""
    models = _models(context)
    measured = []
    for number, model in enumerate([*models, None]):
        folder = context.workdir / f"scm-{number}"
        folder.mkdir()
        if model is None:
            yield _gaps(context, folder)
            continue
        measured.append(_Measured(model, folder))
        yield _quality(measured[-1])
    for one in measured:
        yield _embedded(one)
    yield _sizes(context, models)
    yield _touched(measured)
    yield _speeds(context, models)
