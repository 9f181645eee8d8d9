"""Tensors of files that ``torch.save`` wrote: any strided view of bytes in the file, read when they are needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from qformat.converters.sources.files import SharedFile
from qformat.converters.sources.torch_pickle import DTYPE_SIZES, OddTensor, PickledArray, SavedTensor
from qformat.dtypes import DTYPES, DType, Elements, from_array
from qformat.errors import SourceError
from qformat.pipeline.source import FixedSource, SourceTensor

_NAMES = {
    "bool": "bool", "uint8": "u8", "int8": "i8", "uint16": "u16", "int16": "i16", "uint32": "u32", "int32": "i32", "uint64": "u64",
    "int64": "i64", "float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2", "float8_e8m0fnu": "f8_e8m0", "float16": "f16",
    "bfloat16": "bf16", "float32": "f32", "float64": "f64",
}  # fmt: skip
# Views that repeat elements can cause any amount of work; no model repeats so much
_MOST_REPEATED = 1 << 30
_MOST_TIMES = 1024
# A view whose elements are scattered is read at once, with what is in between
_SCATTERED = 4
_SMALL = 1 << 20


class StridedFile:
    """A file whose bytes are read as views, of which the last is held: chunks of a transposed matrix all need all of it."""

    def __init__(self, file: SharedFile) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._held: tuple[tuple[int, int], memoryview] | None = None

    def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes at a position; raise `SourceError` if they cannot be read."""
        return self.file.read(offset, length)

    def read_and_hold(self, offset: int, length: int) -> memoryview:
        """Return the bytes at a position, and hold them until others are read so."""
        with self._lock:
            if self._held is None or self._held[0] != (offset, length):
                self._held = None  # before more is allocated
                self._held = (offset, length), self.file.read(offset, length)
            return self._held[1]


