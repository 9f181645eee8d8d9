"""Tensors whose codes select entries of a table, made of the parts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.codebook import Codebook
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.converters.quantized.coded import U8, CodedTensor, Encode, as_bytes, pack
from qformat.pipeline.source import SourceTensor

#: the values of four-bit floats: sign, two bits of exponent, one bit of mantissa
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def table_tensor(
    name: str,
    shape: tuple[int, ...],
    codec: Codebook,
    numbers: Callable[[], Sequence[NDArray[Any]]],
    codes: Callable[[Chunk], U8],
) -> CodedTensor:
    """Return a tensor.

    Parameters
    ----------
    name, shape, codec
        Of the tensor.
    numbers
        Reads the content of all segments but the last one, the codes.
    codes
        Reads the packed codes of a chunk, a row of bytes for each row, maybe without the padding to whole runs.
    """
    matrix = Matrix.of(shape)

    def load() -> Encode:
        contents = [as_bytes(array) for array in numbers()]

        def encode(chunk: Chunk) -> tuple[Buffer, ...]:
            *places, span = spans(codec.layout(matrix), matrix, chunk)
            packed, length = codes(chunk), (span.stop - span.start) // chunk.rows
            if packed.shape[1] < length:
                packed = np.pad(packed, ((0, 0), (0, length - packed.shape[1])))
            own = (content[place] for content, place in zip(contents, places, strict=True))
            return (*own, as_bytes(packed))

        return encode

    return CodedTensor(name, shape, codec, load)


def bytes_of(tensor: SourceTensor, start: int, stop: int) -> U8:
    """Return bytes of a tensor of any dtype, which begin and end with elements."""
    size = tensor.dtype.size
    data = tensor.read(slice(start // size, -(-stop // size))).data.view(np.uint8)
    return data[start % size :][: stop - start]


def nibbles(tensor: SourceTensor, matrix: Matrix, chunk: Chunk, *, high_first: bool) -> U8:
    """Return the packed codes of a chunk of which the source has two in each byte, without padding between rows."""
    elements = chunk.elements(matrix)
    data = bytes_of(tensor, elements.start // 2, -(-elements.stop // 2))
    if high_first:
        data = np.bitwise_or(data << 4, data >> 4, dtype=np.uint8)
    if chunk.cols % 2 == 0 and elements.start % 2 == 0:
        return data.reshape(chunk.shape[0], -1)
    loose = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
    return pack(loose[elements.start % 2 :][: chunk.size].reshape(chunk.shape), 4)
