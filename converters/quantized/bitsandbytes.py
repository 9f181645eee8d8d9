"""Layers of bitsandbytes: four-bit codes of a table (NF4, FP4), whose scales may be quantized too, and LLM.int8.

``weight``, ``weight.absmax``, ``weight.quant_map``, maybe ``weight.nested_absmax`` and ``weight.nested_quant_map``, and a JSON
object in the bytes of ``weight.quant_state.bitsandbytes__nf4`` or ``…fp4``; or ``weight``, ``SCB`` and maybe ``weight_format``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.codebook import Codebook
from qformat.codecs.layout import Chunk, Matrix
from qformat.codecs.packed import LONGEST, cuts
from qformat.converters.quantized.claims import Claims, contradiction
from qformat.converters.quantized.coded import U8, CodedTensor, disagree, whole
from qformat.converters.quantized.layer import Layer
from qformat.converters.quantized.tables import nibbles, table_tensor
from qformat.dtypes import DTYPES, F32
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
ROLES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"{_STATE}nf4",
    f"{_STATE}fp4",
)
INT8_ROLES = ("weight", "SCB", "weight_format")
_I8, _U8 = DTYPES["i8"], DTYPES["u8"]
_LONGEST = 1 << 16  # bytes of a state

_THIRD = np.float32(1 / 3)
_FP4 = np.array([0, _THIRD / 64, 2 * _THIRD, 1, _THIRD, 0.5, _THIRD / 2, 0.25], np.float32)
# What the tool's kernels decode with, whatever the map in a file says; it has 0 where they give -0
_TABLES = {
    "nf4": np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    ),
    "fp4": np.concatenate([_FP4, -_FP4]),
}
_KEYS = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
_FACTOR = np.array([7.874015718698502e-3], np.float32)  # the tool's 1 / 127


def is_four_bit(layer: Layer) -> bool:
    """Return whether a layer has the state of four-bit codes."""
    return any(layer.has("weight", _STATE + kind) for kind in _TABLES)


def is_int8(layer: Layer) -> bool:
    """Return whether a layer is LLM.int8's."""
    return layer.has("weight", "SCB") and layer.parts["weight"].dtype is _I8


class _State(NamedTuple):
    """The state of four-bit codes.

    Attributes
    ----------
    kind, shape
        The table, and the shape of the weights.
    block
        Weights that share a scale.
    nested, offset
        Scales that share a scale, and the number that is added to them; 0 if scales are not quantized.
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    nested: int
    offset: float


def four_bit_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer; raise `SourceError` if its parts do not match, or contradict the configuration."""
    _check_method(layer, claims)
    kinds = [kind for kind in _TABLES if _STATE + kind in layer.parts]
    if len(kinds) > 1:
        raise SourceError(f"tensor {layer.named('weight')!r} has both {' and '.join(kinds)} states; remove one")
    state = _state(layer, kinds[0])
    _expect_kind(layer, state, claims)
    weight, matrix = layer.parts["weight"], Matrix.of(state.shape)
    if prod(weight.shape) * weight.dtype.size != cuts(matrix.elements, 2):
        raise SourceError(
            f"tensor {weight.name!r} of {prod(weight.shape) * weight.dtype.size} bytes does not hold the codes of shape "
            f"{list(state.shape)} that its state says"
        )
    table = _TABLES[state.kind]
    if not np.array_equal(whole(layer.part("weight.quant_map", "weight", [F32], dims=1)), table):
        raise SourceError(f"tensor {layer.named('weight.quant_map')!r} is not the table of {state.kind}")
    absmax = _absmax(layer, state, cuts(matrix.elements, state.block))
    flat = matrix.rows > 1 and matrix.cols % state.block > 0
    codec = Codebook(4, state.block, flat)

    def numbers() -> list[NDArray[Any]]:
        starts = [np.arange(matrix.rows, dtype="<u8") * np.uint64(matrix.cols)] if flat else []
        return [table, _scales(layer, state, absmax), *starts]

    def codes(chunk: Chunk) -> U8:
        return nibbles(weight, matrix, chunk, high_first=True)

    return table_tensor(layer.named("weight"), state.shape, codec, numbers, codes)


