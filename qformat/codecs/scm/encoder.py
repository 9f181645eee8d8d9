"""The encoder of `scm`: passes over the whole tensor until every layer fits the bytes it may take (spec/codecs.md, "`scm`")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import numpy as np

from qformat.codecs.base import EncodedChunk, Encoder, Readable, Run, TensorEncoder, draft_record
from qformat.codecs.codebooks import Survey
from qformat.codecs.layout import Chunk
from qformat.codecs.registry import register
from qformat.codecs.scm.codec import Scm
from qformat.codecs.scm.grid import DEEPEST, POSITIONS, Grid
from qformat.codecs.scm.measures import Errors, bits_before
from qformat.codecs.scm.planes import Magnitudes, end_of, write_base, write_sections
from qformat.codecs.scm.rate_control import (
    ChunkStats,
    LayerChunk,
    RateState,
    RateTarget,
    TrialResult,
    rate_control_step,
    start,
)
from qformat.codecs.scm.residual import precision_of, write_residual
from qformat.dtypes import BF16, F16, F32, DType, Elements
from qformat.entropy.streams import StreamWriter
from qformat.kernels import load
from qformat.quality import METRICS

_ANY = "any"
_LEAST_BITS, _MOST_BITS = 1.5, DEEPEST  # a sign alone takes one

#: the encoded layers of a chunk, and its residual if the tensor is lossless
_ChunkLayers = Sequence[LayerChunk]


@register
@dataclass(frozen=True)
class ScmEncoder(Encoder):
    """Significance coding in layers, which can be read at 2, 2.25 … 6, 7, 8 bits per weight, or losslessly.

    Parameters
    ----------
    bpw
        Bits per weight at most (though signs and the first cells may take more); the last layer comes close to it.
    max_rmse, max_abs, mean_abs
        The smallest file whose root mean square, largest or mean absolute error is at most this share of the tensor's range, its
        largest weight less its smallest one.
    lossless
        All layers and the residual, which gives the weights back bit for bit; the default if nothing else is given.
    """

    id: ClassVar[str] = "scm"
    task_chunks: ClassVar[int] = (
        4  # all chunks wait for each other in every pass: small tensors are better encoded side by side
    )

    bpw: str = _ANY
    max_rmse: str = _ANY
    max_abs: str = _ANY
    mean_abs: str = _ANY
    lossless: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("bpw", *METRICS) if getattr(self, name) != _ANY]
        if len(given) + self.lossless > 1:
            raise ValueError(
                f"give one of bpw, {', '.join(METRICS)} and lossless, not {len(given) + self.lossless} of them"
            )
        for name in given:
            value = _number(getattr(self, name))
            if not 0 <= value < math.inf or (name == "bpw" and not _LEAST_BITS <= value <= _MOST_BITS):
                allowed = f"from {_LEAST_BITS} to {_MOST_BITS}" if name == "bpw" else "from 0 on"
                raise ValueError(f"{name} may be a number {allowed}, not {getattr(self, name)!r}")

    @property
    def _target(self) -> RateTarget:
        if self.bpw != _ANY:
            return RateTarget(bits=float(self.bpw))
        for metric in METRICS:
            if getattr(self, metric) != _ANY:
                return RateTarget(metric=metric, bound=float(getattr(self, metric)))
        return RateTarget()

    def accepts(self, dtype: DType) -> bool:
        """Return whether these are binary16, bfloat16 or binary32."""
        return dtype in (F16, BF16, F32)

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether neither bits nor an error bound the file."""
        return self._target == RateTarget()

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return False: NaN and infinity have no magnitude."""
        return False

    def draft(self, tensor: Readable) -> None:
        """Return None: values decide how long the layers are."""

    def prepare(self, tensor: Readable, run: Run) -> TensorEncoder:
        """Choose the grid, then the bits of each layer, then encode all chunks until no layer is too large.

        Estimates decide first, since encoding everything is what takes time: trials measure each chunk at every depth, and rate
        control plans all layers from their sums. Only the entropy coder's own overhead is not foreseen, so a layer may come out
        a few bytes too large: then it is shortened and the chunks are encoded again, of which most layers are kept.
        """
        chunks = list(tensor.matrix.chunks(1))
        state = start(self._target, run(lambda chunk: _chunk_stats(tensor.read_chunk(chunk)), chunks))
        trials: list[TrialResult | None] = [None] * len(chunks)
        settled = False
        while not settled:
            trials = list(run(_Trial(tensor, state), zip(chunks, trials, strict=True)))
            state, settled = rate_control_step(self._target, state, trials)
        finite = [trial for trial in trials if trial is not None]
        if len(finite) < len(trials):
            record = draft_record(tensor, Scm(1))
            return TensorEncoder(Scm(1), record, lambda _: EncodedChunk((), finite=False))
        while True:
            encoded = list(run(_Encode(tensor, state), zip(chunks, finite, strict=True)))
            shorter = self._shortened(encoded, state)
            if shorter is None:
                return self._tensor_encoder(tensor, chunks, encoded, state)
            state = shorter

    def _sizes(self, encoded: Sequence[_ChunkLayers], state: RateState) -> list[int]:
        """Return the bytes of the tensor up to each layer, with the table of lengths that each layer begins with."""
        sizes = [sum(4 + len(layers[number][0]) for layers in encoded) for number in range(len(state.layers))]
        return list(accumulate(sizes, initial=Grid.SIZE if encoded else 0))[1:]

    def _shortened(self, encoded: Sequence[_ChunkLayers], state: RateState) -> RateState | None:
        """Return the state with the first layer that is too large made shorter, or None if all fit."""
        begin = 0
        for number, ((end, room), nbytes) in enumerate(zip(state.layers, self._sizes(encoded, state), strict=True)):
            if room is not None and nbytes > room and end > begin:
                return state.with_shorter(number, nbytes - room)
            if number and not self._target.fits(nbytes, state.elements):
                return None
            begin = end
        return None

    def _tensor_encoder(
        self, tensor: Readable, chunks: Sequence[Chunk], encoded: Sequence[_ChunkLayers], state: RateState
    ) -> TensorEncoder:
        """Return the encoder that hands out what is encoded, without the layers that do not fit."""
        sizes, count = self._sizes(encoded, state), 1
        while count < len(sizes) and self._target.fits(sizes[count], state.elements):
            count += 1
        numbers = [*range(count), *([len(state.layers)] if state.lossless else [])]
        errors = {f"layer.{number + 1}": state.error_at(state.layers[number].end) for number in range(count)}
        by_chunk, grid = dict(zip(chunks, encoded, strict=True)), state.grid.pack()

        def encode(chunk: Chunk) -> EncodedChunk:
            kept = [by_chunk[chunk][number] for number in numbers]
            entropy = sum(entropy for _, entropy in kept)
            return EncodedChunk((grid, *(part for part, _ in kept)), finite=True, entropy=entropy)

        codec = Scm(count, state.lossless)
        error = None if state.lossless else replace(errors[f"layer.{count}"], mean=None)
        record = draft_record(tensor, codec, layer_errors=errors, spread=state.range)
        return TensorEncoder(codec, record, encode, error)


@dataclass(frozen=True)
class _Trial:
    """Measures a chunk: its base at the grid's step; or at every depth, once the step is settled."""

    tensor: Readable
    state: RateState

    def __call__(self, work: tuple[Chunk, TrialResult | None]) -> TrialResult | None:
        """Return the result, or None if the chunk is not finite."""
        (chunk, last), state = work, self.state
        elements = self.tensor.read_chunk(chunk)
        if not elements.all_finite():
            return None
        if last is None or not state.settled:
            magnitudes, writer = _magnitudes(elements, state.grid, 0), StreamWriter()
            write_base(writer, magnitudes)
            return TrialResult(magnitudes.size, writer)
        magnitudes = _magnitudes(elements, state.grid, state.deepest)
        errors = Errors.of(magnitudes.values, magnitudes.numbers, magnitudes.size, state.deepest, state.grid)
        before = bits_before(magnitudes.numbers, magnitudes.size, state.deepest)
        return replace(last, before=before, errors=replace(errors, count=elements.data.size))


