"""Encoding and decoding whole arrays with a codec, and files that hold one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import qformat
from qformat.codecs.base import EncodedChunk, Encoder
from qformat.codecs.codebooks import Survey
from qformat.codecs.layout import Matrix
from qformat.converters.arrays import ArrayTensor
from qformat.dtypes import Elements
from qformat.kernels import load
from qformat.records import TensorRecord


def round_trip(folder: Path, array: np.ndarray, type_: str, **options: Any) -> tuple[np.ndarray, TensorRecord, bytes]:
    """Write a file with the tensor ``x``; return its values as they are read, its record, and the file."""
    path = folder / "x.qf"
    qformat.save_file({"x": array}, path, {"x": type_}, overwrite=True, **options)
    with qformat.safe_open(path) as f:
        return f.get_tensor("x"), f.info("x"), path.read_bytes()


def encode(codec: Encoder, elements: Elements) -> EncodedChunk:
    """Encode an array of one chunk, after the passes over it that the codec needs."""
    encoder = codec.prepare(ArrayTensor("x", elements), map)
    (chunk,) = Matrix.of(elements.data.shape).chunks(encoder.codec.chunk_alignment(Matrix.of(elements.data.shape)))
    return encoder.encode(chunk)


def survey_of(values: np.ndarray) -> Survey:
    """Return the histogram that codebooks and levels are fitted to."""
    found = Survey.empty()
    load("lut").survey(np.ascontiguousarray(values, np.float32).reshape(-1), found.counts, found.sums)
    return found
