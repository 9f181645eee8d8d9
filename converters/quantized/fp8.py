"""Eight-bit floats with scales for a tensor, for each row, or for blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np

from qformat.codecs.fp8 import Fp8
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.codecs.packed import cuts
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import SCALES, CodedTensor, Encode, as_bytes, whole
from qformat.converters.quantized.layer import Found, Layer
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

Extent = int | Literal["all"]

E4M3, E5M2 = DTYPES["f8_e4m3"], DTYPES["f8_e5m2"]
FORMATS: Mapping[Any, Literal["e4m3", "e5m2"]] = {E4M3: "e4m3", E5M2: "e5m2"}
ROLES = ("weight", "weight_zero_point", "*_scale", "*_scale_inv", "scale")
# what the names of scales append to that of the tensor; values are multiplied by either
_SUFFIXES = ("_scale", "_scale_inv")
_USUAL = 128  # rows and columns of a block, if the configuration does not say


def is_fp8(layer: Layer) -> bool:
    """Return whether a layer has tensors of eight-bit floats."""
    return any(tensor.dtype in FORMATS for tensor in layer.parts.values())


def fp8_tensors(layers: Sequence[Layer], claims: Claims) -> Found:
    """Return the tensors of eight-bit floats that have scales, of all layers.

    Raises `SourceError` if scales do not match, or contradict the configuration.
    """
    tensors, replaced, left = [], set(), []
    for layer in layers:
        for role, codes in layer.parts.items():
            scale = _scale_of(layer, role) if codes.dtype in FORMATS else None
            if scale is None or 0 in codes.shape:
                continue
            if len(codes.shape) > 2 and prod(scale.shape) > 1:
                left.append(codes.name)
                continue
            offset = layer.parts.get(f"{role}_zero_point")
            if offset is not None and any(as_bytes(whole(offset))):
                raise SourceError(f"tensor {offset.name!r} is not zero, but eight-bit floats have no zero points")
            replaced |= {codes.name, scale.name, *([offset.name] if offset else [])}
            tensors.append(_tensor(codes, scale, claims))
    warnings = []
    if left:
        warnings.append(
            f"tensor {left[0]!r}{and_more(left)} of eight-bit floats has three dimensions: kept as it is, beside its scales, if no "
            "type is given"
        )
    return Found(tensors, replaced, warnings)


def _scale_of(layer: Layer, role: str) -> SourceTensor | None:
    names = [role + suffix for suffix in _SUFFIXES]
    if role == "weight":
        names.append("scale")  # in DeepSeek's own code
    scales = [layer.parts[name] for name in names if name in layer.parts]
    if len(scales) > 1:
        raise SourceError(
            f"tensor {layer.named(role)!r} has both {scales[0].name!r} and {scales[1].name!r}; remove one"
        )
    return scales[0] if scales else None


def _tensor(codes: SourceTensor, scale: SourceTensor, claims: Claims) -> CodedTensor:
    meaning = claims.get("weight_scale_semantics")
    if meaning:  # GPTQModel's, which divides by them; rounding 1 / scale first would change values
        raise SourceError(
            f"tensor {codes.name!r} cannot be stored: {meaning}, but scales must be factors; use the model as it was before "
            "quantization"
        )
    if scale.dtype is DTYPES["u8"]:
        raise SourceError(
            f"tensor {codes.name!r} is in the format mxfp8 (scales {scale.name!r} are exponents), which cannot be read; use the "
            "model as it was before quantization"
        )
    if scale.dtype not in SCALES:
        raise SourceError(f"tensor {scale.name!r} is of dtype {scale.dtype.name}, where f16, bf16 or f32 is needed")
    shape = tuple(codes.shape)
    matrix = Matrix.of(shape)
    rows, cols = _blocks(codes, scale, matrix, claims)
    codec = Fp8(FORMATS[codes.dtype], rows, cols, scale.dtype.name)  # type: ignore[arg-type]

    def load() -> Encode:
        numbers = [as_bytes(whole(scale))]
        if isinstance(rows, int) and rows > 1:
            numbers.append(as_bytes(np.arange(matrix.rows, dtype="<u4") // np.uint32(rows)))

        def encode(chunk: Chunk) -> tuple[Buffer, ...]:
            *places, _ = spans(codec.layout(matrix), matrix, chunk)
            own = (number[span] for number, span in zip(numbers, places, strict=True))
            return (*own, as_bytes(codes.read(chunk.elements(matrix)).data))

        return encode

    return CodedTensor(codes.name, shape, codec, load)


def _blocks(codes: SourceTensor, scale: SourceTensor, matrix: Matrix, claims: Claims) -> tuple[Extent, Extent]:
    """Return the numbers of rows and columns that share a scale."""
    sizes = (matrix.rows, matrix.cols)
    given = scale.shape
    claimed = list(_claimed(claims))
    if prod(given) == 1:
        counts = (1, 1)
    elif len(given) == 1 and given[0] == matrix.rows:
        counts = (matrix.rows, 1)
    elif len(given) == 2 and len(codes.shape) == 2:
        counts = given
    else:
        raise _unfit(codes, scale, "")
    whole_blocks = [claim for claim in claimed if tuple(map(cuts, sizes, claim)) == counts]
    if claims.get("weight_block_size") and claimed and not whole_blocks:
        wanted = "x".join(map(str, claimed[0]))
        raise _unfit(codes, scale, f" in blocks of {wanted}, the weight_block_size of the configuration")
    block = whole_blocks[0] if whole_blocks else (_USUAL, _USUAL)
    rows, cols = map(_extent, sizes, counts, block)
    if not rows or not cols:
        raise _unfit(codes, scale, "; if it has blocks, set weight_block_size in config.json")
    return rows, cols


def _extent(size: int, count: int, usual: int) -> Extent | None:
    """Return the number of rows or columns that share a scale, of `size` with `count` scales; None if it is unknown."""
    if count == 1:
        return "all"
    if count == size:
        return 1
    return usual if cuts(size, usual) == count else None


def _unfit(codes: SourceTensor, scale: SourceTensor, more: str) -> SourceError:
    return SourceError(
        f"tensor {scale.name!r} of shape {list(scale.shape)} does not fit {codes.name!r} of shape {list(codes.shape)}{more}"
    )


def _claimed(claims: Claims) -> list[tuple[int, int]]:
    """Return the blocks in the configuration, written as ``[128, 128]`` or ``128x128``."""
    found: list[Any] = [claim.value for claim in claims.all("weight_block_size")]
    found += [weights.get("block_structure") for weights in claims.weights()]
    blocks = []
    for value in found:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,7}x[0-9]{1,7}", value):
            value = [int(number) for number in value.split("x")]  # noqa: PLW2901
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n <= 1 << 20 for n in value):
            blocks.append((value[0], value[1]))
    return blocks
