"""The product's encoding steps as the benchmarks use them: the only module here that knows how tensors are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from qformat.codecs.base import ChunkEncoder, Codec, EncodedChunk, Encoder, Run
from qformat.codecs.layout import CHUNK_ELEMENTS, Buffer, Chunk, Matrix
from qformat.codecs.registry import parse_type
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.dtypes import Elements, from_array
from qformat.entropy.frequencies import digits_per_symbol
from qformat.entropy.streams import StreamWriter, symbol_count
from qformat.kernels import load
from qformat.parallel import default_jobs
from qformat.pipeline.encode import on_pool
from qformat.pipeline.measure import ErrorStats, collect, measure
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint

__all__ = [
    "CHUNK_ELEMENTS",
    "Chunk",
    "ChunkEncoder",
    "Codec",
    "Encoder",
    "ErrorStats",
    "Parts",
    "Prepared",
    "chunk_slice",
    "code_stream",
    "convert_directory",
    "cut",
    "decode_all",
    "default_jobs",
    "digits_per_symbol",
    "encode_all",
    "on_threads",
    "parse_type",
    "save_elements",
    "totals",
]

#: the bytes of one chunk in each segment of its codec's layout
Parts = tuple[Buffer, ...]
Values = np.ndarray | Elements


class Prepared:
    """One tensor in memory, after all passes over it that its encoder needs.

    Parameters
    ----------
    encoder
        The encoder, as `parse_type` returns it.
    values
        The tensor.
    run
        Maps a function over chunks, in order: `map`, or `on_threads`.

    Attributes
    ----------
    codec
        The codec that decodes the chunks.
    chunks
        The chunks that `convert` would cut the tensor into.
    """

    def __init__(self, encoder: Encoder, values: Values, run: Run = map) -> None:
        tensor = ArrayTensor("", _elements(values))
        self._encoder = encoder.prepare(tensor, run)
        self.codec: Codec = self._encoder.codec
        self.chunks: list[Chunk] = list(tensor.matrix.chunks(self.codec.chunk_alignment(tensor.matrix)))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode one of `chunks`, or another chunk that begins on the codec's alignment."""
        return self._encoder.encode(chunk)


def _elements(values: Values) -> Elements:
    return values if isinstance(values, Elements) else from_array(values)


def cut(shape: Sequence[int], alignment: int) -> list[Chunk]:
    """Return the chunks of a tensor of this shape that begin on multiples of `alignment` columns."""
    return list(Matrix.of(shape).chunks(alignment))


def chunk_slice(shape: Sequence[int], chunk: Chunk) -> slice:
    """Return where the elements of a chunk stand in the flattened tensor."""
    return chunk.elements(Matrix.of(shape))


def on_threads(pool: Executor) -> Run:
    """Return a `map` that runs on the threads of a pool."""
    return on_pool(pool, 3 * default_jobs())


def encode_all(encoder: Encoder, values: Values) -> list[tuple[Chunk, Parts]]:
    """Encode a tensor; return its chunks with copies of their bytes."""
    tensor = Prepared(encoder, values)
    return [(chunk, tuple(bytes(part) for part in tensor.encode(chunk).parts)) for chunk in tensor.chunks]


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


def code_stream(codes: np.ndarray, base: int) -> bytes:
    """Return the chunk of codes below `base`, entropy-coded as by ``levels``."""
    each = digits_per_symbol(base)
    symbols = np.empty(symbol_count(codes.size, base), np.uint8)
    load("symbols").join(np.pad(codes, (0, symbols.size * each - codes.size)), base, each, symbols)
    writer = StreamWriter()
    writer.stream(symbols, base)
    return writer.chunk(codes.size)
