"""From source tensors to a container file: plan, encode on threads, write in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from qformat.codecs.base import EncodedChunk, Encoder, ErrorSum, Run, TensorEncoder
from qformat.codecs.layout import Array, Buffer, Chunk, Matrix, join_chunks
from qformat.codecs.raw import raw
from qformat.container.index import check_shape, check_tensor_name
from qformat.container.writer import ContainerWriter
from qformat.errors import FormatError, SourceError
from qformat.parallel import default_jobs, prefetch
from qformat.pipeline.numbers import unlike_weights
from qformat.pipeline.recipe import Recipe, override_for
from qformat.pipeline.source import CodeCopy, SourceTensor
from qformat.records import TensorRecord

#: callback; receives the number of weights that were just processed
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """A source tensor and the encoder chosen for it.

    Attributes
    ----------
    source
        The tensor.
    encoder
        Makes its bytes in the file.
    note
        A sentence about an unexpected choice.
    kept_because
        Why it stays as it is though a type is given for all tensors, as a clause about it; empty if it does not.
    """

    source: SourceTensor
    encoder: Encoder
    note: str = ""
    kept_because: str = ""

    @property
    def matrix(self) -> Matrix:
        """The tensor seen as rows."""
        return self.source.matrix

    @property
    def draft(self) -> TensorRecord | None:
        """The tensor's record with the lengths of its segments, before anything is read; None if values decide them."""
        return self.encoder.draft(self.source)

    def keep(self) -> str:
        """Return the option that keeps the tensor as it is."""
        return override_for(self.source.name, self.source.dtype.name)


