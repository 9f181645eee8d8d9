"""The product's encoding steps as the benchmarks use them: the only module here that knows how tensors are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from qformat.codecs.base import CHUNK_ELEMENTS, Buffer, Chunk, Codec, EncodedChunk, Matrix, chunks
from qformat.codecs.registry import parse_type
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.dtypes import Elements, from_array
from qformat.parallel import default_jobs
from qformat.pipeline.encode import Plan, Run, encode_chunk, fit, on_pool
from qformat.pipeline.measure import ErrorStats, collect, measure
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint

__all__ = [
    "CHUNK_ELEMENTS",
    "Buffer",
    "Chunk",
    "Codec",
    "Encoder",
    "ErrorStats",
    "Parts",
    "chunk_slice",
    "convert_directory",
    "cut",
    "decode_all",
    "default_jobs",
    "encode_all",
    "on_threads",
    "parse_type",
    "save_elements",
    "totals",
]

#: the bytes of one chunk in each segment of its codec's layout
Parts = tuple[Buffer, ...]
Values = np.ndarray | Elements


class Encoder:
    """One tensor in memory, after all passes over it that its codec needs.

    Parameters
    ----------
    codec
        The codec, which must not be layered.
    values
        The tensor.
    run
        Maps a function over chunks, in order: `map`, or `on_threads`.

    Attributes
    ----------
    chunks
        The chunks that `convert` would cut the tensor into.
    """

    def __init__(self, codec: Codec, values: Values, run: Run = map) -> None:
        self._plan = fit(Plan(ArrayTensor("", _elements(values)), codec), run)
        self.chunks: list[Chunk] = list(self._plan.chunks())

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode one chunk, which may also be another one than those of `chunks` if it begins on the codec's alignment."""
        return encode_chunk(self._plan, chunk)


def _elements(values: Values) -> Elements:
    return values if isinstance(values, Elements) else from_array(values)


def cut(shape: Sequence[int], alignment: int) -> list[Chunk]:
    """Return the chunks of a tensor of this shape that begin on multiples of `alignment` columns."""
    return list(chunks(Matrix.of(shape), alignment))


def chunk_slice(shape: Sequence[int], chunk: Chunk) -> slice:
    """Return where the elements of a chunk stand in the flattened tensor."""
    return chunk.elements(Matrix.of(shape))


def on_threads(pool: Executor) -> Run:
    """Return what maps a function over chunks on the threads of a pool."""
    return on_pool(pool, 3 * default_jobs())


def encode_all(codec: Codec, values: Values) -> list[tuple[Chunk, Parts]]:
    """Encode a tensor; return its chunks with copies of their bytes."""
    encoder = Encoder(codec, values)
    return [(chunk, tuple(bytes(part) for part in encoder.encode(chunk).parts)) for chunk in encoder.chunks]


def decode_all(codec: Codec, work: Iterable[tuple[Parts, np.ndarray]]) -> None:
    """Decode chunks, each to an array of its rows and columns."""
    for parts, target in work:
        codec.decode(parts, target)


def totals(tensors: Mapping[str, np.ndarray], types: Iterable[str]) -> dict[str, ErrorStats]:
    """Return the statistics of each type over all tensors together, as ``quantize-stats`` measures them, by type string."""
    texts = {str(parse_type(text)): text for text in types}
    sources = [ArrayTensor(name, from_array(array)) for name, array in tensors.items()]
    _, sums = collect(measure(sources, [parse_type(text) for text in texts.values()]))
    return {texts[total.type]: total for total in sums}


def save_elements(path: Path, tensors: Mapping[str, Elements], kind: str) -> None:
    """Write a file of tensors of any dtype, all with one type."""
    convert(Checkpoint([ArrayTensor(name, elements) for name, elements in tensors.items()]), path, Recipe.parse(kind))


def convert_directory(source: Path, target: Path, kind: str) -> None:
    """Convert a checkpoint in this process."""
    convert(open_checkpoint(source), target, Recipe.parse(kind))
