"""torchao's tensors in safetensors files: each is stored as several tensors, which the header of the file describes.

The tensor ``a.weight`` is stored as ``a._weight_qdata``, ``a._weight_scale`` and so on; the header has an object under its name
with the class and its attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qformat.codecs.layout import Matrix
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import CodedTensor, Encode
from qformat.converters.quantized.integers import (
    I8,
    UnreadableLayerError,
    bytes_tensor,
    encode_with,
    in_short,
    packing,
)
from qformat.converters.quantized.layer import Found, Layer
from qformat.converters.quantized.tinygemm import tinygemm_tensor
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

_DATA = "_qdata"
ROLES = ("_*_qdata", "_*_scale", "_*_zero_point", "_*_scale_and_zero", "_*_act_quant_scale", "_*_act_quant_zero_point")

_F8 = (DTYPES["f8_e4m3"], DTYPES["f8_e5m2"])
_NIBBLE = 15
# The shape and size of groups, and how a program computes with the tensor and quantizes what it is multiplied by
_ATTRIBUTES = frozenset(
    {"block_size", "shape", "dtype", "target_dtype", "mm_config", "kernel_preference", "activation_quantization"}
    | {"act_quant_kwargs", "activation_dtype", "reduce_range", "hp_value_lb", "hp_value_ub", "ntile_size"}
)


@dataclass(frozen=True)
class _Stored:
    """The parts of a tensor, by what follows its name, and its attributes."""

    layer: Layer
    name: str
    kind: str
    parts: Mapping[str, SourceTensor]
    attributes: Mapping[str, Any]

    def part(self, key: str, dtypes: Sequence[Any], dims: Sequence[int] = (2, 3)) -> SourceTensor:
        part = self.parts.get(key)
        if part is None:
            raise SourceError(f"tensor {self.name!r} is stored without its {key}; give the whole checkpoint")
        if part.dtype not in dtypes or len(part.shape) not in dims or 0 in part.shape:
            raise SourceError(
                f"tensor {part.name!r} is {part.dtype.name} of shape {list(part.shape)}, which no {self.kind} has"
            )
        return part

    def shape(self, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the header, which may be less than what is stored only where that is padded."""
        given = self.attributes.get("shape", list(expected))
        if not isinstance(given, list) or not all(type(size) is int and size > 0 for size in given):
            raise SourceError(f"tensor {self.name!r}: the header has an impossible shape")
        return tuple(given)

    @property
    def block(self) -> list[int]:
        """The size of groups in each dimension."""
        block = self.attributes.get("block_size")
        return block if isinstance(block, list) and all(type(size) is int for size in block) else []


def is_torchao(layer: Layer) -> bool:
    """Return whether a layer has a tensor that is stored as several."""
    return any(role.startswith("_") and role.endswith(_DATA) for role in layer.parts)


def torchao_tensors(layers: Sequence[Layer], claims: Claims) -> Found:
    """Return the tensors of all layers whose class is known and that have nothing which changes what they mean."""
    tensors, replaced, warnings = [], set(), []
    for layer in layers:
        for role in [role for role in layer.parts if role.startswith("_") and role.endswith(_DATA)]:
            try:
                stored = _stored(layer, role, claims)
                tensors.append(_KINDS[stored.kind](stored))
                replaced |= {part.name for part in stored.parts.values()}
            except UnreadableLayerError as error:
                warnings.append(str(error))
    return Found(tensors, replaced, in_short(warnings))


def _stored(layer: Layer, role: str, claims: Claims) -> _Stored:
    """Return the parts and attributes of a tensor."""
    stem = role.removesuffix(_DATA)
    name = layer.named(stem[1:])
    parts = {key[len(stem) + 1 :]: part for key, part in layer.parts.items() if key.startswith(f"{stem}_")}
    try:
        description = json.loads(claims.metadata.get(name, "null"))
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("_data"), dict):
        raise UnreadableLayerError(
            f"tensor {name!r} is stored as torchao's are, but the header does not say how: kept as it is"
        )
    kind = str(description.get("_type"))
    if kind not in _KINDS:
        raise UnreadableLayerError(f"tensor {name!r} is torchao's {kind[:40]}, which cannot be read: kept as it is")
    unknown = sorted(key for key, value in description["_data"].items() if key not in _ATTRIBUTES and value is not None)
    if unknown:
        raise UnreadableLayerError(
            f"tensor {name!r} of torchao has an attribute {unknown[0][:40]!r} that is not known: kept as it is"
        )
    if "act_pre_scale" in parts:
        raise UnreadableLayerError(
            f"tensor {name!r} of torchao expects inputs scaled by {parts['act_pre_scale'].name!r}: kept as it is"
        )
    return _Stored(layer, name, kind, parts, description["_data"])


