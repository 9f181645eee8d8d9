"""Significance coding in layers: read at any number of bits, up to losslessly (spec/codecs.md, "`scm`")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Buffer, EncodedChunk, Matrix, found, request
from qformat.codecs.codebooks import Survey
from qformat.codecs.layered import Assembled, Content, LayeredCodec, with_lengths
from qformat.codecs.registry import register
from qformat.codecs.scm.grid import DEEPEST, POSITIONS, Grid
from qformat.codecs.scm.measures import Errors, bits_before
from qformat.codecs.scm.planes import Decoder, Magnitudes, end_of, write_base, write_sections
from qformat.codecs.scm.rate_control import Fitted, LayerChunk, Seen, Tried, Wanted, decide, fit
from qformat.codecs.scm.residual import precision_of, read_residual, write_residual
from qformat.dtypes import BF16, F16, F32, DType, Elements
from qformat.entropy.streams import StreamWriter
from qformat.kernels import load
from qformat.quality import METRICS
from qformat.records import Params

_MOST_LAYERS = 64
_ANY = "any"
_LEAST_BITS, _MOST_BITS = 1.5, DEEPEST  # a sign alone takes one


@register
@dataclass(frozen=True)
class Scm(LayeredCodec):
    """Significance coding in layers, which can be read at 2, 2.25 … 6, 7, 8 bits for each weight, or losslessly.

    Parameters
    ----------
    bpw
        Bits for each weight at most (but signs and the first cells may take more); the last layer has about as many.
    max_rmse, max_abs, mean_abs
        The smallest file whose root mean square, largest or mean absolute error is at most so much of the tensor's range, its
        largest weight less its smallest one.
    lossless
        All layers, and the one that gives the weights back bit for bit; so it is if nothing else is asked for.
    layers
        How many layers a file has.
    """

    id: ClassVar[str] = "scm"
    decoded: ClassVar[DType] = F32  # the dtype of the source if it is lossless

    bpw: str = request(_ANY)
    max_rmse: str = request(_ANY)
    max_abs: str = request(_ANY)
    mean_abs: str = request(_ANY)
    lossless: bool = False
    layers: int = found(0)

    def __post_init__(self) -> None:
        if not 0 <= self.layers <= _MOST_LAYERS:
            raise ValueError(f"layers may be a number from 1 to {_MOST_LAYERS}, not {self.layers}")
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
    def _wanted(self) -> Wanted:
        if self.bpw != _ANY:
            return Wanted(bits=float(self.bpw))
        for metric in METRICS:
            if getattr(self, metric) != _ANY:
                return Wanted(metric=metric, bound=float(getattr(self, metric)))
        return Wanted()

    def decoded_from(self, dtype: DType) -> DType:
        """Return the dtype of the source if it comes back, else binary32."""
        return dtype if self.lossless else F32

    def accepts(self, dtype: DType) -> bool:
        """Return whether these are binary16, bfloat16 or binary32."""
        return dtype in (F16, BF16, F32)

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether there is everything."""
        del dtype
        return self.lossless or (not self.layers and self._wanted == Wanted())

    def accepts_nonfinite(self, dtype: DType) -> bool:
        """Return False: they have no magnitude."""
        del dtype
        return False

    def segments(self, matrix: Matrix) -> tuple[tuple[str, int | None], ...]:
        """Return the name of each segment, and the length of the first one."""
        layers: list[tuple[str, int | None]] = [(f"layer.{number}", None) for number in range(1, self.layers + 1)]
        grid = Grid.SIZE if matrix.elements else 0
        return (("grid", grid), *layers, *([("rest", None)] if self.lossless else []))

    def survey(self, elements: Elements) -> Seen:
        """Count the weights of a chunk."""
        values, counted = np.ascontiguousarray(elements.to_f32()).reshape(-1), Survey.empty()
        load("lut").survey(values, counted.counts, counted.sums)
        return Seen(counted, float(values.min()), float(values.max()), values.size, precision_of(elements))

    def fitted_to(self, surveys: Iterable[Seen]) -> Fitted:
        """Choose the grid."""
        return fit(self._wanted, surveys)

    def trial(self, elements: Elements, fitted: Fitted, tried: Tried | None) -> Tried | None:
        """Encode the base of a chunk; or measure it at every depth, once the step is settled."""
        if not elements.all_finite():
            return None
        if tried is None or not fitted.settled:
            chunk, writer = _magnitudes(elements, fitted.grid, 0), StreamWriter()
            write_base(writer, chunk)
            return Tried(chunk.size, writer)
        chunk = _magnitudes(elements, fitted.grid, fitted.deepest)
        errors = Errors.of(chunk.values, chunk.numbers, chunk.size, fitted.deepest, fitted.grid)
        before = bits_before(chunk.numbers, chunk.size, fitted.deepest)
        return replace(tried, before=before, errors=replace(errors, count=elements.data.size))

    def decided(self, fitted: Fitted, trials: Sequence[Tried | None]) -> tuple[Fitted, bool]:
        """Choose what each layer holds."""
        return decide(self._wanted, fitted, trials)

    def encode(self, elements: Elements, fitted: Fitted | None = None, tried: Tried | None = None) -> EncodedChunk:
        """Encode a chunk: a chunk for each layer, and one for what is left if all of it is wanted."""
        assert fitted is not None
        if tried is None:
            return EncodedChunk((), finite=False)
        magnitudes = _magnitudes(elements, fitted.grid, fitted.deepest)
        chunks: dict[tuple[int, int, int], LayerChunk] = {}
        start = 0
        for number, (end, _) in enumerate(fitted.layers):
            where = number, start, end
            chunks[where] = tried.chunks.get(where) or _layer(elements, magnitudes, fitted.deepest, where, tried)
            start = end
        if fitted.lossless:
            where = len(fitted.layers), start, POSITIONS
            chunks[where] = tried.chunks.get(where) or _rest(elements, magnitudes, start, fitted)
        tried.chunks = chunks  # if a layer is too large, most of them will be the same the next time
        parts = tuple(part for part, _ in chunks.values())
        return EncodedChunk(parts, finite=True, entropies=tuple(entropy for _, entropy in chunks.values()))

    def assembled(self, encoded: Sequence[EncodedChunk], fitted: Fitted) -> tuple[Assembled | None, Fitted]:
        """Return the tensor from what became of its chunks; or what to encode them with again, if a layer takes too much."""
        wanted, count, nbytes, start = self._wanted, 0, Grid.SIZE if encoded else 0, 0
        for number, (end, room) in enumerate(fitted.layers):
            nbytes += sum(4 + len(chunk.parts[number]) for chunk in encoded)
            if room is not None and nbytes > room and end > start:
                return None, fitted.with_shorter(number, nbytes - room)
            if number and not wanted.fits(nbytes, fitted.elements):
                break
            count, start = number + 1, end
        numbers = [*range(count), *([len(fitted.layers)] if fitted.lossless else [])]
        contents = [with_lengths([chunk.parts[number] for chunk in encoded]) for number in numbers]
        errors = [fitted.error_at(layer.end) for layer in fitted.layers[:count]]
        segments = [Content("grid", fitted.grid.pack() if encoded else b"")]
        segments += [Content(f"layer.{number + 1}", contents[number], errors[number]) for number in range(count)]
        if fitted.lossless:
            segments.append(Content("rest", contents[-1]))
        params: Params = {"layers": count, "lossless": fitted.lossless}
        entropy = sum(chunk.entropies[number] for chunk in encoded for number in numbers)
        error = None if fitted.lossless else replace(errors[-1], mean=None)
        return Assembled(params, tuple(segments), error, fitted.range, entropy), fitted

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode a chunk: the grid, its chunks of layers, and what was left if all of it is wanted."""
        grid = Grid.parse(bytes(parts[0]))
        decoder = Decoder.of(parts[1 : self.layers + 1], out.size)
        if not self.lossless:
            decoder.values(grid, out.reshape(-1))
            return
        dtype = {"float16": F16, "uint16": BF16, "float32": F32}[out.dtype.name]
        read_residual(parts[-1], decoder, grid, dtype, out)


def _magnitudes(elements: Elements, grid: Grid, depth: int) -> Magnitudes:
    return Magnitudes.of(np.ascontiguousarray(elements.to_f32()).reshape(-1), grid, depth)


def _layer(
    elements: Elements, magnitudes: Magnitudes, deepest: int, where: tuple[int, int, int], tried: Tried
) -> LayerChunk:
    """Return the chunk of a layer: its number, and where it begins and ends."""
    number, start, end = where
    writer = StreamWriter()
    writer.add(end_of(end))
    if not number:
        writer.extend(tried.base)
    if tried.before is not None:
        write_sections(writer, magnitudes, deepest, start, end, tried.before)
    return writer.chunk(0 if number else elements.data.size), writer.entropy


def _rest(elements: Elements, magnitudes: Magnitudes, end: int, fitted: Fitted) -> LayerChunk:
    """Return the chunk of what layers leave; magnitudes are only those of the last layer afterwards."""
    load("planes").shallow(magnitudes.numbers, end, fitted.deepest)
    writer = StreamWriter()
    write_residual(writer, elements, magnitudes, end, fitted.grid)
    return writer.chunk(0), writer.entropy


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
