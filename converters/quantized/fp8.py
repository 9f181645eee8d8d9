"""Eight-bit floats with scales for a tensor, for each row, or for blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import gcd, prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.fp8 import Fp8
from qformat.codecs.layout import Buffer, Chunk, Matrix, spans
from qformat.codecs.packed import cuts
from qformat.converters.quantized import comfy
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import SCALES, CodedTensor, Encode, as_bytes, whole
from qformat.converters.quantized.layer import Found, Layer
from qformat.dtypes import BF16, DTYPES, Elements
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

Extent = int | Literal["all"]

E4M3, E5M2 = DTYPES["f8_e4m3"], DTYPES["f8_e5m2"]
FORMATS: Mapping[Any, Literal["e4m3", "e5m2"]] = {E4M3: "e4m3", E5M2: "e5m2"}
#: the parts of a layer; the scales of outputs and inputs are for others to judge
ROLES = (
    "weight",
    "weight_zero_point",
    "weight_scale",
    "weight_scale_inv",
    "scale",
    "scale_weight",
    "qscale_weight",
    "weights_scaling_factor",
    "comfy_quant",
    "input_scale_ub",
)
# In these spellings scales are factors of the codes: of transformers, DeepSeek, ComfyUI, Mistral, TensorRT-LLM
_SCALES = ("weight_scale", "weight_scale_inv", "scale", "scale_weight", "qscale_weight", "weights_scaling_factor")
_EXPONENTS = (DTYPES["u8"], DTYPES["f8_e8m0"])  # of two
_USUAL = 128  # rows and columns of a block, if the configuration does not say
MX_GROUP = 32  # columns that share a power of two as scale, in the OCP's formats
_LEAST = 16  # of a block that no file states
# ComfyUI's marker of a file, whose dtype is that of its weights
_MARKER = "scaled_fp8"
_COMFY = ("float8_e4m3fn", "float8_e5m2", "mxfp8")


def is_fp8(layer: Layer) -> bool:
    """Return whether a layer has weights in eight-bit floats, or is ComfyUI's marker of such a file."""
    weight = layer.parts.get("weight")
    return _MARKER in layer.parts or (weight is not None and weight.dtype in FORMATS)


def fp8_tensors(layers: Sequence[Layer], claims: Claims) -> Found:
    """Return the weights in eight-bit floats that have scales, of all layers.

    Layers whose scales have no known place are left out. Raises `SourceError` if scales do not match, or contradict the
    configuration.
    """
    tensors, replaced = [], set()
    for layer in layers:
        if "weight" in layer.parts and layer.parts["weight"].dtype in FORMATS:
            tensor = _layer(layer, claims.about(layer.name))
            if tensor is not None:
                tensors.append(tensor)
                replaced |= layer.names(ROLES)
    if tensors:
        replaced |= {name for layer in layers for name in layer.names([_MARKER])}
    return Found(tensors, replaced)


def _layer(layer: Layer, claims: Claims) -> CodedTensor | None:
    """Return the weights of a layer; None if it has no scales, or none whose place is known."""
    codes = layer.parts["weight"]
    scales = [layer.parts[name] for name in _SCALES if name in layer.parts]
    if len(scales) > 1:
        raise SourceError(f"tensor {codes.name!r} has both {scales[0].name!r} and {scales[1].name!r}; remove one")
    form = comfy.form_of(layer, claims)
    if not scales or 0 in codes.shape or form not in ("", *_COMFY):
        return None
    offset = layer.parts.get("weight_zero_point")
    if offset is not None and any(as_bytes(whole(offset))):
        raise SourceError(f"tensor {offset.name!r} is not zero, but eight-bit floats have no zero points")
    return _tensor(codes, scales[0], claims, swizzled=form == "mxfp8")


