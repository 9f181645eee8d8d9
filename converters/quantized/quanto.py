"""optimum-quanto: ``weight._data`` and ``weight._scale``; below eight bits packed ``weight._data._data``, and ``weight._shift``.

Bytes are multiplied by the scale of their row. Codes of 2 and 4 bits are a matrix of a row for each group; rows that are far apart
share a byte. A value is code × scale − shift with float shifts, (code − shift) × scale with integer ones. The shape of the weight
is not stored: groups are those that quanto chooses, and the number of rows comes from the bias or from the model's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Matrix
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode
from qformat.converters.quantized.integers import I8, UnreadableLayerError, bytes_tensor, encode_with, packing
from qformat.converters.quantized.layer import Layer
from qformat.dtypes import DTYPES, DType
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

_DATA, _PACKED, _SCALE, _SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
ROLES = (_DATA, _SCALE)
PACKED_ROLES = (_PACKED, _SCALE, _SHIFT)

_BYTES = (I8, DTYPES["f8_e4m3"], DTYPES["f8_e5m2"])
_INTEGERS = tuple(DTYPES[name] for name in ("i8", "u8", "i16", "i32", "i64"))
_GROUPS = (128, 96, 64, 32)  # in the order of preference
# Names of layers, and the key of config.json with the columns of their weights; for head_dim, times the number of heads
_COLUMNS = (
    (("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head"), "hidden_size"),
    (("o_proj",), "head_dim"),
    (("down_proj",), "intermediate_size"),
)
_BITS = {"qint2": 2, "qint4": 4}


def is_quanto(layer: Layer) -> bool:
    """Return whether a layer has bytes as quanto stores them."""
    return layer.has(*ROLES)


def quanto_tensor(layer: Layer, claims: Claims) -> CodedTensor:  # noqa: ARG001  shapes say all
    """Return the weights of a layer of bytes."""
    data, scale = layer.parts[_DATA], layer.parts[_SCALE]
    if data.dtype not in _BYTES or 0 in data.shape or not data.shape:
        raise SourceError(
            f"tensor {data.name!r} is {data.dtype.name} of shape {list(data.shape)}, which quanto has not"
        )
    if prod(scale.shape) > 1 and scale.shape[0] != data.shape[0]:
        raise UnreadableLayerError(f"layer {layer.name!r} of quanto has scales for columns: kept as it is")
    return bytes_tensor(layer, layer.named("weight"), data, scale)


def is_packed(layer: Layer) -> bool:
    """Return whether a layer has packed codes as quanto stores them."""
    return layer.has(*PACKED_ROLES)


def packed_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of packed codes; raise `SourceError` if its parts do not match."""
    data, scale, shift = (layer.parts[role] for role in PACKED_ROLES)
    if data.dtype is not DTYPES["u8"] or len(data.shape) < 2 or 0 in data.shape:
        raise SourceError(
            f"tensor {data.name!r} is {data.dtype.name} of shape {list(data.shape)}, which quanto has not"
        )
    if scale.dtype not in coded.SCALES or shift.dtype not in (*coded.SCALES, *_INTEGERS):
        raise SourceError(
            f"layer {layer.name!r} has {scale.dtype.name} scales and {shift.dtype.name} shifts, which quanto has not"
        )
    if not scale.shape or 0 in scale.shape or any(size != 1 for size in scale.shape[1:]):
        raise UnreadableLayerError(f"layer {layer.name!r} of quanto has scales for columns: kept as it is")
    if shift.shape != scale.shape:
        raise coded.disagree(shift, scale)
    groups, width = scale.shape[0], prod(data.shape[1:])
    bits = _bits(layer, data, groups, claims)
    shape = (groups, *data.shape[1:]) if len(data.shape) > 2 else _shape(layer, groups, width, claims)
    floating = shift.dtype.floating
    zero, form = (shift.dtype.name, "add") if floating else ("f16", "sub")
    codec = Scaled(bits, 1, width, scale.dtype.name, zero, form)  # type: ignore[arg-type]
    matrix = Matrix.of(shape)

    def load() -> Encode:
        shifts = coded.whole(shift)
        zeros = _negated(shifts, shift.dtype) if floating else shifts.astype(np.float16)
        codes = _unpack(coded.whole(data).reshape(-1, width), bits)[:groups].reshape(matrix.rows, matrix.cols)
        return encode_with(codec, matrix, [coded.whole(scale), zeros], packing(codes, bits))

    return CodedTensor(layer.named("weight"), shape, codec, load)


