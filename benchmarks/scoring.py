"""Quantize models in memory, part by part on all processors, decode them and measure the error."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType, quants

from benchmarks.encoding import ChunkEncoder, Prepared, default_jobs, on_threads
from benchmarks.ggml import BLOCKS, Library
from benchmarks.models import Model, Score

#: takes float32 rows, returns the weights that come back
RoundTrip = Callable[[np.ndarray], np.ndarray]


def _squares(rows: np.ndarray, decoded: np.ndarray) -> float:
    """Return the sum of squared errors, in float64."""
    error = rows.astype(np.float64)
    error -= decoded
    return float(np.vdot(error, error))


def score_codec(codec: ChunkEncoder, model: Model, expected: str = "") -> Score:
    """Score one of qformat's codecs, through the steps that `convert` takes.

    Parameters
    ----------
    codec
        The codec.
    model
        What to quantize.
    expected
        The GGUF type for which gguf's numpy code should give the same blocks and decoded weights; empty if there is none.
    """

    def measure(prepared: list[Prepared], number: int) -> tuple[float, bool, dict[str, np.ndarray]]:
        part = model.part(number)
        encoded = prepared[part.tensor].encode(part.chunk)
        assert encoded.finite
        assert not encoded.overflowed
        decoded = np.empty(part.rows.shape, np.float32)
        codec.decode(encoded.parts, decoded)
        same = not expected or _as_gguf(expected, part.rows, b"".join(map(bytes, encoded.parts)), decoded)
        return _squares(part.rows, decoded), same, codec.histograms(encoded.parts, part.chunk)

    with ThreadPoolExecutor(default_jobs()) as pool:
        prepared = [Prepared(codec, array, on_threads(pool)) for _, array in model.tensors]
        results = list(pool.map(partial(measure, prepared), range(len(model.cuts))))
    squares, same, histograms = zip(*results, strict=True)
    names = {name for found in histograms for name in found}
    choices = {name: sum(found[name] for found in histograms) for name in names}
    nbytes = sum(codec.nbytes(array.shape) for _, array in model.tensors)
    return Score(np.array(squares), nbytes * 8 / model.weights, np.array(same if expected else (), bool), choices)


def score_peer(
    round_trip: RoundTrip, model: Model, bits: float, *, multiple: int = 32, every: int = 1, fill: bool = True
) -> Score:
    """Score another quantizer.

    Parameters
    ----------
    round_trip
        Quantizes and decodes.
    model
        What to quantize.
    bits
        Bits for each weight, nominally.
    multiple
        Length of rows, or a divisor of it.
    every
        Measure every n-th part only (for slow quantizers).
    fill
        Pad other rows with zeros; if not, they are left out.
    """

    def measure(number: int) -> float:
        part = model.part(number)
        missing = -part.chunk.cols % multiple
        decoded = round_trip(np.pad(part.rows, ((0, 0), (0, missing))) if missing else part.rows)
        return _squares(part.rows, decoded[:, : part.chunk.cols])

    whole = model.columns % multiple == 0
    chosen = np.flatnonzero(whole | fill)[::every]
    squares = np.full(len(model.cuts), np.nan)
    with ThreadPoolExecutor(default_jobs()) as pool:
        squares[chosen] = list(pool.map(measure, chosen))
    return Score(squares, bits)


def gguf_bits(kind: str) -> float:
    """Return the bits for each weight of one of GGUF's types."""
    nbytes, elements = BLOCKS[kind]
    return 8 * nbytes / elements


def _as_gguf(kind: str, rows: np.ndarray, blocks: bytes, decoded: np.ndarray) -> bool:
    """Return whether gguf's numpy code gives the same blocks and the same weights."""
    type_ = GGMLQuantizationType[kind.upper()]
    missing = -rows.shape[1] % 32
    fill = "edge" if kind.endswith("_1") else "constant"  # as qformat pads rows
    expected = quants.quantize(np.pad(rows, ((0, 0), (0, missing)), fill) if missing else rows, type_)
    weights = quants.dequantize(expected, type_)[:, : rows.shape[1]]
    return expected.tobytes() == blocks and weights.tobytes() == decoded.tobytes()


def gguf_round_trip(kind: str) -> RoundTrip:
    """Return gguf's numpy code for one of its types."""
    type_ = GGMLQuantizationType[kind.upper()]
    return lambda rows: quants.dequantize(quants.quantize(rows, type_), type_).reshape(rows.shape)


def ggml_round_trip(library: Library, kind: str) -> RoundTrip:
    """Return ggml's C code for one of its types."""

    def round_trip(rows: np.ndarray) -> np.ndarray:
        decoded = np.empty_like(rows)
        library.dequantize(kind, library.quantize(kind, rows), decoded)
        return decoded

    return round_trip


def amax_7(rows: np.ndarray, scale: type[np.floating] = np.float32) -> np.ndarray:
    """Quantize as llama.cpp did when its pull request 835 searched for better scales: the largest magnitude becomes 7.

    The scale was a float32 then; with float16 it has the size of today's blocks.
    """
    blocks = rows.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    with np.errstate(divide="ignore"):
        inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
    codes = blocks * inverse
    codes = np.copysign(np.floor(np.abs(codes) + np.float32(0.5)), codes)  # halves away from zero, as roundf
    return (codes * d.astype(scale).astype(np.float32)).reshape(rows.shape)