def make_plans(tensors: Iterable[SourceTensor], recipe: Recipe, *, allow_nonfinite: bool = False) -> list[Plan]:
    """Choose an encoder for each tensor.

    Parameters
    ----------
    tensors
        The tensors, in any order.
    recipe
        The types to choose from.
    allow_nonfinite
        Read every tensor, and keep one that holds NaN or infinity raw.

    Returns
    -------
    list of Plan
        Sorted by name, the order in which tensors stand in a file.

    Raises
    ------
    SourceError
        If two tensors have the same name, or a tensor cannot be stored as the recipe says.
    TypeSpecError
        If an override of the recipe matches nothing.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    recipe.check_patterns(ordered)
    plans: list[Plan] = []
    for tensor in ordered:
        if plans and plans[-1].source.name == tensor.name:
            raise SourceError(f"duplicate tensor name {tensor.name!r}")
        try:
            check_tensor_name(tensor.name)
            check_shape(tensor.shape, f"tensor {tensor.name!r}")
        except FormatError as error:
            raise SourceError(error.cause) from None
        encoder, note, because = recipe.encoder_for(tensor), "", ""
        if recipe.spares(tensor):
            because = unlike_weights(tensor, encoder)
            encoder = tensor.copies()[0][1] if because else encoder
        if allow_nonfinite and not encoder.accepts_nonfinite(tensor.dtype) and not _all_finite(tensor):
            kept = tensor.copies()[0][1]
            if not kept.accepts_nonfinite(tensor.dtype):
                kept = raw(tensor.dtype)
            note = f"tensor {tensor.name!r} holds NaN or infinity and is kept as {kept}, not {encoder}"
            encoder = kept
        plans.append(Plan(tensor, encoder, note, because))
    return plans


def _all_finite(tensor: SourceTensor) -> bool:
    return all(tensor.read_chunk(chunk).all_finite() for chunk in tensor.matrix.chunks(1))


def on_pool(pool: Executor, window: int) -> Run:
    """Return a `map` on the threads of a pool, with at most `window` calls under way ahead of the caller."""

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for future in prefetch(pool, (partial(function, item) for item in items), window):
            yield future.result()

    return run


def write_tensors(
    writer: ContainerWriter,
    plans: Sequence[Plan],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    allow_zeroed: bool = False,
) -> list[str]:
    """Encode tensors and write them.

    The bytes do not depend on `jobs`. Memory is bounded by a few chunks for each job, and by two tensors with layers.

    Parameters
    ----------
    writer
        The file.
    plans
        Sorted by name; those that the file begins with already are left out.
    jobs
        Threads that read and encode; the calling thread hashes and writes. None is one for each processor.
    progress
        Callback; receives the number of weights of each chunk that was written.
    allow_nonfinite
        Accept NaN and infinity in tensors that are stored bit for bit.
    allow_zeroed
        Accept blocks whose scale is too small for its format, so that their weights become zero.

    Returns
    -------
    list of str
        The names of tensors whose codes were copied, and decode to NaN or infinity.

    Raises
    ------
    SourceError
        If a tensor cannot be stored as planned; it names the tensor.
    TargetError
        If writing fails.
    """
    jobs = jobs or default_jobs()
    done = len(writer.records)
    if progress and done:
        progress(sum(plan.matrix.elements for plan in plans[:done]))
    plans = plans[done:]
    nonfinite: list[str] = []
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="qformat-encode")
    try:
        window = 3 * jobs + 1
        waiting = prefetch(pool, _tasks(plans, on_pool(pool, window)), window)
        for plan in plans:
            encoder, encoded = next(waiting).result()
            if encoded is None:
                encoded = (next(waiting).result() for _ in _chunks(plan, encoder))
            checked = _checked(plan, encoded, allow_nonfinite=allow_nonfinite, allow_zeroed=allow_zeroed)
            if isinstance(plan.encoder, CodeCopy):
                checked = _noted(plan, checked, nonfinite)
            _write(writer, plan, encoder, checked, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    return nonfinite


def _tasks(plans: Sequence[Plan], run: Run) -> Iterator[Callable[[], Any]]:
    """Yield for each tensor a task that returns its encoder and, if it is small, all chunks; else a task for each chunk follows."""
    for plan in plans:
        if plan.matrix.chunk_count(1) <= plan.encoder.task_chunks:
            yield partial(_encode_small, plan)
            continue
        encoder = prepare(plan, run)  # keeps all threads busy by itself
        yield partial(tuple, (encoder, None))  # the encoder by itself; the tasks of the chunks follow
        for chunk in _chunks(plan, encoder):
            yield partial(encode_chunk, plan, encoder, chunk)


def _encode_small(plan: Plan) -> tuple[TensorEncoder, list[EncodedChunk]]:
    encoder = prepare(plan, map)
    return encoder, [encode_chunk(plan, encoder, chunk) for chunk in _chunks(plan, encoder)]


def _chunks(plan: Plan, encoder: TensorEncoder) -> Iterator[Chunk]:
    return plan.matrix.chunks(encoder.codec.chunk_alignment(plan.matrix))


def prepare(plan: Plan, run: Run) -> TensorEncoder:
    """Make the passes over a tensor that its encoder needs; errors name the tensor.

    Raises
    ------
    SourceError
        If it cannot be stored as planned.
    """
    try:
        return plan.encoder.prepare(plan.source, run)
    except ValueError as error:
        raise SourceError(f"tensor {plan.source.name!r}: {error}; keep it with {plan.keep()}") from None


def encode_chunk(plan: Plan, encoder: TensorEncoder, chunk: Chunk) -> EncodedChunk:
    """Encode one chunk; errors name the tensor; raise `SourceError` if it cannot be encoded."""
    try:
        return encoder.encode(chunk)
    except ValueError as error:
        raise SourceError(f"tensor {plan.source.name!r}: {error}") from None


def _write(
    writer: ContainerWriter,
    plan: Plan,
    encoder: TensorEncoder,
    encoded: Iterable[EncodedChunk],
    progress: Progress | None,
) -> None:
    layout = encoder.codec.layout(plan.matrix)
    # A table that begins its segment stands before the chunks: nothing can be written before all are encoded.
    streams = all(isinstance(part, Array) or part.table for part in layout)
    lengths = encoder.codec.segments(plan.matrix)
    tensor = writer.tensor(encoder.record, unknown=[n for n, (_, length) in enumerate(lengths) if length is None])
    errors: list[ErrorSum] = []
    every: list[tuple[Buffer, ...]] = []
    for number, (chunk, result) in enumerate(zip(_chunks(plan, encoder), encoded, strict=True)):
        if streams:
            tensor.write(join_chunks(layout, [result.parts], first=number == 0))
        else:
            every.append(result.parts)
        if result.error is not None:
            errors.append(result.error)
        if progress:
            progress(chunk.size)
    if not streams:
        tensor.write(join_chunks(layout, every))
    total = encoder.error or ErrorSum.total(errors)
    writer.finish(tensor.finish(None if encoder.record.error is None else total))


def _noted(plan: Plan, encoded: Iterable[EncodedChunk], nonfinite: list[str]) -> Iterator[EncodedChunk]:
    """Yield encoded chunks, and add the tensor to a list if one decodes to NaN or infinity."""
    noted = False
    for result in encoded:
        if not result.finite and not noted:
            nonfinite.append(plan.source.name)
            noted = True
        yield result


def _checked(
    plan: Plan, encoded: Iterable[EncodedChunk], *, allow_nonfinite: bool, allow_zeroed: bool
) -> Iterator[EncodedChunk]:
    """Yield encoded chunks; raise `SourceError` for one that lost values."""
    name, type_ = plan.source.name, plan.encoder
    nonfinite = (allow_nonfinite or isinstance(type_, CodeCopy)) and type_.accepts_nonfinite(plan.source.dtype)
    for result in encoded:
        if not result.finite and not nonfinite:
            raise SourceError(
                f"tensor {name!r} holds NaN or infinity; fix the checkpoint, or keep such tensors raw with --allow-nonfinite"
            )
        if result.overflowed:
            raise SourceError(f"tensor {name!r} holds values too large for type {type_}; keep it with {plan.keep()}")
        if result.zeroed and not allow_zeroed:
            raise SourceError(
                f"tensor {name!r} holds parts whose weights are too small for type {type_} and would become zero; "
                f"keep it with {plan.keep()}, or accept zeros with --allow-zeroed"
            )
        yield result
