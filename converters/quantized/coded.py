"""Quantized tensors whose codes are copied, and the arithmetic that layouts share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.affine import Affine
from qformat.codecs.base import Codec
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.codecs.packed import cuts
from qformat.dtypes import BF16, DTYPES, F16, F32, DType, Elements
from qformat.errors import SourceError
from qformat.kernels import load as kernels
from qformat.pipeline.source import QuantizedSource, SourceTensor

U8 = NDArray[np.uint8]
Encode = Callable[[Chunk], tuple[Buffer, ...]]
Width = Literal[2, 3, 4, 8]

WIDTHS: tuple[Width, ...] = (2, 3, 4, 8)  # bits of a code that `affine` supports
SCALES = (F16, BF16, F32)
I32 = DTYPES["i32"]


class CodedTensor(QuantizedSource):
    """A quantized tensor whose codes are copied.

    Parameters
    ----------
    name, shape
        Its name and shape in the model.
    codec
        The codec that holds its codes.
    load
        Reads the parts of the layer, and returns the function that encodes chunks; it is kept until all chunks are encoded.
    """

    dtype: DType = F32

    def __init__(self, name: str, shape: tuple[int, ...], codec: Codec, load: Callable[[], Encode]) -> None:
        self.name = name
        self.shape = shape
        self.codec = codec
        self._load = load
        self._lock = threading.Lock()
        self._encode: Encode | None = None
        self._remaining = 0

    def encoded(self, chunk: Chunk) -> tuple[Buffer, ...]:
        """Return the bytes of a chunk for each segment."""
        with self._lock:  # one thread loads, the others wait
            if self._encode is None:
                self._encode, self._remaining = self._load(), math.prod(self.shape)
            encode = self._encode
            self._remaining -= chunk.size
            if self._remaining <= 0:
                self._encode = None
        return encode(chunk)

    def read(self, elements: slice) -> Elements:
        """Decode elements."""
        cols = Matrix.of(self.shape).cols
        first = elements.start // cols
        chunk = Chunk(first, -(-elements.stop // cols) - first, 0, cols)
        values = np.empty((chunk.rows, cols), np.float32)
        if chunk.rows:
            try:
                self.codec.decode(self.encoded(chunk), values)
            except ValueError as error:
                raise SourceError(f"tensor {self.name!r}: {error}") from None
        return Elements(F32, values.reshape(-1)[elements.start - first * cols : elements.stop - first * cols])


@dataclass(frozen=True)
class Grouping:
    """The columns that share a scale: `size` of them, or a row; `places` is the group of each column if groups are not runs."""

    size: int | Literal["row"]
    places: NDArray[np.uint32] | None = None


def grouping(name: str, cols: int, groups: int, claimed: int | None, places: NDArray[Any] | None) -> Grouping:
    """Find the columns that share a scale.

    `name` is the tensor with the groups, `claimed` the group size in the configuration, if any, and `places` the group of each
    column, if there is such a list. Raises `SourceError` if the numbers are impossible or ambiguous.
    """
    if not 0 < groups <= cols:
        raise SourceError(f"tensor {name!r}: there are scales for {groups} groups in rows of {cols} columns")
    if places is not None and (places.min() < 0 or places.max() >= groups):
        wrong = places[(places < 0) | (places >= groups)][0]
        raise SourceError(f"tensor {name!r}: a column is in group {wrong} of {groups}")
    if groups == 1:
        return Grouping("row")
    # without a claim: only the last group may be shorter, so that the first is full
    full = int((places == 0).sum()) if places is not None else cols // groups if cols % groups == 0 else 0
    size = next((n for n in (claimed or 0, full, -(-cols // groups)) if n > 0 and cuts(cols, n) == groups), 0)
    if not size or (places is None and not claimed and not full):
        raise SourceError(
            f"tensor {name!r}: the length of {groups} groups in {cols} columns is unknown; set group_size in quantize_config.json"
        )
    natural = np.arange(cols, dtype=np.uint32) // np.uint32(size)
    if places is not None and not np.array_equal(places, natural):
        return Grouping(size, places.astype(np.uint32))
    return Grouping(size, natural if size % 32 else None)


def affine_codec(name: str, bits: Width, grouping: Grouping, *, sym: bool, scale: DType) -> Affine:
    """Return the codec of a layer; raise `SourceError` if there is none with such parameters."""
    try:
        return Affine(bits, grouping.size, sym, scale.name, act_order=grouping.places is not None)  # type: ignore[arg-type]
    except ValueError as error:
        raise SourceError(f"tensor {name!r}: {error}") from None


def affine_encode(
    codec: Affine,
    shape: tuple[int, int],
    scales: NDArray[Any],
    zeros: U8 | None,
    places: NDArray[np.uint32] | None,
    packed: Callable[[int, int], U8],
) -> Encode:
    """Return the function that encodes the chunks of an `affine` tensor.

    Scales and zero points are ``[rows, groups]``, without zero points if all are in the middle; `places` is the group of each
    column, if the codec has such a list; `packed` returns the codes of rows ``start:stop``, ``[rows, bytes]``, maybe unpadded.
    """
    numbers = [as_bytes(array) for array in (scales, zeros, places) if array is not None]
    return partial(_affine_parts, codec, Matrix(*shape), numbers, packed)


def _affine_parts(
    codec: Affine, matrix: Matrix, numbers: Sequence[memoryview], packed: Callable[[int, int], U8], chunk: Chunk
) -> tuple[Buffer, ...]:
    *places_, span = spans(codec.layout(matrix), matrix, chunk)
    length = codec.padded(matrix.cols) * codec.bits // 8
    codes = packed(chunk.row, chunk.row + chunk.rows)
    if codes.shape[1] < length:
        codes = np.pad(codes, ((0, 0), (0, length - codes.shape[1])))
    start = chunk.row * length
    own = as_bytes(codes)[span.start - start : span.stop - start]
    return (*(number[part] for number, part in zip(numbers, places_, strict=True)), own)


def pack(codes: U8, bits: int) -> U8:
    """Pack rows of codes, a byte each, and pad them with zeros."""
    rows, cols = codes.shape
    padded = np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -cols % 32))))
    packed = np.empty((rows, padded.shape[1] * bits // 8), np.uint8)
    kernels("packing").pack(padded.reshape(-1), packed.reshape(-1), bits)
    return packed


def unpack(words: NDArray[np.uint32], bits: int) -> U8:
    """Return the codes in rows of 32-bit words, each row a continuous string of bits."""
    if 32 % bits == 0:
        return unpack_loose(words, bits)
    digits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    count = digits.shape[1] // bits
    codes: U8 = (digits[:, : count * bits].reshape(len(words), count, bits) * weights).sum(axis=2, dtype=np.uint8)
    return codes


def unpack_loose(words: NDArray[np.uint32], bits: int) -> U8:
    """Return the codes in rows of 32-bit words, with no code across two words."""
    shifts = np.arange(0, 32 - bits + 1, bits, dtype=np.uint32)
    codes = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(len(words), -1)


def as_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def whole(tensor: SourceTensor) -> NDArray[Any]:
    """Return all elements of a tensor in its shape; int32 as uint32."""
    data = tensor.read(slice(0, math.prod(tensor.shape))).data.reshape(tensor.shape)
    return data.view(np.uint32) if tensor.dtype is I32 else data


def disagree(tensor: SourceTensor, other: SourceTensor) -> SourceError:
    """Return the error for two tensors of a layer whose shapes do not match."""
    return SourceError(
        f"tensor {tensor.name!r} of shape {list(tensor.shape)} does not fit {other.name!r} of shape {list(other.shape)}"
    )
