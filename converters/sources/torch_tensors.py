"""Tensors of files that ``torch.save`` wrote. Pickles may run any code: only torch's restricted unpickler loads them."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qformat.dtypes import DTYPES, DType, Elements
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor
from qformat.readers.torch import TORCH_DTYPES

_DTYPES = {theirs: DTYPES[name] for name, theirs in TORCH_DTYPES.items()}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Views that repeat elements can cause any amount of work; no model repeats its elements more often
_MAX_REPEATED = 1024


class TorchTensor(SourceTensor):
    """A tensor in memory, or in a mapped file; it may be any strided view."""

    def __init__(self, name: str, dtype: DType, array: NDArray[Any]) -> None:
        self.name, self.dtype, self.shape = name, dtype, array.shape
        self.array = array

    def read(self, elements: slice) -> Elements:
        """Return elements, without a copy if they are contiguous."""
        return Elements(self.dtype, _in_order(self.array, elements.start, elements.stop))


def _in_order(array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    """Return elements of a view in row-major order, copying no others."""
    if array.flags.c_contiguous:
        return np.require(array.reshape(-1)[start:stop], requirements="A")
    if start == stop:
        return np.empty(0, array.dtype)
    if array.ndim == 1:
        return np.ascontiguousarray(array[start:stop])
    row = math.prod(array.shape[1:])
    first = start // row
    if first == (stop - 1) // row:
        return _in_order(array[first], start - first * row, stop - first * row)
    found = np.empty(stop - start, array.dtype)
    inner = slice(-(-start // row), stop // row)  # rows that are needed in full
    head, tail = inner.start * row - start, stop - inner.stop * row
    if head:
        found[:head] = _in_order(array[first], row - head, row)
    found[head : found.size - tail].reshape(-1, *array.shape[1:])[:] = array[inner]
    if tail:
        found[found.size - tail :] = _in_order(array[inner.stop], 0, tail)
    return found


def load(path: Path, *, zipped: bool) -> object:
    """Return the saved object; the tensors of an archive are mapped.

    Raises `SourceError` if it is damaged, or holds more than the restricted unpickler accepts; the message does not name the
    file.
    """
    if path.suffix == ".safetensors":  # which torch.load would trust
        raise SourceError("is a torch checkpoint, though its name ends in .safetensors; rename it to .pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise SourceError(_refusal(str(error))) from None
    except Exception as error:  # noqa: BLE001  damaged bytes can make the unpickler raise anything
        raise SourceError(f"is damaged, or no version of torch wrote it ({_brief(error)}); download it again") from None
    return root


def _refusal(message: str) -> str:
    """Return the error message for a pickle that the restricted unpickler refuses."""
    advice = (
        "which is refused, since a pickle can run any code; if you trust it, load it where it was made and save only the state "
        "dict: torch.save(model.state_dict(), ...)"
    )
    if named := re.search(r"GLOBAL (\S+)", message):
        return f"imports {named[1][:200]!r}, {advice}"
    # before this, torch's message tells how to load it anyway
    cause = message.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""]
    return f"contains more than tensors ({_brief(cause[0])}), {advice}"


def _brief(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def source_tensor(name: str, tensor: torch.Tensor) -> TorchTensor:
    """Return a tensor as a source; raise `SourceError` if it cannot be stored."""
    tensor = tensor.detach()
    dtype = _DTYPES.get(tensor.dtype)
    if tensor.layout is not torch.strided or tensor.is_nested:
        property_ = "sparse, or nested"
    elif dtype is None:
        property_ = f"of dtype {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.device.type != "cpu":
        property_ = f"on the device {tensor.device.type!r}, without values"
    elif tensor.is_neg():
        property_ = "a view that changes signs"
    else:
        return TorchTensor(name, dtype, tensor.view(_BITS[dtype.size]).numpy().view(dtype.storage))
    raise SourceError(f"tensor {name!r} is {property_}, which cannot be stored; save the checkpoint without it")


def check_amount(path: Path, tensors: Sequence[TorchTensor]) -> None:
    """Raise `SourceError` if views repeat the data of a file absurdly often."""
    size = sum(tensor.array.nbytes for tensor in tensors)
    if size > _MAX_REPEATED * path.stat().st_size:
        raise SourceError(f"its tensors repeat the data of the file, up to {size} bytes; do not use it")
