"""Torch tensors that are decoded when they are used: a state dict of them takes no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map

#: returns the values of a tensor, in a floating dtype or, for None, in its own
Read = Callable[[torch.dtype | None], torch.Tensor]

_T = torch.Tensor
# What is known without the values
_METADATA = {
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta", "is_leaf")),
    *(getattr(_T, name).__get__ for name in ("requires_grad", "is_sparse", "is_quantized", "is_nested")),
    *(_T.size, _T.dim, _T.numel, _T.nelement, _T.stride, _T.element_size, _T.is_contiguous, _T.__len__, _T.ndimension),
    *(_T.is_floating_point, _T.is_complex, _T.is_signed, _T.requires_grad_),
    *(torch.is_tensor, torch.numel, torch.is_floating_point, torch.is_complex),
}


class LazyTensor(torch.Tensor):
    """A tensor whose values are read when something is computed with them.

    Copying it into a tensor reads the values in the dtype of that tensor, and keeps nothing. Any other use keeps the values, since
    it may change them.
    """

    _read: Read
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls: type[Self], shape: Sequence[int], dtype: torch.dtype, read: Read) -> Self:
        """Return a tensor of a shape and dtype."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))
        made._read, made._value = read, None
        return made

    def values(self, dtype: torch.dtype | None = None, *, keep: bool = True) -> torch.Tensor:
        """Return the values as a plain tensor: in another floating dtype, unless they have been kept in this one."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._value is not None:
                return self._value
            found = self._read(dtype)
            if keep:
                self._value = found
            return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer from what is known, or call a function of torch with the values."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is _T.detach and isinstance(
            args[0], LazyTensor
        ):  # for torch.nn.Parameter, which has to get its own class
            return LazyTensor(args[0].shape, args[0].dtype, args[0].values)
        if func is _T.copy_ and not isinstance(args[0], LazyTensor):
            target, source = args[0], args[1]
            dtype = target.dtype if target.is_floating_point() else None
            return target.copy_(source.values(dtype, keep=False), *args[2:], **kwargs)
        return func(*_with_values(args), **_with_values(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator with the values."""
        return func(*_with_values(args), **_with_values(kwargs or {}))


def _with_values(tree: Any) -> Any:
    return tree_map(lambda item: item.values() if isinstance(item, LazyTensor) else item, tree)
