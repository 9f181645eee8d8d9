"""Tensors of torch as elements."""

from __future__ import annotations

import torch

from qformat.dtypes import DTYPES, Elements
from qformat.readers.torch import TORCH_DTYPES

_DTYPES = {dtype: DTYPES[name] for name, dtype in TORCH_DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (
    (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if hasattr(torch.nn, "Buffer")
    else (torch.Tensor, torch.nn.Parameter)
)


def elements_of(tensor: torch.Tensor) -> Elements:
    """Return the elements of a tensor on any device, in row-major order, copied only if they are not stored so.

    Raises `TypeError` if it is not a plain tensor with values, or of a dtype that the format does not have.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if type(tensor) not in _PLAIN:
        raise TypeError(
            f"a tensor of the class {type(tensor).__module__}.{type(tensor).__qualname__} is no plain tensor"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError("a sparse or nested tensor cannot be stored; give tensor.to_dense()")
    if dtype is None:
        raise TypeError(f"tensors of {str(tensor.dtype).removeprefix('torch.')} cannot be stored")
    if tensor.device.type == "meta":
        raise TypeError("a tensor on the meta device has no values")
    plain = tensor.detach().cpu().resolve_neg().contiguous()
    return Elements(dtype, plain.view(_BITS[dtype.size]).numpy().view(dtype.storage))
