"""Quantized tensors in memory, and layers as other tools pack them, by an independent packer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qformat.codecs.base import Codec
from qformat.codecs.layout import Chunk
from qformat.dtypes import BF16, DTYPES, F32, DType, Elements, from_array
from qformat.pipeline.source import QuantizedSource
from tests.helpers.codecs import chunks_of, decode, part_of


@dataclass(frozen=True)
class Codes(QuantizedSource):
    """A quantized tensor in memory: its codec and the segments of a file."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    segments: tuple[bytes, ...]
    dtype: DType = F32

    def encoded(self, chunk: Chunk) -> tuple[bytes, ...]:
        return part_of(self.codec, self.shape, chunk, self.segments)

    def read(self, elements: slice) -> Elements:
        values = [
            decode(self.codec, self.encoded(chunk), (chunk.rows, chunk.cols)).reshape(-1)
            for chunk in chunks_of(self.codec, self.shape)
        ]
        return Elements(F32, np.concatenate(values)[elements])


def words_of(codes: Sequence[int], bits: int) -> list[int]:
    """Return 32-bit words that are one string of bits."""
    text = sum(int(code) << bits * i for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [text >> 32 * i & 0xFFFFFFFF for i in range(count)]


def loose_words_of(codes: Sequence[int], bits: int) -> list[int]:
    """Return 32-bit words that each hold whole codes only."""
    each = 32 // bits
    return [word for i in range(0, len(codes), each) for word in words_of(codes[i : i + each], bits)]


def packed(rows: Any, bits: int, pack: Any = words_of) -> np.ndarray:
    return np.array([pack(row, bits) for row in rows], np.uint32).view(np.int32)


def less_one(zeros: np.ndarray, bits: int, *, whole: bool = False) -> np.ndarray:
    """Return words of zeros as GPTQ v1 stores them: each of them less one, or whole words less one in each field (GPTQModel)."""
    if whole and bits != 3:
        return packed(zeros, bits) - np.uint32(sum(1 << i for i in range(0, 32, bits))).view(np.int32)
    return packed((zeros - 1) % (1 << bits), bits)


def awq_words_of(codes: Sequence[int]) -> list[int]:
    words = []
    for i in range(0, len(codes), 8):
        field = {place: int(code) for place, code in zip((0, 4, 1, 5, 2, 6, 3, 7), codes[i : i + 8], strict=True)}
        words.append(sum(field[place] << 4 * place for place in field))
    return words


@dataclass
class Layer:
    """A quantized layer with random numbers, and its values."""

    codes: np.ndarray  # [out, in]
    zeros: np.ndarray  # [out, groups]
    scales: Elements  # [out, groups]
    places: np.ndarray  # the group of each column

    @property
    def values(self) -> np.ndarray:
        levels = (self.codes - self.zeros[:, self.places]).astype(np.float32)
        return self.scales.to_f32()[:, self.places] * levels


def random_scales(rng: Any, shape: Any, dtype: str = "f16") -> Elements:
    values = rng.normal(size=shape).astype(np.float32)
    if dtype == "bf16":
        return Elements(BF16, (values.view(np.uint32) >> 16).astype(np.uint16))
    return from_array(values.astype(DTYPES[dtype].storage))


def layer(
    bits: int,
    rows: int,
    cols: int,
    group: int,
    *,
    order: bool = False,
    sym: bool = False,
    scale: str = "f16",
    seed: int = 0,
) -> Layer:
    rng = np.random.default_rng(seed)
    groups = -(-cols // group)
    places = np.arange(cols) // group
    zeros = np.full((rows, groups), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (rows, groups))
    codes, scales = rng.integers(0, 1 << bits, (rows, cols)), random_scales(rng, (rows, groups), scale)
    return Layer(codes, zeros, scales, rng.permutation(places) if order else places)


def transposed(elements: Elements) -> Elements:
    return Elements(elements.dtype, np.ascontiguousarray(elements.data.T))


def gptq(x: Layer, bits: int, version: str = "v1", *, g_idx: bool = True) -> dict[str, Any]:
    words = packed(x.zeros.T, bits)
    parts = {
        "qweight": np.ascontiguousarray(packed(x.codes, bits).T),
        "qzeros": less_one(x.zeros.T, bits) if version == "v1" else words,
        "scales": transposed(x.scales),
    }
    return parts | ({"g_idx": x.places.astype(np.int32)} if g_idx else {})


def awq(x: Layer) -> dict[str, Any]:
    return {
        "qweight": np.array([awq_words_of(column) for column in x.codes.T], np.uint32).view(np.int32),
        "qzeros": np.array([awq_words_of(column) for column in x.zeros.T], np.uint32).view(np.int32),
        "scales": transposed(x.scales),
    }


def compressed(x: Layer, bits: int, pack: Any = words_of, *, zeros: bool = True) -> dict[str, Any]:
    parts = {
        "weight_packed": packed(x.codes, bits, pack),
        "weight_scale": x.scales,
        "weight_shape": np.array(x.codes.shape, np.int64),
    }
    return parts | ({"weight_zero_point": np.ascontiguousarray(packed(x.zeros.T, bits, pack).T)} if zeros else {})