class TorchTensor(SourceTensor):
    """A strided view of elements in a file."""

    def __init__(self, name: str, dtype: DType, saved: SavedTensor, file: StridedFile) -> None:
        self.name, self.dtype, self.shape = name, dtype, saved.shape
        self.strides = saved.strides
        self.file = file
        self.offset = saved.storage.place + saved.offset * dtype.size

    def read(self, elements: slice) -> Elements:
        """Return elements in row-major order."""
        count = elements.stop - elements.start
        if count == 0:
            return Elements(self.dtype, np.empty(0, self.dtype.storage))
        if _is_contiguous(self.shape, self.strides):
            data = self.file.read(self.offset + elements.start * self.dtype.size, count * self.dtype.size)
            return Elements(self.dtype, np.frombuffer(data, self.dtype.storage))
        found = np.empty(count, self.dtype.storage)
        self._gather(found, elements.start, self.shape, self.strides, self.offset)
        return Elements(self.dtype, found)

    def _gather(self, out: NDArray[Any], start: int, shape: Sequence[int], strides: Sequence[int], offset: int) -> None:
        """Read elements, beginning with one, of a view at an offset of the file; rows in which all are needed are read at once."""
        row, step = math.prod(shape[1:]), strides[0] * self.dtype.size if strides else 0
        first, stop = -(-start // row), (start + out.size) // row
        if first > stop:  # all are in the same row, and do not fill it
            self._gather(out, start - stop * row, shape[1:], strides[1:], offset + stop * step)
            return
        head, tail = first * row - start, start + out.size - stop * row
        if head:
            self._gather(out[:head], row - head, shape[1:], strides[1:], offset + (first - 1) * step)
        if first < stop:
            rows = (stop - first, *shape[1:])
            out[head : out.size - tail].reshape(rows)[...] = self._rows(rows, strides, offset + first * step)
        if tail:
            self._gather(out[out.size - tail :], 0, shape[1:], strides[1:], offset + stop * step)

    def _rows(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> NDArray[Any]:
        """Return a view at an offset of the file."""
        size, span = self.dtype.size, _span(shape, strides)
        if span <= _SCATTERED * math.prod(shape) + _SMALL // size:
            return self._view(self.file.read(offset, span * size), 0, shape, strides)
        data = self.file.read_and_hold(self.offset, _span(self.shape, self.strides) * size)
        return self._view(data, offset - self.offset, shape, strides)

    def _view(self, data: memoryview, offset: int, shape: Sequence[int], strides: Sequence[int]) -> NDArray[Any]:
        flat = np.frombuffer(data, self.dtype.storage)[offset // self.dtype.size :]
        return as_strided(flat, shape, [stride * self.dtype.size for stride in strides], writeable=False)


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first of a view to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


class HeldTensor(SourceTensor):
    """An array that was part of the pickle."""

    def __init__(self, name: str, elements: Elements) -> None:
        self.name, self.dtype, self.shape = name, elements.dtype, elements.data.shape
        self._flat = elements.data.reshape(-1)

    def read(self, elements: slice) -> Elements:
        """Return a view of some elements."""
        return Elements(self.dtype, self._flat[elements])


def source_tensor(name: str, tensor: SavedTensor | OddTensor | PickledArray, file: StridedFile) -> SourceTensor:
    """Return a tensor as a source; raise `SourceError` if it cannot be stored."""
    if isinstance(tensor, PickledArray):
        assert tensor.value is not None
        try:
            return HeldTensor(name, from_array(tensor.value))
        except TypeError as error:
            raise SourceError(f"tensor {name!r}: {error}; save the checkpoint without it") from None
    if isinstance(tensor, SavedTensor) and tensor.dtype in _NAMES:
        return TorchTensor(name, DTYPES[_NAMES[tensor.dtype]], tensor, file)
    if isinstance(tensor, SavedTensor):
        return _bytes_of(name, tensor, file)
    advice = (
        "load it where it was made, and save it as a plain tensor"
        if tensor.is_subclass
        else "save the checkpoint without it"
    )
    raise SourceError(f"tensor {name!r} is {tensor.what}, which cannot be stored; {advice}")


def is_opaque(tensor: object) -> TypeGuard[SavedTensor]:
    """Return whether the dtype of a tensor is not known here, so that only its bytes are stored."""
    return isinstance(tensor, SavedTensor) and tensor.dtype not in _NAMES


def _bytes_of(name: str, tensor: SavedTensor, file: StridedFile) -> SourceTensor:
    """Return the bytes of a tensor; those of an element are the last dimension, unless it has one."""
    size = DTYPE_SIZES[tensor.dtype]
    last = (size,) if size > 1 else ()
    seen = SavedTensor(
        "uint8",
        tensor.storage,
        tensor.offset * size,
        (*tensor.shape, *last),
        (*(stride * size for stride in tensor.strides), *(1 for _ in last)),
    )
    found = TorchTensor(name, DTYPES["u8"], seen, file)
    because = f"is of dtype {tensor.dtype}, which is stored as bytes"
    return found if tensor.dtype.startswith("complex") else FixedSource(found, because)


def check_repeated(tensors: Sequence[SourceTensor], file_size: int) -> list[str]:
    """Return a text for each tensor that is far larger than its part of the file; raise `SourceError` if there is no bound."""
    total = sum(tensor.nbytes for tensor in tensors)
    texts = []
    for tensor in tensors:
        if not isinstance(tensor, TorchTensor):
            continue
        held = _span(tensor.shape, tensor.strides) * tensor.dtype.size
        if tensor.nbytes > max(_SMALL, 2 * held):
            texts.append(f"{tensor.name!r} ({tensor.nbytes:,} bytes from {held:,})")
    if total > max(_MOST_REPEATED, _MOST_TIMES * file_size):
        named = f", such as {texts[0]}" if texts else ""
        raise SourceError(
            f"its tensors repeat the data of the file, up to {total} bytes{named}; save them without expand(), or do not use it"
        )
    return texts