def _unpack(data: U8, bits: int) -> U8:
    """Return the codes of a packed matrix: those of a byte, the lowest first, are as far apart as there are rows of bytes."""
    mask = np.uint8((1 << bits) - 1)
    return np.concatenate([(data >> np.uint8(shift)) & mask for shift in range(0, 8, bits)])


def _negated(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Return floats, in the storage of a dtype, with the other sign."""
    patterns = values.view(f"u{dtype.size}")
    negated: NDArray[Any] = patterns ^ patterns.dtype.type(1 << (8 * dtype.size - 1))
    return negated


def _bits(layer: Layer, data: SourceTensor, groups: int, claims: Claims) -> int:
    """Return the bits of a code, by the number of rows of bytes; if both are possible, as quanto_qmap.json says."""
    possible = [bits for bits in (2, 4) if -(-groups * bits // 8) == data.shape[0]]
    for claim in claims.all(layer.name):
        said = _BITS.get(str(claim.value.get("weights"))) if isinstance(claim.value, Mapping) else None
        if said:
            possible = [bits for bits in possible if bits == said]
            break
    if not possible:
        raise coded.disagree(data, layer.parts[_SCALE])
    if len(possible) > 1:
        raise UnreadableLayerError(
            f"layer {layer.name!r} of quanto may have 2 or 4 bits, and no quanto_qmap.json says which: kept as it is"
        )
    return possible[0]


def _shape(layer: Layer, groups: int, width: int, claims: Claims) -> tuple[int, int]:
    """Return rows and columns of a weight, of which `groups` groups of `width` columns are stored."""
    possible = {groups // each: each * width for each in range(1, groups + 1) if groups % each == 0}
    possible = {rows: cols for rows, cols in possible.items() if _chosen_group(cols) == width}
    bias = layer.parts.get("bias")
    if len(possible) > 1 and bias is not None and len(bias.shape) == 1:
        possible = {rows: cols for rows, cols in possible.items() if rows == bias.shape[0]}
    if len(possible) > 1:
        known = _columns(layer.name, claims.config)
        possible = {rows: cols for rows, cols in possible.items() if cols == known}
    if len(possible) != 1:
        raise UnreadableLayerError(
            f"layer {layer.name!r} of quanto: neither a bias nor config.json tells the shape of its weight: kept as it is"
        )
    ((rows, cols),) = possible.items()
    return rows, cols


def _columns(name: str, config: Mapping[str, Any]) -> int:
    """Return the columns of a weight by its name, in a language model of the usual structure; 0 if they are not known."""
    last = name.rpartition(".")[2]
    for names, size in _COLUMNS:
        if last in names:
            found = config.get(size)
            if size == "head_dim" and found is None and config.get("num_attention_heads"):
                return _product(config, "hidden_size")
            return _product(config, size, *(["num_attention_heads"] if size == "head_dim" else []))
    return 0


def _product(config: Mapping[str, Any], *keys: str) -> int:
    values = [config.get(key) for key in keys]
    return prod(value if type(value) is int and value > 0 else 0 for value in values)


def _chosen_group(cols: int) -> int:
    """Return the columns of a group that quanto chooses for rows of some columns."""
    chosen = next((size for size in _GROUPS if cols % size == 0), 0)
    return chosen if cols > _GROUPS[0] and chosen else cols
