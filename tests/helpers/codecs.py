"""Encoding and decoding whole arrays with a codec, and files that hold one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.codecs.base import Codec, EncodedChunk, Encoder
from qformat.codecs.codebooks import Survey
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.converters.arrays import ArrayTensor
from qformat.dtypes import F32, DType, Elements, from_array
from qformat.kernels import load
from qformat.records import MeasuredError, Segment, TensorRecord


def round_trip(folder: Path, array: np.ndarray, type_: str, **options: Any) -> tuple[np.ndarray, TensorRecord, bytes]:
    """Write a file with the tensor ``x``; return its values as they are read, its record, and the file."""
    path = folder / "x.qf"
    qformat.save_file({"x": array}, path, {"x": type_}, overwrite=True, **options)
    with qformat.safe_open(path) as f:
        return f.get_tensor("x"), f.info("x"), path.read_bytes()


def survey_of(values: np.ndarray) -> Survey:
    """Return the histogram that codebooks and levels are fitted to."""
    found = Survey.empty()
    load("lut").survey(np.ascontiguousarray(values, np.float32).reshape(-1), found.counts, found.sums)
    return found


def encode(codec: Encoder, array: np.ndarray | Elements) -> EncodedChunk:
    """Encode a matrix as one chunk, after the passes that the encoder makes over it."""
    tensor = ArrayTensor("x", array if isinstance(array, Elements) else from_array(array))
    encoder = codec.prepare(tensor, map)
    return encoder.encode(Chunk(0, tensor.matrix.rows, 0, tensor.matrix.cols))


def decode(codec: Codec, parts: Sequence[Buffer], shape: Sequence[int], dtype: DType = F32) -> np.ndarray:
    """Decode one chunk of a tensor whose source has the dtype."""
    out = np.empty(shape, codec.decoded_from(dtype).storage)
    codec.decode(parts, out)
    return out


def segment_lengths(codec: Codec, shape: Sequence[int]) -> dict[str, int | None]:
    """Return the length in bytes of each segment of a tensor; None where the shape does not decide it."""
    return dict(codec.segments(Matrix.of(shape)))


def chunks_of(codec: Codec, shape: Sequence[int]) -> list[Chunk]:
    """Return the chunks of a tensor in order."""
    matrix = Matrix.of(shape)
    return list(matrix.chunks(codec.chunk_alignment(matrix)))


def part_of(codec: Codec, shape: Sequence[int], chunk: Chunk, segments: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return the bytes of a chunk, from the segments of a tensor whose lengths the shape decides."""
    matrix = Matrix.of(shape)
    places = spans(codec.layout(matrix), matrix, chunk)
    return tuple(segment[place] for segment, place in zip(segments, places, strict=True))


def record_of(codec: Codec, shape: tuple[int, ...], **changes: Any) -> TensorRecord:
    """Return the record of an empty or imaginary float32 tensor ``x`` without errors."""
    segments = tuple(Segment(name, 0, length or 0, "0" * 64) for name, length in segment_lengths(codec, shape).items())
    record = TensorRecord("x", shape, "f32", codec.id, codec.params(), segments, error=MeasuredError(0.0, 0.0))
    return replace(record, **changes)


def wrong_lengths_are_refused(codec: Codec, shape: Sequence[int]) -> None:
    """Assert that a decoder takes parts of the right lengths only."""
    good = [bytes(length or 0) for length in segment_lengths(codec, shape).values()]
    decode(codec, good, shape)
    for i, part in enumerate(good):
        for wrong in (b"", part[:-1], part + b"\0"):
            with pytest.raises(ValueError, match="are needed"):
                decode(codec, [*good[:i], wrong, *good[i + 1 :]], shape)
