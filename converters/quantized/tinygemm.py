"""The layout of torch's int4 kernels, used by gpt-fast, torchtune and torchao; and the int8 layers of gpt-fast.

A value is (code − 8) × scale + zero, for each group of columns. ``weight [n / 8, k / (16 t), 32, t / 2]``, of words, with t 2, 4 or
8: each word holds eight codes of one row, of two tiles of 16 columns. ``scales_and_zeros [k / group, n, 2]``.
"""

from __future__ import annotations

import numpy as np

from qformat.codecs.layout import Matrix
from qformat.codecs.scaled import Scaled
from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode
from qformat.converters.quantized.integers import I8, bytes_tensor, encode_with, packing
from qformat.converters.quantized.layer import Layer
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

ROLES = ("weight", "scales_and_zeros")
BYTE_ROLES = ("weight", "scales", "zeros")

# Columns of the eight codes of a word, the lowest first, within two tiles; plus twice the number of the thread modulo 4
_COLUMNS = np.array([0, 8, 16, 24, 1, 9, 17, 25])
_ROWS, _THREADS, _TILE = 8, 32, 16


def is_tinygemm(layer: Layer) -> bool:
    """Return whether a layer has words in tiles."""
    return layer.has(*ROLES) and layer.parts["weight"].dtype is coded.I32 and len(layer.parts["weight"].shape) == 4


def tinygemm_layer(layer: Layer, claims: Claims) -> CodedTensor:  # noqa: ARG001  shapes say all
    """Return the weights of a layer."""
    weight = layer.part("weight", "weight", [coded.I32], dims=4)
    numbers = layer.part("scales_and_zeros", "weight", coded.SCALES, dims=3)
    return tinygemm_tensor(layer.named("weight"), weight, numbers, None, None)


def tinygemm_tensor(
    name: str, weight: SourceTensor, numbers: SourceTensor, shape: tuple[int, int] | None, group: int | None
) -> CodedTensor:
    """Return a tensor, given its words, and its scales and zeros; its shape and the size of groups, if they are known.

    Raises `SourceError` if these do not match. A `shape` may be smaller than what is stored: the rest is padding.
    """
    tiles, outer, threads, inner = weight.shape
    stored_rows, stored_cols = _ROWS * tiles, 2 * inner * _TILE * outer
    groups, scaled_rows, pair = numbers.shape
    rows, cols = shape or (stored_rows, stored_cols)
    # rows of scales are padded like those of codes, or not
    if threads != _THREADS or inner not in (1, 2, 4) or pair != 2 or scaled_rows not in (rows, stored_rows):
        raise coded.disagree(numbers, weight)
    if not 0 < rows <= stored_rows or not 0 < cols <= stored_cols or stored_cols % groups:
        raise coded.disagree(numbers, weight)
    size = stored_cols // groups
    if group not in (None, size):
        raise SourceError(f"tensor {numbers.name!r}: its shape means groups of {size}, but the header says {group}")
    codec = Scaled(4, 1, size, numbers.dtype.name, numbers.dtype.name, "add", 8)  # type: ignore[arg-type]
    own = -(-cols // size)

    def load() -> Encode:
        pairs = coded.whole(numbers)[:own, :rows].transpose(2, 1, 0)
        codes = _unpack(coded.whole(weight))[:rows, :cols]
        return encode_with(codec, Matrix(rows, cols), list(pairs), packing(codes, 4))

    return CodedTensor(name, (rows, cols), codec, load)


def _unpack(words: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> U8:
    """Return the codes of a matrix."""
    tiles, outer, _, inner = words.shape
    codes = np.empty((tiles, _ROWS, outer, inner, 2 * _TILE), np.uint8)
    # thread 4 r + c has the columns 2 c + _COLUMNS of row r of a tile
    own = words.reshape(tiles, outer, _ROWS, 4, inner).transpose(0, 2, 1, 4, 3)
    for number, column in enumerate(_COLUMNS):
        codes[..., column : column + 8 : 2] = (own >> np.uint32(4 * number)) & np.uint32(15)
    return codes.reshape(tiles * _ROWS, -1)


def is_bytes(layer: Layer) -> bool:
    """Return whether a layer has bytes with a scale for each row or group of columns, as gpt-fast's int8 layers have."""
    if not layer.has("weight", "scales") or layer.parts["weight"].dtype is not I8:
        return False
    weight, scales = layer.parts["weight"].shape, layer.parts["scales"].shape
    return len(weight) == 2 and len(scales) in (1, 2) and scales[0] == weight[0]


def byte_layer(layer: Layer, claims: Claims) -> CodedTensor:  # noqa: ARG001  shapes say all
    """Return the weights of a layer of bytes: (code − zero) × scale; zeros, which some layers of fewer bits have, may be floats."""
    weight, scales, zeros = (layer.parts.get(role) for role in BYTE_ROLES)
    assert weight is not None
    assert scales is not None
    return bytes_tensor(layer, layer.named("weight"), weight, scales, zeros)
