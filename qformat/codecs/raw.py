"""Elements as they are, or rounded to a shorter float format (spec/codecs.md, "Raw")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import ChunkEncoder, EncodedChunk, ErrorSum
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.registry import register
from qformat.dtypes import BF16, DTYPES, F16, F32, F64, DType, Elements
from qformat.kernels import load


@dataclass(frozen=True)
class Raw(ChunkEncoder):
    """Floats as they are, or rounded to this dtype; the id is its name."""

    decoded: ClassVar[DType]

    def accepts(self, dtype: DType) -> bool:
        """Return whether it is the same dtype, or a float to be stored as another float."""
        return dtype is self.decoded or (dtype.floating and self.decoded in (F16, BF16, F32, F64))

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether every value of the dtype is one of this."""
        return self.decoded.contains(dtype)

    def decoded_from(self, dtype: DType) -> DType:
        """Return this dtype."""
        return self.decoded

    def layout(self, matrix: Matrix) -> Layout:
        """Return the one segment."""
        return (Array("data", self.decoded.size),)

    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Copy the elements, or round them."""
        finite = elements.all_finite()
        if self.decoded.storage == "bool":
            _check_bools(elements.data.view(np.uint8))
        if elements.dtype is self.decoded:
            return EncodedChunk((_bytes(elements.data),), finite)
        stored = elements.cast(self.decoded)
        if self.is_lossless(elements.dtype):
            return EncodedChunk((_bytes(stored),), finite)
        values = Elements(self.decoded, stored).to_f32().reshape(-1)
        infinite = 0 if not finite else int(np.isinf(values).sum())
        # Rounding single weights to zero is no loss, but all of them is
        zeroed = finite and not values.any() and bool(elements.to_f64().any())
        return EncodedChunk((_bytes(stored),), finite, _error(elements, values), infinite, int(zeroed))

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Copy the elements."""
        if self.decoded.storage == "bool":
            _check_bools(np.frombuffer(parts[0], np.uint8))
        out.reshape(-1)[:] = np.frombuffer(parts[0], dtype=out.dtype)


def _check_bools(patterns: NDArray[np.uint8]) -> None:
    if patterns.max(initial=0) > 1:
        raise ValueError("it holds a bool that is neither 0 nor 1")


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _error(source: Elements, values: NDArray[np.float32]) -> ErrorSum:
    lanes = np.zeros(load("floats").LANES)
    if source.dtype is not F64:
        largest = load("floats").difference(source.to_f32().reshape(-1), values, lanes)
        return ErrorSum.of(values.size, lanes, largest)
    with np.errstate(all="ignore"):
        error = source.data.reshape(-1) - values
        squares = np.pad(error * error, (0, -error.size % lanes.size)).reshape(-1, lanes.size)
        lanes[:] = np.add.reduce(squares, axis=0)
    return ErrorSum(values.size, math.fsum(lanes.tolist()), float(np.abs(error).max(initial=0.0)))


def raw(dtype: DType) -> Raw:
    """Return the codec that stores elements of a dtype as they are."""
    return _CLASSES[dtype.name]()


def _class_of(dtype: DType) -> type[Raw]:
    return register(type(f"Raw_{dtype.name}", (Raw,), {"id": dtype.name, "decoded": dtype}))


_CLASSES = {name: _class_of(dtype) for name, dtype in DTYPES.items()}