@dataclass(frozen=True)
class _Encode:
    """Encodes a chunk: each layer, and the residual if the tensor is lossless."""

    tensor: Readable
    state: RateState

    def __call__(self, work: tuple[Chunk, TrialResult]) -> _ChunkLayers:
        """Return the encoded layers."""
        (chunk, trial), state = work, self.state
        elements = self.tensor.read_chunk(chunk)
        magnitudes = _magnitudes(elements, state.grid, state.deepest)
        encoded: dict[tuple[int, int, int], LayerChunk] = {}
        begin = 0
        for number, (end, _) in enumerate(state.layers):
            where = number, begin, end
            encoded[where] = trial.encoded.get(where) or _layer(elements, magnitudes, state.deepest, where, trial)
            begin = end
        if state.lossless:
            where = len(state.layers), begin, POSITIONS
            encoded[where] = trial.encoded.get(where) or _residual(elements, magnitudes, begin, state)
        trial.encoded = encoded  # if a layer is shortened, those before and most after it stay the same
        return list(encoded.values())


def _chunk_stats(elements: Elements) -> ChunkStats:
    values, counted = np.ascontiguousarray(elements.to_f32()).reshape(-1), Survey.empty()
    load("lut").survey(values, counted.counts, counted.sums)
    return ChunkStats(counted, float(values.min()), float(values.max()), values.size, precision_of(elements))


def _magnitudes(elements: Elements, grid: Grid, depth: int) -> Magnitudes:
    return Magnitudes.of(np.ascontiguousarray(elements.to_f32()).reshape(-1), grid, depth)


def _layer(
    elements: Elements, magnitudes: Magnitudes, deepest: int, where: tuple[int, int, int], trial: TrialResult
) -> LayerChunk:
    """Encode one layer of a chunk: `where` is its number and the positions at which it begins and ends."""
    number, begin, end = where
    writer = StreamWriter()
    writer.add(end_of(end))
    if not number:
        writer.extend(trial.base)
    if trial.before is not None:
        write_sections(writer, magnitudes, deepest, begin, end, trial.before)
    return writer.chunk(0 if number else elements.data.size), writer.entropy


def _residual(elements: Elements, magnitudes: Magnitudes, end: int, state: RateState) -> LayerChunk:
    """Encode what the layers leave of a chunk; magnitudes are only those of the last layer afterwards."""
    load("planes").shallow(magnitudes.numbers, end, state.deepest)
    writer = StreamWriter()
    write_residual(writer, elements, magnitudes, end, state.grid)
    return writer.chunk(0), writer.entropy


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
