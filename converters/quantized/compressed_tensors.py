"""Integer layers of compressed-tensors: codes packed into 32-bit words (pack-quantized), or a byte each (int-quantized).

``weight_packed [out, …]``, ``weight_scale [out, groups]``, ``weight_shape [2]``, and maybe ``weight_zero_point`` packed down the
columns and ``weight_g_idx [in]``; or ``weight [out, in]``, ``weight_scale`` and maybe ``weight_zero_point``, not packed. ChatGLM's
layers are like the latter, those of four bits with two codes in a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Matrix
from qformat.codecs.packed import cuts
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims, contradiction
from qformat.converters.quantized.coded import U8, CodedTensor, Encode, Grouping, Width
from qformat.converters.quantized.integers import encode_with, signed_codes
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

METHOD = "compressed-tensors"
PACKED_ROLES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
BYTE_ROLES = ("weight", "weight_scale", "weight_zero_point", "weight_offset", "comfy_quant")
#: names in config.json of these formats, and of those that the same checkpoint may contain
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
    "fakequant",
)

I8, I64 = DTYPES["i8"], DTYPES["i64"]
_MAX_BITS = 8  # of a packed code
_NIBBLES: Width = 4  # bits of a code in ChatGLM's layers of two codes a byte; config.json has them as quantization_bit


def is_packed(layer: Layer) -> bool:
    """Return whether the codes of a layer are in 32-bit words."""
    packed = layer.parts.get("weight_packed")
    return packed is not None and packed.dtype is coded.I32 and len(packed.shape) <= 2 and not layer.has("qweight")


def is_bytes(layer: Layer) -> bool:
    """Return whether the codes of a layer are signed bytes."""
    others = layer.has("qweight") or layer.has("weight_packed")
    return layer.has("weight", "weight_scale") and layer.parts["weight"].dtype is I8 and not others


def packed_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer whose codes are in 32-bit words.

    Raises `SourceError` if its parts do not match, or contradict the configuration.
    """
    _check_claims(layer.named("weight_packed"), claims)
    stored = layer.part("weight_packed", "weight_packed", [coded.I32])
    rows, cols = _shape(stored, layer.part("weight_shape", "weight_packed", [coded.I32, I64], dims=1))
    bits, loose = _layout(stored, cols, claims)
    places = None
    if layer.has("weight_g_idx"):
        g_idx = layer.part("weight_g_idx", "weight_packed", [coded.I32, I64], dims=1)
        if g_idx.shape != (cols,):
            raise coded.disagree(g_idx, stored)
        listed = coded.whole(g_idx).view(np.int32 if g_idx.dtype is coded.I32 else np.int64)
        places = None if (listed == -1).all() else listed  # the initial value, which stays if the columns are in order

    def packed(start: int, stop: int) -> U8:
        read = _rows(stored, start, stop).view(np.uint32)
        return coded.pack(coded.unpack_loose(read, bits)[:, :cols], bits) if loose else read.view(np.uint8)

    def zeros(tensor: SourceTensor, groups: int) -> U8:
        if tensor.dtype is I8:  # in old versions, and in new ones if there is one for the whole tensor
            return _byte_zeros(tensor, stored, groups, bits)
        height = cuts(rows, 32 // bits) if loose else cuts(rows * bits, 32)
        if tensor.dtype is not coded.I32 or tensor.shape != (height, groups):
            raise coded.disagree(tensor, stored)
        columns = np.ascontiguousarray(coded.whole(tensor).T)
        return (coded.unpack_loose if loose else coded.unpack)(columns, bits)[:, :rows].T

    return _tensor(layer, claims, (rows, cols), bits, places, packed, zeros)


def byte_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer whose codes are signed bytes.

    Raises `SourceError` if its parts do not match, or contradict the configuration.
    """
    stored = layer.part("weight", "weight", [I8], dims=max(2, len(layer.parts["weight"].shape)))
    if any(claim.value == _NIBBLES for claim in claims.all("quantization_bit")):
        return _nibbles(layer, layer.part("weight", "weight", [I8]), claims)
    claims.expect(stored.name, "codes of 8 bits", 8, "quantization_bit")
    if layer.has("weight_offset"):
        return _with_offset(layer, stored)

    def packed(start: int, stop: int) -> U8:
        return _rows(stored, start, stop).view(np.uint8) ^ np.uint8(0x80)

    def zeros(tensor: SourceTensor, groups: int) -> U8:
        return _byte_zeros(tensor, stored, groups, 8)

    return _tensor(layer, claims, stored.shape, 8, None, packed, zeros)


def _with_offset(layer: Layer, stored: SourceTensor) -> CodedTensor:
    """Return the weights of a layer of Ascend's tools: zero points are floats, and need not be those of any code."""
    matrix = Matrix.of(stored.shape)
    scale, groups = _scale(layer, stored.shape)
    offset = layer.part("weight_offset", "weight", coded.SCALES, dims=len(layer.parts["weight_offset"].shape))
    if prod(offset.shape) != prod(scale.shape) or matrix.cols % groups or 0 in offset.shape:
        raise coded.disagree(offset, scale)
    rows = "all" if prod(scale.shape) == 1 else 1
    cols = "all" if groups == 1 else matrix.cols // groups
    codec = Scaled(8, rows, cols, scale.dtype.name, offset.dtype.name, "sub", 1 << 7)  # type: ignore[arg-type]

    def load() -> Encode:
        return encode_with(codec, matrix, [coded.whole(scale), coded.whole(offset)], signed_codes(stored, matrix))

    return CodedTensor(stored.name, stored.shape, codec, load)


def _nibbles(layer: Layer, stored: SourceTensor, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of ChatGLM: signed codes of four bits, two to a byte, the first in its high half."""

    def packed(start: int, stop: int) -> U8:
        pairs = _rows(stored, start, stop).view(np.uint8)
        return ((pairs << np.uint8(4)) | (pairs >> np.uint8(4))) ^ np.uint8(0x88)

    def zeros(tensor: SourceTensor, groups: int) -> U8:  # noqa: ARG001  ChatGLM has none
        raise coded.disagree(tensor, stored)

    return _tensor(layer, claims, (stored.shape[0], 2 * stored.shape[1]), _NIBBLES, None, packed, zeros)


def _tensor(
    layer: Layer,
    claims: Claims,
    shape: tuple[int, ...],
    bits: Width,
    places: NDArray[Any] | None,
    packed: Callable[[int, int], U8],
    zeros: Callable[[SourceTensor, int], U8],
) -> CodedTensor:
    rows, cols = shape[0], prod(shape[1:])  # stacked matrices are rows
    scale, groups = _scale(layer, shape)
    named_by = scale.name if places is None else layer.named("weight_g_idx")
    length = _claimed_group(cols, groups, claims) if len(shape) == 2 else cols // groups if cols % groups == 0 else None
    columns = coded.grouping(named_by, cols, groups, length, places)
    _check_group(scale, columns, shape[-1], claims)
    offsets = layer.parts.get("weight_zero_point")
    if offsets is not None and 0 in offsets.shape:
        raise SourceError(f"tensor {offsets.name!r} has shape {list(offsets.shape)}: it has no elements")
    sym = offsets is None or bool((zeros(offsets, groups) == 1 << (bits - 1)).all())
    codec = coded.affine_codec(scale.name, bits, columns, sym=sym, scale=scale.dtype)

    def load() -> Encode:
        own = None if sym or offsets is None else zeros(offsets, groups)
        scales = np.broadcast_to(coded.whole(scale).reshape(-1, groups), (rows, groups))
        return coded.affine_encode(codec, (rows, cols), scales, own, columns.places, packed)

    return CodedTensor(layer.named("weight"), shape, codec, load)


def _check_claims(name: str, claims: Claims) -> None:
    if claims.method and claims.method.value != METHOD:
        raise contradiction(name, "compressed-tensors' layout", claims.method)
    for claim in claims.all("format"):
        if claim.value not in FORMATS:
            raise SourceError(f"tensor {name!r} cannot be read: {claim}, which is not known")


def _byte_zeros(tensor: SourceTensor, stored: SourceTensor, groups: int, bits: int) -> U8:
    """Return zero points that are signed bytes, for each row and group or for the tensor, in the range of the codes."""
    rows, stacked = stored.shape[0], stored.shape[:-1]
    each = rows * groups // prod(stacked)
    possible = [(), (1,), (1, 1), (rows, groups), (*stacked, each), *([stacked] if each == 1 else [])]
    if tensor.dtype is not I8 or tensor.shape not in possible:
        raise coded.disagree(tensor, stored)
    own = coded.whole(tensor).view(np.uint8) + np.uint8(1 << (bits - 1))
    return np.broadcast_to(own.reshape(-1, 1 if own.size == 1 else groups), (rows, groups))


def _rows(tensor: SourceTensor, start: int, stop: int) -> NDArray[Any]:
    cols = prod(tensor.shape[1:])
    return tensor.read(slice(start * cols, stop * cols)).data.reshape(stop - start, cols)


def _shape(stored: SourceTensor, shape: SourceTensor) -> tuple[int, int]:
    """Return rows and columns from ``weight_shape``."""
    values = coded.whole(shape).tolist()
    if len(values) != 2 or values[0] != stored.shape[0] or values[1] <= 0:
        raise SourceError(
            f"tensor {shape.name!r} says shape {values[:4]}, which does not fit {stored.name!r} of shape {list(stored.shape)}"
        )
    return values[0], values[1]


def _layout(stored: SourceTensor, cols: int, claims: Claims) -> tuple[Width, bool]:
    """Return the bits of a code, and whether packing is loose, with no code across two words, as in old versions."""
    words = stored.shape[1]
    claimed = {weights["num_bits"] for weights in claims.weights() if isinstance(weights.get("num_bits"), int)}
    dense = {bits for bits in range(1, _MAX_BITS + 1) if cuts(cols * bits, 32) == words}
    loose = {bits for bits in range(1, _MAX_BITS + 1) if cuts(cols, 32 // bits) == words}
    possible = dense | loose
    if not possible:
        raise SourceError(f"tensor {stored.name!r}: no number of bits puts {cols} columns into {words} words")
    known = [bits for bits in coded.WIDTHS if bits in possible]
    if claimed:
        if not claimed & possible:
            raise SourceError(
                f"tensor {stored.name!r}: {words} words for {cols} columns mean {_either(possible)} bits, but the configuration "
                f"says num_bits {_either(claimed)}; correct the one that is wrong"
            )
        known = [bits for bits in known if bits in claimed]
    if not known:
        raise SourceError(
            f"tensor {stored.name!r} has codes of {_either(claimed & possible or possible)} bits, but only 2, 3, 4 and 8 bits can "
            "be stored"
        )
    if len(known) > 1:
        raise SourceError(
            f"tensor {stored.name!r}: {cols} columns in {words} words may have {_either(set(known))} bits; set num_bits in "
            "config.json"
        )
    if known[0] in dense & loose and 32 % known[0] and cols > 32 // known[0]:
        raise SourceError(
            f"tensor {stored.name!r}: old and new versions pack {cols} columns into {words} words, each in its own way; give a "
            "checkpoint of the model as it was before quantization"
        )
    return known[0], known[0] not in dense


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _scale(layer: Layer, shape: tuple[int, ...]) -> tuple[SourceTensor, int]:
    """Return the scales, and the number of groups of columns."""
    rows = shape[0]
    dims = min(len(layer.parts["weight_scale"].shape), len(shape)) if layer.has("weight_scale") else 2
    scale = layer.part("weight_scale", "weight", coded.SCALES, dims=dims)
    if prod(scale.shape) == 1 or scale.shape == (rows,):
        return scale, 1
    if len(shape) > 2 and scale.shape == shape[:-1]:
        return scale, prod(shape[1:-1])
    if len(shape) > 2 and scale.shape[:-1] == shape[:-1]:
        return scale, prod(scale.shape[1:])
    if len(scale.shape) != 2 or scale.shape[0] != rows:
        raise SourceError(f"tensor {scale.name!r} has shape {list(scale.shape)}, which does not fit {rows} rows")
    return scale, scale.shape[1]


def _claimed_group(cols: int, groups: int, claims: Claims) -> int | None:
    return next((size for size in _group_sizes(claims) if cuts(cols, size) == groups), None)


def _group_sizes(claims: Claims) -> list[int]:
    sizes = [weights.get("group_size") for weights in claims.weights()]
    return [size for size in sizes if isinstance(size, int) and size > 0]


def _check_group(scale: SourceTensor, columns: Grouping, cols: int, claims: Claims) -> None:
    """Compare the length of groups with the configuration, if every group of layers there has one."""
    every = claims.weights()
    sizes = _group_sizes(claims)
    if every and len(sizes) == len(every) and columns.size not in (*sizes, "row" if max(sizes) >= cols else None):
        raise SourceError(
            f"tensor {scale.name!r}: its shape means groups of {columns.size}, but the configuration says group_size "
            f"{_either(set(sizes))}; correct the one that is wrong"
        )
