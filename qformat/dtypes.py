"""Element types of tensors: their names in the format, their sizes, and the numpy dtypes that store them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes
    ----------
    name
        Name in the format (spec/codecs.md).
    size
        Bytes of an element.
    storage
        Name of the numpy dtype that holds its bits: an unsigned integer where numpy has no such type.
    exponent, mantissa
        Bits of the parts of a float; 0 for integers.
    """

    name: str
    size: int
    storage: str
    exponent: int = 0
    mantissa: int = 0

    @property
    def floating(self) -> bool:
        """Whether elements are real numbers, which a codec may approximate."""
        return self.exponent > 0

    def contains(self, other: DType) -> bool:
        """Return whether this type can represent every value of `other`."""
        wider = self.exponent >= other.exponent and self.mantissa >= other.mantissa
        return self is other or (self.floating and other.floating and wider)

    @property
    def native(self) -> bool:
        """Whether numpy's dtype represents the same values, so that users can be given its arrays."""
        return not self.floating or self.storage.startswith("float")


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("bool", 1, "bool"),
        DType("u8", 1, "uint8"),
        DType("i8", 1, "int8"),
        DType("u16", 2, "uint16"),
        DType("i16", 2, "int16"),
        DType("u32", 4, "uint32"),
        DType("i32", 4, "int32"),
        DType("u64", 8, "uint64"),
        DType("i64", 8, "int64"),
        DType("f8_e4m3", 1, "uint8", 4, 3),
        DType("f8_e5m2", 1, "uint8", 5, 2),
        DType("f8_e8m0", 1, "uint8", 8),
        DType("f16", 2, "float16", 5, 10),
        DType("bf16", 2, "uint16", 8, 7),
        DType("f32", 4, "float32", 8, 23),
        DType("f64", 8, "float64", 11, 52),
    )
}

F16, BF16, F32, F64 = (DTYPES[name] for name in ("f16", "bf16", "f32", "f64"))


@dataclass(frozen=True)
class Elements:
    """An array together with the element type that its bits represent.

    Attributes
    ----------
    dtype
        The element type.
    data
        C-contiguous array of ``dtype.storage``.
    """

    dtype: DType
    data: NDArray[Any]

    def to_f32(self) -> NDArray[np.float32]:
        """Return the values as float32, in the same shape; exact, except that float64 is rounded.

        Raises
        ------
        TypeError
            If the elements are not floats.
        """
        import numpy as np

        from qformat.kernels import load

        if self.dtype is F32:
            same: NDArray[np.float32] = self.data
            return same
        if self.dtype is F64:
            with np.errstate(all="ignore"):
                rounded: NDArray[np.float32] = self.data.astype(np.float32)
            return rounded
        if self.dtype in (F16, BF16):
            values = np.empty(self.data.shape, np.float32)
            widen = load("floats").f16_to_f32 if self.dtype is F16 else load("floats").bf16_to_f32
            widen(self.data.view(np.uint16).reshape(-1), values.reshape(-1))
            return values
        if self.dtype.floating:
            widened: NDArray[np.float32] = _f8_values(self.dtype.name)[self.data]
            return widened
        raise TypeError(f"{self.dtype.name} elements are not floats")

    def cast(self, dtype: DType) -> NDArray[Any]:
        """Return the values in the storage of another float dtype, rounded to nearest, ties to even.

        Raises
        ------
        TypeError
            If one of the two dtypes is not a float, or `dtype` is an eight-bit float.
        """
        import numpy as np

        from qformat.kernels import load

        if dtype is self.dtype:
            return self.data
        if dtype is F32:
            return self.to_f32()
        if dtype is F64:
            return self.to_f64()
        if dtype not in (F16, BF16):
            raise TypeError(f"{self.dtype.name} elements cannot be converted to {dtype.name}")
        if self.dtype is F64 and dtype is F16:
            with np.errstate(all="ignore"):
                halves: NDArray[Any] = self.data.astype(np.float16)
            return halves
        values = _to_odd(self.data) if self.dtype is F64 else self.to_f32()
        narrow = load("floats").f32_to_f16 if dtype is F16 else load("floats").f32_to_bf16
        rounded = np.empty(values.shape, np.uint16)
        narrow(values.reshape(-1), rounded.reshape(-1))
        return rounded.view(dtype.storage)

    def to_f64(self) -> NDArray[np.float64]:
        """Return the values as float64, in the same shape; exact."""
        import numpy as np

        doubles: NDArray[np.float64] = self.data if self.dtype is F64 else self.to_f32().astype(np.float64)
        return doubles

    def all_finite(self) -> bool:
        """Return whether no element is an infinity or a NaN."""
        import numpy as np

        from qformat.kernels import load

        if not self.dtype.floating:
            return True
        flat = self.data.reshape(-1)
        if self.dtype is F32:
            return bool(load("floats").peak_f32(flat) < 0x7F800000)
        if self.dtype in (F16, BF16):
            limit = 0x7C00 if self.dtype is F16 else 0x7F80
            return bool(load("floats").peak_16(flat.view(np.uint16)) < limit)
        values = flat if self.dtype is F64 else self.to_f32().reshape(-1)
        return bool(np.isfinite(values).all())


def _to_odd(doubles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return float32 values that round to a shorter format as the float64 ones would: rounded to odd (Boldo and Melquiond, 2008).

    An inexact value gets an odd last bit, so that it never looks like a tie of the shorter format.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = doubles.astype(np.float32)
    patterns = values.view(np.uint32)
    away = np.isfinite(values) & (np.abs(values) > np.abs(doubles))
    inexact = np.isfinite(values) & (values != doubles)
    return np.where(inexact, (patterns - away) | 1, patterns).astype(np.uint32).view(np.float32)


@cache
def _f8_values(name: str) -> NDArray[np.float32]:
    """Return the values of the 256 patterns of an eight-bit float."""
    import numpy as np

    code = np.arange(256)
    if name == "f8_e8m0":
        return np.append(np.ldexp(np.float32(1), code[:255] - 127), np.nan).astype(np.float32)
    mantissa_bits = 3 if name == "f8_e4m3" else 2
    bias = 7 if name == "f8_e4m3" else 15
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    if name == "f8_e4m3":
        value[(code & 0x7F) == 0x7F] = np.nan
    else:
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(code < 128, value, -value).astype(np.float32)


def from_array(array: NDArray[Any]) -> Elements:
    """Return the elements of a numpy array, also of ``ml_dtypes``' bfloat16 and float8.

    Raises
    ------
    TypeError
        If the format has no such dtype.
    """
    import numpy as np

    aliases = {"bfloat16": "bf16", "float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2", "float8_e8m0fnu": "f8_e8m0"}
    by_storage = {dtype.storage: dtype for dtype in DTYPES.values() if dtype.native}
    name = array.dtype.name
    dtype = DTYPES[aliases[name]] if name in aliases else by_storage.get(name)
    if dtype is None:
        raise TypeError(f"arrays of {name} cannot be stored")
    if name not in aliases:
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return Elements(dtype, np.ascontiguousarray(array).reshape(array.shape).view(dtype.storage))
