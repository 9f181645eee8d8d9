"""The values in pickles that torch.save writes: plain ones of Python and numpy, and tensors as places in the file.

Everything else becomes a stand-in (`qformat.converters.sources.pickles`); neither torch nor any other package is needed or asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.converters.sources.pickles import Handler, Name, PickleMachine, StandIn, members, pairs

#: bytes of an element of each dtype of torch, by the name that torch gives it
DTYPE_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
    "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1,
    "bits4x2": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4", "Untyped": "uint8",
}  # fmt: skip
# Classes of tensors that are nothing but their elements
_PLAIN_CLASSES = {
    "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.nn.Parameter",
    "torch.nn.modules.parameter.Parameter",
}  # fmt: skip
_NUMPY_KINDS = re.compile("[<>|=]?(?:b1|[iu][1248]|f[248]|c8|c16|[?bBhHiIlLqQefdFD])")
_MOST_DIMENSIONS = 64
_OF_CLASS = "of the class "


@dataclass(eq=False)
class Storage:
    """Bytes that tensors share.

    Attributes
    ----------
    key
        Its name in the file.
    dtype
        The torch dtype of its elements.
    nbytes
        Its length.
    offset
        Of its first byte in `whole`, or in the file; in the old format, it is known once the whole pickle is read.
    whole
        The storage that it is a part of.
    """

    key: str
    dtype: str
    nbytes: int
    offset: int = -1
    whole: Storage | None = None

    @property
    def place(self) -> int:
        """Offset of its first byte in the file."""
        return self.offset + (self.whole.offset if self.whole else 0)

    def part(self, part: Storage, start: int = 0) -> Storage:
        """Make another one a part of this; raise `ValueError` if it exceeds it."""
        if type(start) is not int or not 0 <= start <= self.nbytes - part.nbytes:
            raise ValueError(f"storage {part.key[:40]!r} exceeds another")
        part.offset, part.whole = start, self
        return part


@dataclass(eq=False)
class SavedTensor:
    """A strided tensor: a view of a storage; lengths are in elements."""

    dtype: str
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    quantizer: tuple[float, ...] = ()  # scale and zero point of torch's own quantized tensors

    @property
    def elements(self) -> int:
        """Number of elements, repeated ones too."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether they are real numbers."""
        return "float" in self.dtype


