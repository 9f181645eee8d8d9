"""The entropy coder: bits and speed on codes of known distributions, against other coders; the error of few levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import constriction
import numpy as np
import zstandard
from gguf import GGMLQuantizationType, quants

from benchmarks.context import Context
from benchmarks.encoding import (
    Chunk,
    ErrorStats,
    Parts,
    Prepared,
    chunk_slice,
    code_stream,
    decode_all,
    digits_per_symbol,
    encode_all,
    parse_type,
    totals,
)
from benchmarks.inputs import minilm_matrices, normal
from benchmarks.report import Row, Section, figure
from benchmarks.timing import interleaved, processor_seconds
from benchmarks.yardsticks import Yardsticks
from qformat.codecs.levels import LevelCodec
from qformat.dtypes import BF16, F32, Elements

_TENSOR_SCALE = "levels:n={},scale=tensor"
_SLOWER = 15.0  # than this project's decoder, at least: constriction's
_LARGER = 1.005  # than constriction's stream, at most: a whole tensor
#: rel_rmse of the best levels for N(0, 1), found by Lloyd's steps on its density, and the entropy of their codes
_GAUSSIAN = {3: (0.43609, 1.5358), 5: (0.28274, 2.2029), 7: (0.20976, 2.6469), 15: (0.10362, 3.6766)}
_LEVELS_AT = tuple(("levels:n=15,scale=tensor", bpw) for bpw in (1, 2, 3))
_TERNARY_ERROR = 0.437
_TQ1_0_SHARE = 0.55


@dataclass(frozen=True)
class _Target:
    """Shares of the codes, most bits for each; rates of the reference machine in million codes or weights a second."""

    name: str
    shares: tuple[float, ...]
    bits: float
    to_codes: float
    to_weights: float


_TARGETS = (
    _Target("uniform ternary", (1 / 3, 1 / 3, 1 / 3), 1.593, 2500, 1500),
    _Target("5/90/5", (0.05, 0.9, 0.05), 0.573, 2500, 1500),
    _Target("2/8/80/8/2", (0.02, 0.08, 0.8, 0.08, 0.02), 1.072, 1200, 800),
)
_ENCODE = 500.0


@dataclass
class _Coded:
    """A tensor of codes as this project stores it, and functions that read and write it."""

    codec: LevelCodec
    codes: np.ndarray
    chunks: list[tuple[Chunk, Parts]]

    @classmethod
    def of(cls, target: _Target, count: int) -> _Coded:
        """Draw codes and encode them as weights."""
        codec = parse_type(_TENSOR_SCALE.format(len(target.shares)))
        assert isinstance(codec, LevelCodec)
        codes = np.random.default_rng(0).choice(len(target.shares), count, p=target.shares).astype(np.uint8)
        coded = cls(codec, codes.reshape(-1, 4096), [])
        coded.chunks = encode_all(codec, coded.weights())
        return coded

    def weights(self) -> np.ndarray:
        """Return the weights that the codes stand for, float32."""
        return (self.codes.astype(np.float32) - self.codec.size // 2) * np.float32(0.25)

    @property
    def bits(self) -> float:
        """Bits of all segments for each code."""
        return 8 * (sum(len(parts[0]) + 4 for _, parts in self.chunks) + 4 * self.codec.size) / self.codes.size

    def _work(self, out: np.ndarray) -> Iterator[tuple[Parts, np.ndarray]]:
        """Yield the bytes of each chunk and its part of a flat array."""
        for chunk, parts in self.chunks:
            yield parts, out[chunk_slice(self.codes.shape, chunk)].reshape(chunk.rows, chunk.cols)

    def to_codes(self, out: np.ndarray) -> None:
        """Decode to int8."""
        for parts, target in self._work(out):
            self.codec.decode_codes(parts, target)

    def to_f32(self, out: np.ndarray) -> None:
        """Decode to float32."""
        decode_all(self.codec, self._work(out))

    def to_bf16(self, out: np.ndarray) -> None:
        """Decode to bfloat16 as the readers do: float32, a chunk at a time, then rounded."""
        for parts, target in self._work(out):
            values = np.empty(target.shape, np.float32)
            self.codec.decode(parts, values)
            target[:] = Elements(F32, values).cast(BF16)

    def encoder(self) -> Callable[[], None]:
        """Return a function that encodes the weights and measures errors, after levels have been fitted."""
        tensor = Prepared(self.codec, self.weights())

        def encode() -> None:
            for chunk in tensor.chunks:
                tensor.encode(chunk)

        return encode

    def coder(self) -> Callable[[], None]:
        """Return a function that entropy-codes the codes alone."""
        flat = self.codes.reshape(-1)

        def code() -> None:
            for chunk, _ in self.chunks:
                code_stream(flat[chunk_slice(self.codes.shape, chunk)], self.codec.size)

        return code


def _entropy(codes: np.ndarray) -> float:
    shares = np.bincount(codes) / codes.size
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def _constriction(codes: np.ndarray, few: int) -> tuple[float, Callable[[], None]]:
    """Return bits for each code, and a function that decodes some of them."""
    shares = np.bincount(codes) / codes.size
    model = constriction.stream.model.Categorical(shares, perfect=False)
    symbols = codes.astype(np.int32)
    sizes = []
    for part in (symbols, symbols[:few]):
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(part, model)
        compressed = coder.get_compressed()
        sizes.append(32 * compressed.size / part.size)

    def decode() -> None:
        constriction.stream.stack.AnsCoder(compressed.copy()).decode(model, few)

    return sizes[0], decode


def _torchac(codes: np.ndarray) -> float | None:
    """Return bits for each code, or None where torchac cannot be had (it compiles itself when it is imported)."""
    try:
        import torch
        import torchac
    except (ImportError, RuntimeError):
        return None
    shares = np.bincount(codes) / codes.size
    cdf = torch.tensor(np.minimum(np.concatenate([[0], np.cumsum(shares)]), 1), dtype=torch.float32)
    stream = torchac.encode_float_cdf(cdf.expand(codes.size, cdf.numel()), torch.from_numpy(codes.astype(np.int16)))
    return 8 * len(stream) / codes.size


def _zstd(codes: np.ndarray, size: int) -> float:
    """Return bits for each code of zstd -19, of as many codes to a byte as it can hold, which it codes better than whole bits."""
    each = digits_per_symbol(size)
    whole = codes[: codes.size // each * each].reshape(-1, each)
    packed = (whole * size ** np.arange(each)).sum(axis=1).astype(np.uint8)
    return 8 * len(zstandard.ZstdCompressor(19).compress(packed.tobytes())) / whole.size


def _rates(context: Context) -> Iterator[Section]:
    count = 1 << (20 if context.quick else 22)
    coded = {target.name: _Coded.of(target, count) for target in _TARGETS}
    few = min(count, 1 << 20)
    peers = {name: _constriction(one.codes.reshape(-1), few) for name, one in coded.items()}
    rows = []
    for target in _TARGETS:
        one = coded[target.name]
        codes = one.codes.reshape(-1)
        entropy = _entropy(codes)
        others = {
            "constriction": peers[target.name][0],
            "torchac": _torchac(codes),
            "zstd -19": _zstd(codes, one.codec.size),
        }
        shown = ", ".join(f"{name} {bits:.4f}" for name, bits in others.items() if bits is not None)
        met = one.bits <= target.bits and one.bits <= 1.005 * entropy
        wanted = f"<= {target.bits} and 1.005 x entropy"
        ratio = one.bits / entropy
        rows.append(Row(target.name, f"{one.bits:.4f} bits", f"entropy {entropy:.4f}; {shown}", ratio, wanted, met, 4))
    notes = ["The bits of constriction and torchac are without their model of the codes and without chunks."]
    yield Section(f"Entropy: bits for each of {count:,} codes, everything that the tensor takes", rows, notes)
    yield _speeds(context, coded, peers, few)


def _against(name: str, one: _Coded, rate: float, bits: float, peer: float) -> Row:
    """Return a row of this project's decoder against constriction's, which gives `bits` for each code."""
    met = rate >= _SLOWER * peer and one.bits <= _LARGER * bits
    against = f"constriction {figure(peer, 'M/s')}; size {one.bits / bits:.4f} x"
    return Row(
        f"{name}: decoding", figure(rate, "M/s"), against, rate / peer, f">= {_SLOWER:g} x, size <= {_LARGER:g} x", met
    )


def _speeds(
    context: Context, coded: dict[str, _Coded], peers: dict[str, tuple[float, Callable[[], None]]], few: int
) -> Section:
    yardsticks = Yardsticks(context)
    functions: dict[tuple[str, str] | str, Callable[[], object]] = dict(yardsticks.functions)
    for name, one in coded.items():
        outs = [np.zeros(one.codes.size, kind) for kind in (np.int8, np.float32, np.uint16)]
        for what, run, out in zip(
            ("to int8 codes", "to float32", "to bfloat16"), (one.to_codes, one.to_f32, one.to_bf16), outs, strict=True
        ):
            functions[name, what] = lambda run=run, out=out: run(out)  # type: ignore[misc]
        functions[name, "encode float32"] = one.encoder()
        functions[name, "encode codes"] = one.coder()
        functions[name, "constriction"] = peers[name][1]
    seconds = interleaved({key: processor_seconds(run) for key, run in functions.items()}, context.rounds(9))
    scales = yardsticks.scales({name: seconds[name] for name in yardsticks.functions})
    rows = []
    for target in _TARGETS:
        count = coded[target.name].codes.size
        rates = {
            what: count / seconds[target.name, what] / 1e6
            for name, what in functions.keys() - yardsticks.functions.keys()
            if name == target.name
        }
        peer = few / seconds[target.name, "constriction"] / 1e6
        wanted = {
            "to int8 codes": target.to_codes,
            "to float32": target.to_weights,
            "to bfloat16": target.to_weights,
            "encode codes": _ENCODE,
            "encode float32": _ENCODE,
        }
        rows += [scales.judge(f"{target.name}: {what}", rates[what], limit, "M/s") for what, limit in wanted.items()]
        rows.append(_against(target.name, coded[target.name], rates["to int8 codes"], peers[target.name][0], peer))
    return Section("Entropy: speed, one thread", rows, scales.notes())


def _tq1_0(tensors: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return rel_rmse and bits of llama.cpp's TQ1_0, rows cut or joined to multiples of 256."""
    squares = weights = 0.0
    every = []
    for array in tensors.values():
        flat = array.astype(np.float32).reshape(-1)
        rows = flat[: flat.size // 256 * 256].reshape(-1, 256)
        kind = GGMLQuantizationType.TQ1_0
        error = (rows - quants.dequantize(quants.quantize(rows, kind), kind)).astype(np.float64)
        squares += float(np.sum(error**2))
        weights += rows.size
        every.append(flat)
    return math.sqrt(squares / weights) / float(np.concatenate(every).std(dtype=np.float64)), 54 * 8 / 256


def _quality(context: Context) -> Section:
    gauss = {"x": normal(1 << (20 if context.quick else 22), sd=1.0)}
    real = minilm_matrices()
    rated = [f"{kind},bpw={bpw}" for kind, bpw in (("ternary:scale=tensor", 1.1), *_LEVELS_AT)]
    types = ["ternary", "ternary:scale=tensor", "ternary:scale=group", *(f"levels:n={n}" for n in (5, 7, 15))]
    types += [*rated, "ternary:sparsity=0.9,scale=tensor", "ternary:sparsity=0.9"]
    rows = [_gaussian(text, total) for text, total in totals(gauss, types).items()]
    tq, tq_bits = _tq1_0(real)
    for text, total in totals(real, types).items():
        if text != "ternary":
            rows.append(Row(f"MiniLM, {text}", _error(total)))
            continue
        ratio = total.rel_rmse / tq
        met = ratio <= _TQ1_0_SHARE and total.bpw < tq_bits
        against, wanted = f"TQ1_0 {tq:.4f} at {tq_bits:.4f} bits", f"<= {_TQ1_0_SHARE:g} x, fewer bits"
        rows.append(Row(f"MiniLM, {text}", _error(total), against, ratio, wanted, met, 3))
    notes = [
        "A Gaussian's best levels know nothing of scales; with a scale for each row, the weights vary a little less.",
        "No code of R bits has a rel_rmse below 2^-R on N(0, 1); uniform levels, ideally coded, need 0.255 bits more at many bits.",
    ]
    return Section("Entropy: error of few levels, rel_rmse", rows, notes)


def _error(total: ErrorStats) -> str:
    return f"{total.rel_rmse:.4f} at {total.bpw:.3f} bits"


def _gaussian(text: str, total: ErrorStats) -> Row:
    """Return a row of N(0, 1): against the best levels where nothing but the error counts, else against the bound for any code."""
    codec = parse_type(text)
    assert isinstance(codec, LevelCodec)
    free = codec.bpw == "any" and codec.sparsity == "0"
    best, entropy = _GAUSSIAN[codec.size] if free else (2.0**-total.bpw, total.bpw)
    against = f"{'best levels' if free else 'bound'} {best:.4f} at {entropy:.3f} bits"
    wanted, met = (f"<= {_TERNARY_ERROR}", total.rel_rmse <= _TERNARY_ERROR) if text == "ternary" else ("", None)
    return Row(f"N(0, 1), {text}", _error(total), against, total.rel_rmse / best, wanted, met, 3)


def run(context: Context) -> Iterator[Section]:
    """Measure all of it."""
    yield from _rates(context)
    yield _quality(context)