class _Places(NamedTuple):
    """Where the scales of a tensor belong.

    Attributes
    ----------
    rows, cols
        The parameters of the codec.
    expanded
        Makes the scales of the codec from those of the source, whose elements it takes in their shape; None if they are the same.
    """

    rows: Extent
    cols: Extent
    expanded: Callable[[NDArray[Any]], NDArray[Any]] | None = None


def _tensor(codes: SourceTensor, scale: SourceTensor, claims: Claims, *, swizzled: bool) -> CodedTensor | None:
    meaning = claims.get("weight_scale_semantics")
    if meaning:  # GPTQModel's, which divides by them; rounding 1 / scale first would change values
        raise SourceError(
            f"tensor {codes.name!r} cannot be stored: {meaning}, but scales must be factors; use the model as it was before "
            "quantization"
        )
    if scale.dtype not in (*SCALES, *_EXPONENTS):
        raise SourceError(f"tensor {scale.name!r} is of dtype {scale.dtype.name}, where f16, bf16 or f32 is needed")
    shape = tuple(codes.shape)
    matrix = Matrix.of(shape)
    places = _swizzled(codes, scale) if swizzled else _places(codes, scale, matrix, claims)
    if places is None:
        return None
    rows, cols, expanded = places
    stored = BF16 if scale.dtype in _EXPONENTS else scale.dtype  # which holds every power
    codec = Fp8(FORMATS[codes.dtype], rows, cols, stored.name)  # type: ignore[arg-type]

    def load() -> Encode:
        scales = whole(scale)
        if scale.dtype in _EXPONENTS:
            scales = Elements(DTYPES["f8_e8m0"], scales).cast(BF16)
        numbers = [as_bytes(expanded(scales) if expanded else scales)]
        if isinstance(rows, int) and rows > 1:
            numbers.append(as_bytes(np.arange(matrix.rows, dtype="<u4") // np.uint32(rows)))

        def encode(chunk: Chunk) -> tuple[Buffer, ...]:
            *places, _ = spans(codec.layout(matrix), matrix, chunk)
            own = (number[span] for number, span in zip(numbers, places, strict=True))
            return (*own, as_bytes(codes.read(chunk.elements(matrix)).data))

        return encode

    return CodedTensor(codes.name, shape, codec, load)


def _places(codes: SourceTensor, scale: SourceTensor, matrix: Matrix, claims: Claims) -> _Places | None:
    """Return where scales belong; None if that is unknown for tensors of more than two dimensions."""
    given = tuple(scale.shape)
    if 0 in given:
        raise _unfit(codes, scale, "")
    if len(codes.shape) == 3 and len(given) == 3 and prod(given) > given[0]:
        return _stacked(codes, scale, claims)
    if len(given) == 3 and given[0] == matrix.rows and given[2] == 1 and len(codes.shape) == 2:
        # rows are cut into as many parts of the same length
        if matrix.cols % given[1]:
            raise _unfit(codes, scale, "")
        return _Places(1, matrix.cols // given[1])
    if prod(given) == 1:
        counts = (1, 1)
    elif given[0] == prod(given) == matrix.rows:
        counts = (matrix.rows, 1)
    elif len(given) == len(codes.shape) == 2:
        counts = given
    elif len(codes.shape) > 2:
        return _Places(1, codes.shape[2]) if given == codes.shape[:2] and len(codes.shape) == 3 else None
    else:
        raise _unfit(codes, scale, "")
    rows, cols = _extents(codes, scale, (matrix.rows, matrix.cols), counts, claims)
    return _Places(rows, cols)


def _extents(
    codes: SourceTensor, scale: SourceTensor, sizes: tuple[int, int], counts: tuple[int, ...], claims: Claims
) -> tuple[Extent, Extent]:
    """Return the numbers of rows and columns that share a scale, of a matrix with a matrix of scales."""
    claimed = list(_claimed(claims))
    whole_blocks = [claim for claim in claimed if tuple(map(cuts, sizes, claim)) == counts]
    if claims.get("weight_block_size") and claimed and not whole_blocks:
        wanted = "x".join(map(str, claimed[0]))
        raise _unfit(codes, scale, f" in blocks of {wanted}, the weight_block_size of the configuration")
    block = whole_blocks[0] if whole_blocks else (_USUAL, _USUAL)
    length, rest = divmod(sizes[1], counts[1])
    if (
        not whole_blocks
        and counts[1] > 1
        and counts[0] == sizes[0]
        and not rest
        and length < _USUAL
        and cuts(sizes[1], _USUAL) == counts[1]
    ):
        raise _unfit(
            codes, scale, f" in groups of one length: of {length} or of {_USUAL}; set group_size in config.json"
        )
    if not whole_blocks and scale.dtype in _EXPONENTS and counts == (sizes[0], cuts(sizes[1], MX_GROUP)):
        block = (1, MX_GROUP)
    rows, cols = map(_extent, sizes, counts, block)
    if not rows or not cols:
        raise _unfit(codes, scale, "; if it has blocks, set weight_block_size in config.json")
    return rows, cols


def _swizzled(codes: SourceTensor, scale: SourceTensor) -> _Places:
    """Return the places of ComfyUI's scales for 32 columns, which are stored as the tensor cores read them."""
    rows, groups = codes.shape[0], cuts(codes.shape[-1], MX_GROUP)
    if len(codes.shape) != 2 or codes.shape[1] % MX_GROUP or scale.shape != comfy.swizzled_shape(rows, groups):
        raise _unfit(codes, scale, "")
    return _Places(1, MX_GROUP, lambda scales: comfy.unswizzled(scales, rows, groups))


def _stacked(codes: SourceTensor, scale: SourceTensor, claims: Claims) -> _Places | None:
    """Return the places of scales of stacked matrices: for each matrix the scales of its rows, or of its blocks.

    In the codec a matrix is one row, in which groups have a fixed length: scales are repeated for each row of a block.
    """
    number, height, width = codes.shape
    given = tuple(scale.shape)
    if given == (number, height, 1):
        return _Places(1, width)
    if given[0] != number or (
        given[1] == 1 and given[2] == width
    ):  # with one for each column, there would be as many as codes
        return None
    rows, cols = _extents(codes, scale, (height, width), given[1:], claims)
    across = width if cols == "all" else cols
    group = gcd(across, width)
    down = np.arange(height) // (height if rows == "all" else rows)
    along = np.arange(0, width, group) // across
    return _Places(1, group, lambda scales: scales[:, down[:, None], along])


def _extent(size: int, count: int, usual: int) -> Extent | None:
    """Return the number of rows or columns that share a scale, of `size` with `count` scales; None if it is unknown."""
    if count == 1:
        return "all"
    if count == size:
        return 1
    if cuts(size, usual) == count:
        return usual
    length, rest = divmod(size, count)
    # parts of the same length, a power of two: no other cut has this many that any tool makes
    return length if not rest and length >= _LEAST and not length & (length - 1) else None


def _unfit(codes: SourceTensor, scale: SourceTensor, more: str) -> SourceError:
    return SourceError(
        f"tensor {scale.name!r} of shape {list(scale.shape)} does not fit {codes.name!r} of shape {list(codes.shape)}{more}"
    )


def _claimed(claims: Claims) -> list[tuple[int, int]]:
    """Return the blocks in the configuration, written as ``[128, 128]`` or ``128x128``."""
    found: list[Any] = [claim.value for claim in claims.all("weight_block_size")]
    for weights in claims.weights():
        size = weights.get("group_size")
        found += [
            weights.get("block_structure"),
            [1, size] if weights.get("strategy") in ("group", None) and size else None,
        ]
    blocks = []
    for value in found:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,7}x[0-9]{1,7}", value):
            value = [int(number) for number in value.split("x")]  # noqa: PLW2901
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n <= 1 << 20 for n in value):
            blocks.append((value[0], value[1]))
    return blocks
