"""Integer codes whose groups or zero points `affine` cannot hold: the arithmetic that layouts share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.affine import Affine
from qformat.codecs.base import Codec
from qformat.codecs.fp8 import Fp8
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode
from qformat.converters.quantized.layer import Found, Layer
from qformat.dtypes import DTYPES, DType
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

Extent = int | Literal["all"]

#: packed codes of a chunk
Codes = Callable[[Chunk], Buffer]

I8 = DTYPES["i8"]
_INTEGERS = frozenset(DTYPES[name] for name in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "bool"))
_NAME = re.compile("'[^']*'")
_ONE_BYTE_CODES = 128  # what is added to integers of eight bits so that codes are not negative


class UnreadableLayerError(SourceError):
    """A layer that is kept with all its parts: its values do not follow from them, or no type here can hold them."""


def each_possible(tensor_of: Callable[[Layer, Claims], CodedTensor], roles: Sequence[str]) -> Callable[..., Found]:
    """Return a `Layout.read` as `each` does, for a layout of which some layers are left as they are, with a warning."""

    def read(layers: Sequence[Layer], claims: Claims) -> Found:
        tensors, replaced, warnings = [], set(), []
        for layer in layers:
            try:
                tensors.append(tensor_of(layer, claims.about(layer.name)))
                replaced |= layer.names(roles)
            except UnreadableLayerError as error:
                warnings.append(str(error))
        return Found(tensors, replaced, in_short(warnings))

    return read


def in_short(messages: Sequence[str]) -> list[str]:
    """Return messages, of those that differ in the name of a layer only the first one, which tells how many there are."""
    alike: dict[str, list[str]] = {}
    for message in messages:
        alike.setdefault(_NAME.sub("", message, count=1), []).append(message)
    return [first + (f" (and so are {len(others)} more)" if others else "") for first, *others in alike.values()]


def encode_with(codec: Codec, matrix: Matrix, numbers: Sequence[NDArray[Any]], codes: Codes) -> Encode:
    """Return the function that encodes chunks, given the content of all segments before that of the codes."""
    layout, stored = codec.layout(matrix), [coded.as_bytes(array) for array in numbers]

    def encode(chunk: Chunk) -> tuple[Buffer, ...]:
        *places, _ = spans(layout, matrix, chunk)
        return (*(number[place] for number, place in zip(stored, places, strict=True)), codes(chunk))

    return encode


def packing(codes: U8, bits: int) -> Codes:
    """Return the function that packs the codes of a chunk, given those of all rows, a byte each."""

    def packed(chunk: Chunk) -> Buffer:
        own = codes[chunk.row : chunk.row + chunk.rows, chunk.col : chunk.col + chunk.cols]
        return coded.as_bytes(coded.pack(own, bits))

    return packed


def signed_codes(stored: SourceTensor, matrix: Matrix) -> Codes:
    """Return the function that reads the codes of a chunk from integers of eight bits, plus 128."""

    def read(chunk: Chunk) -> Buffer:
        data = stored.read(chunk.elements(matrix)).data.reshape(chunk.shape).view(np.uint8)
        return coded.as_bytes(np.pad(data + np.uint8(_ONE_BYTE_CODES), ((0, 0), (0, -chunk.cols % 32))))

    return read


def plain_codes(stored: SourceTensor, matrix: Matrix) -> Codes:
    """Return the function that reads the codes of a chunk as they are, a byte for each element."""
    return lambda chunk: coded.as_bytes(stored.read(chunk.elements(matrix)).data)


def bytes_tensor(
    layer: Layer, name: str, stored: SourceTensor, scale: SourceTensor, zeros: SourceTensor | None = None
) -> CodedTensor:
    """Return a tensor of eight-bit integers or floats with a scale for the tensor, for each row, or for groups of columns.

    Parameters
    ----------
    layer
        The layer.
    name
        Name of the tensor.
    stored
        The codes, in the tensor's shape.
    scale
        The scales: one, or for each row one or one for each group.
    zeros
        The zero points, integers or floats in the same shape, if there are any.
    """
    matrix = Matrix.of(stored.shape)
    rows, cols = _extents(stored, scale, matrix)
    if stored.dtype.floating:
        if zeros is not None and any(coded.as_bytes(coded.whole(zeros))):
            raise SourceError(f"tensor {zeros.name!r} is not zero, but eight-bit floats have no zero points")
        codec: Codec = Fp8(stored.dtype.name.removeprefix("f8_"), rows, cols, scale.dtype.name)  # type: ignore[arg-type]
        return CodedTensor(
            name,
            stored.shape,
            codec,
            lambda: encode_with(codec, matrix, [coded.whole(scale)], plain_codes(stored, matrix)),
        )
    if zeros is not None and math.prod(zeros.shape) != math.prod(scale.shape):
        raise coded.disagree(zeros, scale)
    if zeros is not None and zeros.dtype not in (*coded.SCALES, *_INTEGERS):
        raise SourceError(f"tensor {zeros.name!r} is of dtype {zeros.dtype.name}, where numbers are needed")
    if zeros is not None and not any(coded.as_bytes(coded.whole(zeros))):
        zeros = None
    if zeros is not None and zeros.dtype.floating:
        floats = [coded.whole(scale), coded.whole(zeros)]
        kind = Scaled(8, rows, cols, scale.dtype.name, zeros.dtype.name, "sub", _ONE_BYTE_CODES)  # type: ignore[arg-type]
        return CodedTensor(
            name, stored.shape, kind, lambda: encode_with(kind, matrix, floats, signed_codes(stored, matrix))
        )
    codec = integer_codec(8, rows, cols, scale.dtype, zeros=zeros is not None)

    def load() -> Encode:
        own = (
            [] if zeros is None else [zero_points(codec, coded.whole(zeros).astype(np.int64) + _ONE_BYTE_CODES, layer)]
        )
        return encode_with(codec, matrix, [coded.whole(scale), *own], signed_codes(stored, matrix))

    return CodedTensor(name, stored.shape, codec, load)


def integer_codec(bits: int, rows: Extent, cols: Extent, scale: DType, *, zeros: bool) -> Affine | Scaled:
    """Return the codec of unsigned codes with integer zero points; without zero points, if the middle code means zero.

    `rows` and `cols` are the rows and columns that share a scale.
    """
    if rows == 1 and bits in coded.WIDTHS and (cols == "all" or cols % 32 == 0):
        return Affine(bits, "row" if cols == "all" else cols, not zeros, scale.name)  # type: ignore[arg-type]
    if zeros:
        return Scaled(bits, rows, cols, scale.name, "f16", "sub")  # type: ignore[arg-type]
    return Scaled(bits, rows, cols, scale.name, "none", "add", 1 << (bits - 1))  # type: ignore[arg-type]


def zero_points(codec: Affine | Scaled, zeros: NDArray[Any], layer: Layer) -> NDArray[Any]:
    """Return integer zero points as the segment of a codec; raise `SourceError` if it cannot hold them."""
    if zeros.min(initial=0) < 0 or zeros.max(initial=0) > 255:
        raise SourceError(
            f"layer {layer.name!r} has zero points from {zeros.min()} to {zeros.max()}, which no code has"
        )
    return zeros.astype(np.uint8 if isinstance(codec, Affine) else np.float16)


def _extents(stored: SourceTensor, scale: SourceTensor, matrix: Matrix) -> tuple[Extent, Extent]:
    """Return the numbers of rows and columns that share a scale."""
    if scale.dtype not in coded.SCALES:
        raise SourceError(f"tensor {scale.name!r} is of dtype {scale.dtype.name}, where f16, bf16 or f32 is needed")
    count = math.prod(scale.shape)
    if 0 in stored.shape or not count:
        raise coded.disagree(scale, stored)
    if count == 1:
        return ("all", "all") if matrix.rows > 1 else (1, "all")
    if scale.shape[0] != matrix.rows or count % matrix.rows or any(size != 1 for size in scale.shape[2:]):
        raise coded.disagree(scale, stored)
    groups = count // matrix.rows
    if matrix.cols % groups:
        raise coded.disagree(scale, stored)
    return 1, "all" if groups == 1 else matrix.cols // groups