@dataclass(eq=False)
class OddTensor:
    """A tensor that is more than a view of bytes, or less.

    Attributes
    ----------
    what
        Words that end the sentence "it is …".
    shape
        Its shape, if it is known.
    parts
        What it is made of.
    """

    what: str
    shape: tuple[int, ...] = ()
    parts: tuple[Any, ...] = ()

    @property
    def is_subclass(self) -> bool:
        """Whether its class says more than its elements: it may be quantized."""
        return self.what.startswith(_OF_CLASS)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether they are real numbers, as far as is known."""
        return True


@dataclass(eq=False)
class PickledArray:
    """An array of numpy; its value is None if its elements are not numbers."""

    value: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return () if self.value is None else self.value.shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return 0 if self.value is None else self.value.size

    @property
    def floating(self) -> bool:
        """Whether they are real numbers."""
        return self.value is not None and self.value.dtype.kind == "f"


@dataclass(eq=False)
class _DType:
    """A dtype of numpy; objects and records have none that can be used here."""

    code: str
    order: str = "="

    def find(self) -> np.dtype[Any]:
        if not _NUMPY_KINDS.fullmatch(self.code):
            raise ValueError(f"numpy dtype {self.code[:20]!r}")
        found = np.dtype(self.code)
        return found.newbyteorder(">") if self.order == ">" else found


def machine(find: Callable[[Any], object]) -> PickleMachine:
    """Return the machine for the pickles of torch, given a function that returns the storage of a persistent id."""
    return PickleMachine(_HANDLERS, _build, find)


def storage_dtype(type_: object) -> str:
    """Return the torch dtype of the elements of a class of storages; raise `ValueError` if it is not known."""
    name = type_.name.rpartition(".")[2] if isinstance(type_, Name) else ""
    dtype = _STORAGES.get(name.removesuffix("Storage"))
    if dtype is None:
        raise ValueError(f"storage of type {name[:40]!r}")
    return dtype


# ---- tensors


def _tensor(storage: object, offset: object, shape: object, strides: object, *rest: Any) -> SavedTensor | OddTensor:
    """Return a tensor of torch._utils._rebuild_tensor_v2, whose last argument may say that the view changes values."""
    assert isinstance(storage, Storage)
    return _view(storage, storage.dtype, offset, shape, strides, rest[2] if len(rest) > 2 else None)


def _tensor_of_dtype(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: Name,
    *rest: Any,
) -> SavedTensor | OddTensor:
    """Return a tensor of torch._utils._rebuild_tensor_v3: of a dtype that has no class of storages."""
    assert isinstance(storage, Storage)
    return _view(storage, dtype.name.removeprefix("torch."), offset, shape, strides, rest[0] if rest else None)


def _view(
    storage: Storage, dtype: str, offset: object, shape: object, strides: object, changes: object
) -> SavedTensor | OddTensor:
    size = DTYPE_SIZES.get(dtype)
    if size is None:
        return OddTensor(f"of dtype {dtype[:40]}", _lengths(shape))
    (first,) = _lengths((offset,))
    found = SavedTensor(dtype, storage, first, _lengths(shape), _lengths(strides))
    if len(found.shape) != len(found.strides):
        raise ValueError("a tensor with strides that do not fit its shape")
    if found.elements:
        last = found.offset + sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True))
        if (last + 1) * size > storage.nbytes:
            raise ValueError(f"a tensor exceeds its storage {storage.key[:40]!r}")
    if isinstance(changes, Mapping) and any(changes.values()):
        words = {"neg": "signs", "conj": "imaginary parts"}
        return OddTensor(
            f"a view that changes {words.get(next(k for k in changes if changes[k]), 'values')}", found.shape
        )
    return found


def _lengths(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMENSIONS:
        raise TypeError("a shape that is no tuple")
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError("a shape that no tensor has")
    return tuple(values)


def _of_type(function: Name, type_: Name, args: tuple[Any, ...], *_: Any) -> object:
    """Return a tensor of torch._tensor._rebuild_from_type_v2: of a subclass, or with attributes."""
    handler = _HANDLERS.get(function.name)
    found = handler(*args) if handler else StandIn(function.name, args)
    if type_.name in _PLAIN_CLASSES:
        return found
    shape = found.shape if isinstance(found, SavedTensor | OddTensor) else ()
    return OddTensor(f"{_OF_CLASS}{type_.name}", shape, (found, *args, *_))


def _subclass(function_type: object = None, *args: Any) -> OddTensor:
    """Return a tensor that is made of others, of torch._utils._rebuild_wrapper_subclass and functions like it."""
    name = function_type.name if isinstance(function_type, Name) else "of others"
    shapes = [arg for arg in args if isinstance(arg, tuple) and all(type(n) is int and n >= 0 for n in arg)]
    return OddTensor(f"{_OF_CLASS}{name}", shapes[0] if shapes else (), args)


def _quantized(
    storage: object, offset: object, shape: object, strides: object, quantizer: Any, *rest: Any
) -> SavedTensor | OddTensor:
    assert isinstance(storage, Storage)
    found = _view(storage, storage.dtype, offset, shape, strides, None)
    if isinstance(found, SavedTensor) and len(quantizer) == 3 and all(type(n) in (int, float) for n in quantizer[1:]):
        found.quantizer = tuple(quantizer[1:])
        return found
    return OddTensor(f"of dtype {storage.dtype}, quantized by torch", _lengths(shape), (storage, quantizer, *rest))


def _sparse(_layout: object, parts: object) -> OddTensor:
    shapes = (
        [part for part in parts if isinstance(part, tuple) and all(type(n) is int for n in part)]
        if isinstance(parts, tuple)
        else []
    )
    return OddTensor("sparse, or nested", _lengths(shapes[0]) if shapes else ())


def _nested(*_: Any) -> OddTensor:
    return OddTensor("sparse, or nested")


def _without_values(_dtype: object, shape: object, *_: Any) -> OddTensor:
    return OddTensor("on the device 'meta', without values", _lengths(shape))


# ---- Python and numpy


def _array(_class: object, _shape: object, _kind: object) -> PickledArray:
    return PickledArray()


def _dtype(code: object, *_: Any) -> _DType:
    return _DType(code if isinstance(code, str) else "")


def _array_of_buffer(data: object, dtype: object, shape: object, order: object) -> PickledArray | StandIn:
    found = _filled(data, dtype, shape, fortran=order == "F")
    return StandIn("numpy.ndarray") if found is None else PickledArray(found)


def _scalar(dtype: object, data: object = b"") -> object:
    found = _filled(data, dtype, (), fortran=False)
    return StandIn("numpy scalar") if found is None else found[()].item()


def _filled(data: object, dtype: object, shape: object, *, fortran: bool) -> NDArray[Any] | None:
    """Return an array; None if its elements are not numbers."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        return None
    try:
        kind = dtype.find()
    except ValueError:
        return None
    lengths = _lengths(shape)
    if math.prod(lengths) * kind.itemsize != len(data):
        raise ValueError("an array of another size than its data")
    return np.frombuffer(data, kind).reshape(lengths, order="F" if fortran else "C")