def _bytes(stored: _Stored) -> CodedTensor:
    """Return a tensor of bytes with scales, and maybe zero points, in any groups of a row."""
    codes = stored.part("qdata", _F8 if stored.kind == "Float8Tensor" else [I8], (1, 2, 3))
    scale = stored.part("scale", coded.SCALES, range(4))
    if _is_by_column(codes, scale):
        raise UnreadableLayerError(f"tensor {stored.name!r} of torchao has scales in blocks of rows: kept as it is")
    block = stored.block
    if len(block) == 2 and block[0] != 1 and prod(scale.shape) > 1:
        raise UnreadableLayerError(f"tensor {stored.name!r} of torchao has scales in blocks of rows: kept as it is")
    groups = (
        prod(codes.shape) // prod(block) if len(block) == len(codes.shape) and all(size > 0 for size in block) else 0
    )
    if block and groups != prod(scale.shape):
        raise coded.disagree(scale, codes)
    zeros = stored.parts.get("zero_point")
    return bytes_tensor(stored.layer, stored.name, codes, scale, zeros)


def _is_by_column(codes: SourceTensor, scale: SourceTensor) -> bool:
    """Return whether rows share scales that columns do not, or stacked matrices have scales for each row."""
    if prod(scale.shape) == 1:
        return False
    return len(codes.shape) != 2 or len(scale.shape) not in (1, 2) or scale.shape[0] != codes.shape[0]


def _int4(stored: _Stored) -> CodedTensor:
    """Return a tensor of signed codes, two to a byte, the low half first, with transposed scales and zeros that are added."""
    codes = stored.part("qdata", [I8, DTYPES["u8"]])
    scale, zero = (stored.part(key, coded.SCALES) for key in ("scale", "zero_point"))
    *lead, rows, half = codes.shape
    groups, cols = scale.shape[-2], 2 * half
    shape = (*lead, rows, cols)
    if scale.shape != (*lead, groups, rows) or cols % groups or stored.shape(shape) != shape:
        raise coded.disagree(scale, codes)
    if zero.shape != scale.shape:
        raise coded.disagree(zero, scale)
    if stored.block and stored.block[-1] != cols // groups:
        raise SourceError(
            f"tensor {scale.name!r} has {groups} groups of {cols} columns, but the header says {stored.block[-1]}"
        )
    codec = Scaled(4, 1, cols // groups, scale.dtype.name, zero.dtype.name, "add", 8)  # type: ignore[arg-type]
    matrix = Matrix.of(shape)

    def load() -> Encode:
        numbers = [np.swapaxes(coded.whole(part), -1, -2) for part in (scale, zero)]
        data = coded.whole(codes).view(np.uint8).reshape(matrix.rows, -1)
        each = np.stack([data & np.uint8(_NIBBLE), data >> np.uint8(4)], axis=2) ^ np.uint8(8)
        return encode_with(codec, matrix, numbers, packing(each.reshape(matrix.rows, matrix.cols), 4))

    return CodedTensor(stored.name, shape, codec, load)


def _tiles(stored: _Stored) -> CodedTensor:
    """Return a tensor in the layout of torch's int4 kernels."""
    codes = stored.part("qdata", [coded.I32], (4,))
    numbers = stored.part("scale_and_zero", coded.SCALES, (3,))
    padded = (8 * codes.shape[0], 32 * codes.shape[1] * codes.shape[3])
    shape = stored.shape(padded)
    if len(shape) != 2:
        raise SourceError(f"tensor {stored.name!r}: the header has an impossible shape")
    return tinygemm_tensor(
        stored.name, codes, numbers, (shape[0], shape[1]), stored.block[-1] if stored.block else None
    )


_KINDS: dict[str, Callable[[_Stored], CodedTensor]] = {
    "Float8Tensor": _bytes,
    "Int8Tensor": _bytes,
    "IntxUnpackedToInt8Tensor": _bytes,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiles,
}
