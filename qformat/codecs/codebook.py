"""Codes of a table, times a scale and maybe a factor (spec/codecs.md, "codebook")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Codec, optional
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.packed import LONGEST, cuts
from qformat.codecs.quantized import check_length
from qformat.codecs.registry import register
from qformat.dtypes import DTYPES, F32, DType, Elements
from qformat.kernels import load

_START = np.dtype("<u8")  # position of the first element of a row
_RUN = 32  # rows of packed codes are padded to a multiple of this number
_UNIT = 16  # groups are a multiple of this number of elements


@register
@dataclass(frozen=True)
class Codebook(Codec):
    """Codes that index a table, with a scale for each group.

    Parameters
    ----------
    bits
        Bits of a code.
    group
        Elements that share a scale, a multiple of 16; or ``row``.
    flat
        Whether groups are runs of elements of the tensor rather than of a row.
    scale
        Dtype of the scales.
    factor
        What the factor for the whole tensor multiplies, the ``scale`` or the ``value``; or it is a ``divisor`` of scales; or there
        is ``none``.
    transposed
        Whether each row of the tensor is a matrix that is stored transposed: then the length of its columns, else 0.
    """

    id: ClassVar[str] = "codebook"

    bits: Literal[4, 8] = 4
    group: int | Literal["row"] = 64
    flat: bool = False
    scale: Literal["f32", "f16", "bf16", "f8_e4m3", "f8_e8m0"] = "f32"
    factor: Literal["none", "scale", "divisor", "value"] = "none"
    transposed: int = optional(0)

    def __post_init__(self) -> None:
        if self.group == "row":
            if self.flat:
                raise ValueError("flat groups need a number of elements")
        elif self.group % _UNIT or not 0 < self.group <= LONGEST:
            raise ValueError(f"group may be row or a positive multiple of {_UNIT} up to {LONGEST}, not {self.group}")
        if not 0 <= self.transposed < 1 << 31 or (self.transposed and self.flat):
            raise ValueError(
                f"transposed may be a positive number below 2^31, without flat groups, not {self.transposed}"
            )

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of whole groups and runs of codes; or of a row."""
        row = cuts(max(1, matrix.cols), _RUN) * _RUN
        if self.group == "row" or self.flat or self.transposed:
            return row
        return min(row, math.lcm(self.group, _RUN))

    def layout(self, matrix: Matrix) -> Layout:
        """Return the table, the factor if there is one, scales, starts of rows if groups are flat, and codes."""
        row, size = max(1, matrix.cols), self._scale.size
        factor = () if self.factor == "none" else (Array("factor", F32.size, None),)
        scales = Array("scales", size, row if self.group == "row" else self.group)
        starts: tuple[Array, ...] = ()
        if self.flat:
            assert self.group != "row"
            scales = Array("scales", size * cuts(matrix.elements, self.group), None)
            starts = (Array("starts", _START.itemsize, row),)
        return (
            Array("table", F32.size << self.bits, None),
            *factor,
            scales,
            *starts,
            Array("codes", 4 * self.bits, _RUN),
        )

    @property
    def _scale(self) -> DType:
        return DTYPES[self.scale]

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode whole rows, or a part of one that begins with a group."""
        rows, cols = out.shape
        group = cols if self.group == "row" else self.group
        if self.transposed and cols % self.transposed:
            raise ValueError(f"rows of {cols} elements are no matrices with columns of {self.transposed}")
        check_length(parts[0], F32.size << self.bits, "table")
        check_length(parts[-1], rows * cuts(cols, _RUN) * 4 * self.bits, "codes")
        table = _finite(np.frombuffer(parts[0], "<f4"), "table")
        scales, factor = self._factors(parts)
        starts = self._starts(parts, rows, cols, group, scales.size)
        codes = np.frombuffer(parts[-1], np.uint8)
        values = np.empty((rows, cols), np.float32) if self.transposed else out
        load("codebook").dequantize(table, scales, factor, starts, codes, values, group, self.bits)
        if self.transposed:
            turned = values.reshape(rows, cols // self.transposed, self.transposed).transpose(0, 2, 1)
            out.reshape(turned.shape)[:] = turned

    def _factors(self, parts: Sequence[Buffer]) -> tuple[NDArray[np.float32], np.float32]:
        """Return the number that the entries of each group are multiplied by, and the factor of their products."""
        stored = parts[1 if self.factor == "none" else 2]
        if len(stored) % self._scale.size:
            raise ValueError(f"{len(stored)} bytes of scales where whole numbers are needed")
        scales = Elements(self._scale, np.frombuffer(stored, self._scale.storage)).to_f32()
        one = np.float32(1)
        if self.factor == "none":
            return scales, one
        check_length(parts[1], F32.size, "factor")
        factor = _finite(np.frombuffer(parts[1], "<f4"), "factor")[0]
        with np.errstate(all="ignore"):  # writers refuse what overflows
            if self.factor == "scale":
                return scales * factor, one
            return (scales / factor, one) if self.factor == "divisor" else (scales, factor)

    def _starts(self, parts: Sequence[Buffer], rows: int, cols: int, group: int, scales: int) -> NDArray[np.int64]:
        """Return the position of the first element of each row among those that the groups are runs of."""
        if not self.flat:
            each = cuts(cols, max(1, group))
            check_length(parts[-2], rows * each * self._scale.size, "scales")
            return np.arange(rows, dtype=np.int64) * (each * group)
        check_length(parts[-2], rows * _START.itemsize, "starts of rows")
        starts = np.frombuffer(parts[-2], _START).copy()  # an index: checked as it is used
        if starts.size and int(starts.max()) + cols > scales * group:
            raise ValueError(f"a row begins at element {starts.max()} of {scales * group} that have scales")
        return starts.astype(np.int64)


def _finite(numbers: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    """Return numbers; raise `ValueError` if one is infinite or NaN."""
    if not np.isfinite(numbers).all():
        raise ValueError(f"the {what} holds NaN or infinity")
    return numbers