def _build(target: object, state: object) -> None:
    """Give a state to an array or a dtype; other values (an OrderedDict, say) keep what they have."""
    if isinstance(target, _DType):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
    elif isinstance(target, PickledArray):
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            target.value = _filled(data, dtype, shape, fortran=bool(fortran))
    elif isinstance(target, SavedTensor | OddTensor | Storage):
        raise TypeError("a state for a tensor")


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes that old protocols have as text."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes as text in another way")
    return text.encode("latin1")


def _list(items: Sequence[Any] = (), *_: Any) -> list[Any]:
    return list(items)


def _set(items: Sequence[Any] = ()) -> set[Any]:
    return set(members(items))


def _dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, Mapping):
        return dict(items)
    return pairs([part for pair in items for part in _pair(pair)])


def _pair(pair: object) -> Sequence[Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError("an entry that is no pair")
    return pair


def _complex(real: float, imaginary: float) -> complex:
    return complex(float(real), float(imaginary))


def _bytes(data: Any = b"", *encoding: str) -> bytes:
    if isinstance(data, str):
        return _encoded(data, *encoding)
    if not isinstance(data, bytes | bytearray):
        raise TypeError("bytes of something else")
    return bytes(data)


_UTILS: dict[str, Handler] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_of_dtype,
    "_rebuild_parameter": lambda tensor, *_: tensor,
    "_rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "_rebuild_qtensor": _quantized,
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_sparse_csr_tensor": _sparse,
    "_rebuild_nested_tensor": _nested,
    "_rebuild_meta_tensor_no_storage": _without_values,
    "_rebuild_wrapper_subclass": _subclass,
}
_NUMPY: dict[str, Handler] = {
    "_reconstruct": _array,
    "scalar": _scalar,
}
_HANDLERS: dict[str, Handler] = {
    **{f"torch._utils.{name}": handler for name, handler in _UTILS.items()},
    **{f"{core}.multiarray.{name}": f for core in ("numpy.core", "numpy._core") for name, f in _NUMPY.items()},
    **{f"{core}.numeric._frombuffer": _array_of_buffer for core in ("numpy.core", "numpy._core")},
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": lambda lengths=(): tuple(lengths),
    "numpy.dtype": _dtype,
    "_codecs.encode": _encoded,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _complex,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.list": _list,
    "builtins.dict": _dict,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None, items=(): _dict(items),
    "collections.deque": _list,
}
