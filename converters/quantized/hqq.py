"""HQQ: a value is (code − zero) × scale, with float zeros, for groups of consecutive elements or of elements at equal distances.

``W_q`` holds the codes of the weight as a matrix whose rows (``axis`` 1) or columns (``axis`` 0) are the groups; several codes of
different rows of it are in an item. The parts beside it are the settings, a tensor for each: numbers, and text as bytes.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Matrix
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode
from qformat.converters.quantized.integers import Extent, UnreadableLayerError, encode_with, packing
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

_NEEDED = ("W_q", "scale", "zero", "shape", "packing")
_SETTINGS = ("nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero")
# How it was made, or how a program computes with it
_IRRELEVANT = (
    *("unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero", "quant_config"),
)
ROLES = (*_NEEDED, *_SETTINGS, *_IRRELEVANT)

# For each packing: bits of a code, dtype of an item, and how far each code is shifted, that of the first rows first
_PACKINGS: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "8bit_u8": (8, "u1", (0,)),
    "4bit_u8": (4, "u1", (4, 0)),
    "3bit_32": (3, "<u4", (27, 24, 21, 18, 15, 12, 9, 6, 3, 0)),
    "2bit_u8": (2, "u1", (6, 4, 2, 0)),
    "1bit_u8": (1, "u1", (7, 6, 5, 4, 3, 2, 1, 0)),
}
_LONGEST_TEXT = 64


def is_hqq(layer: Layer) -> bool:
    """Return whether a layer has HQQ's codes, and what is needed to decode them."""
    return layer.has(*_NEEDED)


def hqq_tensor(layer: Layer, claims: Claims) -> CodedTensor:  # noqa: ARG001  a layer says all about itself
    """Return the weights of a layer; raise `SourceError` if its parts do not match."""
    for role in ("quant_scale", "quant_zero"):
        if _number(layer, role, 0):
            raise UnreadableLayerError(
                f"layer {layer.name!r} of HQQ has scales or zeros that are quantized themselves: kept as it is"
            )
    rows, cols = _shape(layer)
    axis, size = _number(layer, "axis", 1), _number(layer, "group_size", 0)
    name = _text(layer.parts["packing"])
    if name not in _PACKINGS or axis not in (0, 1) or size < 0 or (size and rows * cols % size):
        raise SourceError(
            f"layer {layer.name!r} of HQQ has packing {name[:20]!r}, axis {axis} and group_size {size}: impossible"
        )
    bits, item, shifts = _PACKINGS[name]
    stored, scale, zero = (layer.parts[role] for role in ("W_q", "scale", "zero"))
    for part in (scale, zero):
        if part.dtype not in coded.SCALES:
            raise SourceError(f"tensor {part.name!r} is of dtype {part.dtype.name}, where f16, bf16 or f32 is needed")
        if part.shape != scale.shape:
            raise coded.disagree(part, scale)
    # of the matrix that is packed
    if not size:
        height, width = rows, cols
    else:
        height, width = (size, rows * cols // size) if axis == 0 else (rows * cols // size, size)
    items = -(-height // len(shifts))
    # codes may be viewed as floats, which are wider
    if stored.nbytes != items * width * np.dtype(item).itemsize or stored.shape[:-1] != (items,):
        raise UnreadableLayerError(
            f"tensor {stored.name!r} of shape {list(stored.shape)} is not {rows} x {cols} codes of packing {name}: kept as it is"
        )
    if len(shifts) * items != height and bits != 3:
        raise SourceError(f"tensor {stored.name!r}: {height} rows of codes cannot be packed by {len(shifts)}")
    count = prod(scale.shape)
    if count not in (1, width if axis == 0 else height):
        raise coded.disagree(scale, stored)
    shared_rows, shared_cols, bands = _sharing(layer, rows, cols, axis, size, count)
    codec = Scaled(bits, shared_rows, shared_cols, scale.dtype.name, zero.dtype.name, "sub")  # type: ignore[arg-type]

    def load() -> Encode:
        raw = np.ascontiguousarray(coded.whole(stored)).reshape(-1).view(item).reshape(items, width)
        codes = _unpack(raw, shifts, (1 << bits) - 1)[:height].reshape(rows, cols)
        numbers = [coded.whole(scale), coded.whole(zero), *([] if bands is None else [bands])]
        return encode_with(codec, Matrix(rows, cols), numbers, packing(codes, bits))

    return CodedTensor(layer.named("weight"), (rows, cols), codec, load)


def _unpack(items: NDArray[np.uint32] | U8, shifts: tuple[int, ...], mask: int) -> U8:
    """Return the codes of a packed matrix, in which those of the same item are as far apart as there are rows of items."""
    codes = np.empty((len(shifts), *items.shape), np.uint8)
    for part, shift in zip(codes, shifts, strict=True):
        part[:] = (items >> shift) & mask
    return codes.reshape(-1, items.shape[1])


def _sharing(
    layer: Layer, rows: int, cols: int, axis: int, size: int, count: int
) -> tuple[Extent, Extent, NDArray[np.uint32] | None]:
    """Return how many rows and columns share a scale, and the band of each row if there are bands.

    A group is `size` consecutive elements (axis 1), or elements at equal distances (axis 0).
    """
    number = np.arange(rows, dtype=np.uint32)
    if count == 1:
        return "all", "all", None
    if not size:
        return (1, "all", None) if axis == 1 else ("all", 1, None)
    if axis == 1 and cols % size == 0:
        return 1, size, None
    if axis == 1 and size % cols == 0:
        return size // cols, "all", number // np.uint32(size // cols)
    distance = rows * cols // size
    if axis == 0 and distance % cols == 0:
        return (1, 1, None) if size == 1 else (size, 1, number % np.uint32(distance // cols))
    raise UnreadableLayerError(
        f"layer {layer.name!r} of HQQ has groups of {size} in rows of {cols} columns: kept as it is"
    )


def _shape(layer: Layer) -> tuple[int, int]:
    part = layer.part("shape", "W_q", [DTYPES["i64"], DTYPES["i32"]], dims=1)
    values = part.read(slice(0, 2)).data.tolist() if part.shape == (2,) else []
    if len(values) != 2 or min(values) <= 0:
        raise SourceError(f"tensor {part.name!r} is no shape of a matrix")
    return values[0], values[1]


def _number(layer: Layer, role: str, default: int) -> int:
    part = layer.parts.get(role)
    if part is None:
        return default
    if prod(part.shape) != 1 or part.dtype is DTYPES["bf16"]:
        raise SourceError(f"tensor {part.name!r} of shape {list(part.shape)} is not a number")
    value = part.read(slice(0, 1)).data[0].item()
    return int(value) if abs(value) < 1 << 31 else -1  # not if it is a NaN


def _text(part: SourceTensor) -> str:
    if part.dtype is not DTYPES["u8"] or not 0 < prod(part.shape) <= _LONGEST_TEXT:
        raise SourceError(f"tensor {part.name!r} is no text")
    return bytes(part.read(slice(0, prod(part.shape))).data).decode("latin-1")
