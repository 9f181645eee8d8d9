"""From source tensors to a container file: cut, encode on threads, write in order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from qformat.codecs.base import Chunk, Codec, EncodedChunk, ErrorSum, Matrix, chunk_count, chunks
from qformat.codecs.blocks import BlockCodec, coded
from qformat.codecs.layered import Assembled, LayeredCodec
from qformat.codecs.registry import parse_type
from qformat.container.index import check_shape, check_tensor_name
from qformat.container.writer import ContainerWriter
from qformat.dtypes import Elements
from qformat.errors import FormatError, MissingDecoderError, SourceError
from qformat.parallel import default_jobs, prefetch
from qformat.pipeline.recipe import Recipe, override_for
from qformat.pipeline.source import QuantizedSource, SourceTensor, StoredSource
from qformat.records import MeasuredError, Segment, TensorRecord

#: called with the number of elements that were just written
Progress = Callable[[int], None]
#: calls a function with each of some chunks (or what else it takes), like `map`
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
_FEW_CHUNKS = 4


@dataclass(frozen=True)
class Plan:
    """A tensor and what shall become of it."""

    source: SourceTensor
    codec: Codec
    note: str = ""  # what the user should know of the choice
    fitted: Any = None  # what the codec has learnt of the whole tensor

    @property
    def matrix(self) -> Matrix:
        """The tensor seen as rows."""
        return Matrix.of(self.source.shape)

    @cached_property
    def stored(self) -> StoredSource | None:
        """The source, if all of its bytes are taken as they are."""
        source = self.source
        return source if isinstance(source, StoredSource) and source.codec is self.codec else None

    @property
    def sized(self) -> bool:
        """Whether its size does not depend on values."""
        return self.stored is not None or self.codec.sized

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensor in the checkpoint."""
        if isinstance(self.source, StoredSource):
            return self.source.record.nbytes
        if isinstance(self.source, QuantizedSource):
            return self.source.codec.nbytes(self.source.shape)
        return self.matrix.elements * self.source.dtype.size

    @cached_property
    def copied(self) -> QuantizedSource | StoredSource | None:
        """The source, if its codes are taken as they are, or entropy-coded."""
        source = self.source
        if not isinstance(source, (QuantizedSource, StoredSource)):
            return None
        return source if self.codec in (source.codec, coded(source.codec)) else None

    def read(self, chunk: Chunk) -> Elements:
        """Return the source's elements of a chunk, two-dimensional."""
        elements = self.source.read(chunk.elements(self.matrix))
        return replace(elements, data=elements.data.reshape(chunk.rows, chunk.cols))

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks in order."""
        return chunks(self.matrix, self.codec.chunk_alignment(self.matrix))

    @property
    def record(self) -> TensorRecord:
        """The tensor's record, without offsets, digests and measured values; of one that is taken as it is, the one that it has."""
        if self.stored:
            return self.stored.record
        lossless = self.codec.is_lossless(self.source.dtype)
        return TensorRecord(
            name=self.source.name,
            shape=tuple(self.source.shape),
            dtype=self.source.dtype.name,
            codec=self.codec.id,
            params=self.codec.params(),
            encoder={} if self.copied else self.codec.encoder(),
            segments=tuple(
                Segment(name, 0, length or 0, "0" * 64) for name, length in self.codec.segments(self.matrix)
            ),
            error=None if lossless else MeasuredError(0.0, 0.0),
        )