def int8_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer of LLM.int8; raise `SourceError` if its parts do not match, or contradict the configuration."""
    _check_method(layer, claims)
    weight = layer.part("weight", "weight", [_I8])
    scale = layer.part("SCB", "weight", [F32], dims=len(layer.parts["SCB"].shape))
    rows, cols = weight.shape
    if prod(scale.shape) != rows:
        raise disagree(scale, weight)
    order = layer.parts.get("weight_format")
    if order is not None and any(value not in (0, "row") for value in np.atleast_1d(whole(order)).tolist()):
        raise SourceError(f"tensor {order.name!r} means codes in the order of a certain kernel, which cannot be read")
    matrix = Matrix(rows, cols)

    def numbers() -> list[NDArray[Any]]:
        table = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
        return [table, _FACTOR, whole(scale)]

    def codes(chunk: Chunk) -> U8:
        return weight.read(chunk.elements(matrix)).data.view(np.uint8).reshape(chunk.shape)

    return table_tensor(layer.named("weight"), (rows, cols), Codebook(8, "row", factor="value"), numbers, codes)


def _check_method(layer: Layer, claims: Claims) -> None:
    if claims.method and claims.method.value != METHOD:
        raise contradiction(layer.named("weight"), "bitsandbytes' layout", claims.method)


def _expect_kind(layer: Layer, state: _State, claims: Claims) -> None:
    """Compare the state of a layer with the configuration."""
    claims.expect(layer.named("weight"), "type", state.kind, "bnb_4bit_quant_type")


def _state(layer: Layer, kind: str) -> _State:
    part = layer.part(_STATE + kind, "weight", [_U8], dims=1)
    content: Any = None
    if part.shape[0] <= _LONGEST:
        try:
            content = json.loads(whole(part).tobytes())
        except (ValueError, RecursionError):
            content = None
    state = _checked(content, kind) if isinstance(content, Mapping) else None
    if state is None or bool(state.nested) != layer.has("weight.nested_absmax", "weight.nested_quant_map"):
        raise SourceError(f"tensor {part.name!r} is no state of {kind} codes that is understood")
    return state


def _checked(content: Mapping[str, Any], kind: str) -> _State | None:
    """Return a state; None if it is not understood."""
    shape, block = content.get("shape"), content.get("blocksize")
    if not set(content) <= _KEYS or content.get("quant_type") != kind:
        return None
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 1 << 48 for size in shape):
        return None
    if type(block) is not int or block % 16 or not 0 < block <= LONGEST:
        return None
    nested, offset = content.get("nested_blocksize"), content.get("nested_offset")
    if nested is None and offset is None:
        return _State(kind, tuple(shape), block, 0, 0.0)
    if type(nested) is not int or nested < 1 or not isinstance(offset, (int, float)):
        return None
    return _State(kind, tuple(shape), block, nested, offset) if content.get("nested_dtype") == "float32" else None


def _absmax(layer: Layer, state: _State, blocks: int) -> SourceTensor:
    """Return the scales, after a check of their number and, if they are quantized, of their own scales and table."""
    dtypes = [_U8] if state.nested else [F32]
    absmax = layer.part("weight.absmax", "weight", dtypes, dims=1)
    found = [(absmax, blocks)]
    if state.nested:
        found.append((layer.part("weight.nested_absmax", "weight", [F32], dims=1), cuts(blocks, state.nested)))
        found.append((layer.part("weight.nested_quant_map", "weight", [F32], dims=1), 256))
    for tensor, count in found:
        if tensor.shape != (count,):
            raise SourceError(
                f"tensor {tensor.name!r} has {tensor.shape[0]} numbers, where {count} are needed for shape {list(state.shape)}"
            )
    return absmax


def _scales(layer: Layer, state: _State, absmax: SourceTensor) -> NDArray[np.float32]:
    """Return the scales, in the tool's arithmetic if they are quantized."""
    stored: NDArray[Any] = whole(absmax)
    if not state.nested:
        return stored
    table, scales = (whole(layer.parts[f"weight.nested_{name}"]) for name in ("quant_map", "absmax"))
    with np.errstate(all="ignore"):  # what is not finite is refused later, with the name of the tensor
        products = table[stored] * np.repeat(scales, state.nested)[: stored.size]
        values: NDArray[np.float32] = products + np.float32(state.offset)
    return values