def make_plans(tensors: Iterable[SourceTensor], recipe: Recipe, *, allow_nonfinite: bool = False) -> list[Plan]:
    """Choose a codec for each tensor.

    Parameters
    ----------
    tensors
        The tensors, in any order.
    recipe
        What to choose.
    allow_nonfinite
        Read every tensor, and keep one that holds NaN or infinity raw.

    Returns
    -------
    list of Plan
        Sorted by name, the order in which tensors stand in a file.

    Raises
    ------
    SourceError
        If two tensors have the same name, or a tensor cannot be stored as asked.
    TypeSpecError
        If an override of the recipe matches nothing.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    recipe.check_patterns(ordered)
    plans: list[Plan] = []
    for tensor in ordered:
        if plans and plans[-1].source.name == tensor.name:
            raise SourceError(f"tensor {tensor.name!r} is there twice")
        try:
            check_tensor_name(tensor.name)
            check_shape(tensor.shape, f"tensor {tensor.name!r}")
        except FormatError as error:
            raise SourceError(error.cause) from None
        plan = Plan(tensor, recipe.codec_for(tensor))
        if (
            allow_nonfinite
            and not plan.stored
            and not plan.codec.accepts_nonfinite(tensor.dtype)
            and not _all_finite(plan)
        ):
            raw = parse_type(tensor.dtype.name)
            plan = Plan(
                tensor, raw, f"tensor {tensor.name!r} holds NaN or infinity and is kept as {raw}, not {plan.codec}"
            )
        plans.append(plan)
    return plans


def _all_finite(plan: Plan) -> bool:
    return all(plan.read(chunk).all_finite() for chunk in chunks(plan.matrix, 1))


def encode_chunk(plan: Plan, chunk: Chunk) -> EncodedChunk:
    """Read one chunk and encode it, or take the codes that it has."""
    if plan.copied:
        return _copied(plan.copied, plan.codec, chunk)
    elements = plan.read(chunk)
    try:
        return plan.codec.encode(elements, plan.fitted)
    except ValueError as error:
        raise SourceError(f"tensor {plan.source.name!r}: {error}") from None


def _copied(source: QuantizedSource | StoredSource, codec: Codec, chunk: Chunk) -> EncodedChunk:
    """Return the codes of a chunk, which decode to what the source says that it holds."""
    parts = source.encoded(chunk)
    decoded = np.empty((chunk.rows, chunk.cols), source.dtype.storage)
    try:
        source.codec.decode(parts, decoded)
        finite = Elements(source.dtype, decoded).all_finite()
    except MissingDecoderError:
        finite = True  # nothing here can tell
    except ValueError as error:
        raise SourceError(f"tensor {source.name!r}: {error}") from None
    encoded = EncodedChunk(parts, finite, ErrorSum(decoded.size, 0.0, 0.0))
    return codec.packed(encoded, decoded.size) if isinstance(codec, BlockCodec) and codec != source.codec else encoded


def fit(plan: Plan, run: Run) -> Plan:
    """Let the codec look at the whole tensor first, if it wants to; `run` is how to go through its chunks."""
    if not plan.codec.fits:
        return plan
    try:
        return replace(plan, fitted=plan.codec.fitted_to(run(partial(_survey, plan), plan.chunks())))
    except ValueError as error:
        raise SourceError(_refusal(plan, error)) from None


def _refusal(plan: Plan, error: ValueError) -> str:
    return f"tensor {plan.source.name!r}: {error}; keep it with {_keep(plan)}"


def on_pool(pool: Executor, window: int) -> Run:
    """Return what calls a function with each of some chunks on the threads of a pool, and yields the results in order."""

    def run(function: Callable[[Any], Any], every: Iterable[Any]) -> Iterator[Any]:
        for future in prefetch(pool, (partial(function, each) for each in every), window):
            yield future.result()

    return run


def _survey(plan: Plan, chunk: Chunk) -> Any:
    return plan.codec.survey(plan.read(chunk))


def write_tensors(
    writer: ContainerWriter,
    plans: Sequence[Plan],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    allow_zeroed: bool = False,
) -> None:
    """Encode tensors and write them.

    The bytes do not depend on `jobs`. Memory is bounded by a few chunks for each job, and by a layered tensor.

    Parameters
    ----------
    writer
        The file.
    plans
        Sorted by name; those that the file begins with already are left out.
    jobs
        Threads that read and encode; the calling thread hashes and writes. None is one for each processor.
    progress
        Told of each chunk that was written.
    allow_nonfinite
        Accept NaN and infinity in tensors that are stored bit for bit.
    allow_zeroed
        Accept blocks whose scale is too small for its format, so that their weights become zero.

    Raises
    ------
    SourceError
        If a tensor cannot be stored as asked; it names the tensor.
    TargetError
        If writing fails.
    """
    jobs = jobs or default_jobs()
    done = len(writer.records)
    if progress and done:
        progress(sum(plan.matrix.elements for plan in plans[:done]))
    plans = plans[done:]
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="qformat-encode")
    accept = partial(_check, allow_nonfinite=allow_nonfinite, allow_zeroed=allow_zeroed)
    try:
        window = 3 * jobs + 1
        run = on_pool(pool, window)
        waiting = prefetch(pool, _tasks(plans, run), window)
        for plan in plans:
            if plan.stored:
                _write_stored(writer, plan.stored, progress)
                continue
            if not plan.codec.layered:
                _write_chunks(writer, plan, waiting, accept, progress)
                continue
            assembled = assemble(plan, run) if _is_large(plan) else next(waiting).result()
            _write_layers(writer, plan, assembled, progress)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunks(
    writer: ContainerWriter,
    plan: Plan,
    waiting: Iterator[Future[Any]],
    accept: Callable[[Plan, EncodedChunk], None],
    progress: Progress | None,
) -> None:
    chunked = plan.codec.chunked
    tensor = writer.tensor(plan.record, open_ended=chunked)
    errors: list[ErrorSum] = []
    written = [0] * len(plan.codec.layout(plan.matrix))
    for chunk in plan.chunks():
        encoded: EncodedChunk = next(waiting).result()
        accept(plan, encoded)
        stream, parts = (encoded.parts[:1], encoded.parts[1:]) if chunked else ((), encoded.parts)
        spans = plan.codec.spans(plan.matrix, chunk)
        # a part that all chunks share was written with the first
        fresh = [span.stop > end for span, end in zip(spans, written, strict=True)]
        own = [part if new else b"" for part, new in zip(parts, fresh, strict=True)]
        tensor.write([*stream, *(struct.pack("<I", len(part)) for part in stream), *own])
        written = [span.stop for span in spans]
        if encoded.error is not None:
            errors.append(encoded.error)
        if progress:
            progress(chunk.rows * chunk.cols)
    error = None if plan.codec.is_lossless(plan.source.dtype) else ErrorSum.total(errors)
    writer.finish(tensor.finish(error))


def _write_stored(writer: ContainerWriter, source: StoredSource, progress: Progress | None) -> None:
    writer.copy(source.record, source.segments())
    if progress:
        progress(source.record.elements)


def _write_layers(writer: ContainerWriter, plan: Plan, assembled: Assembled, progress: Progress | None) -> None:
    segments = tuple(
        Segment(content.name, 0, len(content.data), "0" * 64, content.error) for content in assembled.segments
    )
    record = replace(plan.record, params=assembled.params, segments=segments, range=assembled.range)
    tensor = writer.tensor(record)
    tensor.write([content.data for content in assembled.segments])
    writer.finish(tensor.finish(assembled.error))
    if progress:
        progress(plan.matrix.elements)


def _is_large(plan: Plan) -> bool:
    """Return whether a tensor whose chunks are all encoded before one is written keeps all threads busy by itself."""
    return chunk_count(plan.matrix, 1) > _FEW_CHUNKS


def _tasks(plans: Sequence[Plan], run: Run) -> Iterator[Callable[[], Any]]:
    for plan in plans:
        if plan.stored:
            continue
        if plan.codec.layered:
            if not _is_large(plan):
                yield partial(assemble, plan, map)
            continue
        fitted = fit(plan, run)
        for chunk in plan.chunks():
            yield partial(encode_chunk, fitted, chunk)


def assemble(plan: Plan, run: Run) -> Assembled:
    """Encode a layered tensor.

    Parameters
    ----------
    plan
        The tensor.
    run
        How to go through its chunks: `map`, or on threads.

    Raises
    ------
    SourceError
        If it cannot be stored as asked.
    """
    codec = plan.codec
    assert isinstance(codec, LayeredCodec)
    plan = fit(plan, run)
    every = list(plan.chunks())
    trials: list[Any] = [None] * len(every)
    enough = False
    while not enough:
        trials = list(run(partial(_tried, plan), zip(every, trials, strict=True)))
        try:
            fitted, enough = codec.decided(plan.fitted, trials)
        except ValueError as error:
            raise SourceError(_refusal(plan, error)) from None
        plan = replace(plan, fitted=fitted)
    assembled = None
    while assembled is None:
        encoded = []
        for chunk in run(partial(_encoded, plan), zip(every, trials, strict=True)):
            _check(plan, chunk, allow_nonfinite=False, allow_zeroed=False)
            encoded.append(chunk)
        assembled, fitted = codec.assembled(encoded, plan.fitted)
        plan = replace(plan, fitted=fitted)
    return assembled


def _tried(plan: Plan, before: tuple[Chunk, Any]) -> Any:
    codec, (chunk, tried) = plan.codec, before
    assert isinstance(codec, LayeredCodec)
    return codec.trial(plan.read(chunk), plan.fitted, tried)


def _encoded(plan: Plan, before: tuple[Chunk, Any]) -> EncodedChunk:
    codec, (chunk, tried) = plan.codec, before
    assert isinstance(codec, LayeredCodec)
    return codec.encode(plan.read(chunk), plan.fitted, tried)


def _check(plan: Plan, encoded: EncodedChunk, *, allow_nonfinite: bool, allow_zeroed: bool) -> None:
    name = plan.source.name
    if not encoded.finite and not (allow_nonfinite and plan.codec.accepts_nonfinite(plan.source.dtype)):
        raise SourceError(
            f"tensor {name!r} holds NaN or infinity; mend the checkpoint, or keep such tensors raw with --allow-nonfinite"
        )
    if encoded.overflowed:
        raise SourceError(f"tensor {name!r} holds values too large for type {plan.codec}; keep it with {_keep(plan)}")
    if encoded.zeroed and not allow_zeroed:
        raise SourceError(
            f"tensor {name!r} holds parts whose weights are too small for type {plan.codec} and would become zero; "
            f"keep it with {_keep(plan)}, or accept zeros with --allow-zeroed"
        )


def _keep(plan: Plan) -> str:
    return override_for(plan.source.name, plan.source.dtype.name)
