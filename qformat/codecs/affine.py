"""Integers with a scale for each group of columns (spec/codecs.md, "affine")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import optional
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.packed import LONGEST, PackedCodec, cuts
from qformat.codecs.quantized import Quantized, check_length
from qformat.codecs.registry import register
from qformat.dtypes import DTYPES, F32, Elements
from qformat.kernels import load

_INDEX = np.dtype("<u4")  # number of a group
_KINDS = {"f16": 0, "bf16": 1, "f32": 2}  # of scales, for the kernels

# Starts of the search, by number of bits. Symmetric: levels on which the value of largest magnitude is placed.
_EXTREMES = {
    2: (-2.0, -1.6, -1.2, -2.4, -2.8, -3.2, 1.0, 1.3, 0.8, 1.6, 2.2, 2.7, 3.2),
    3: (-4.0, -3.5, -3.1, -4.4, -4.9, -5.5, -6.2, 3.0, 2.6, 3.4, 3.9, 4.5, 5.2),
    4: (-8.0, -7.4, -7.0, -6.6, -8.6, -9.3, -10.1, -11.5, 7.0, 6.6, 6.2, 7.6, 8.3, 9.2),
    8: (-128.0, -127.6, -127.2, -126.7, -128.5, -129.0, -130.0, 127.0, 126.6, 126.2, 127.5, 128.0, 129.0),
}
# Asymmetric: numbers of steps into which the range of values is divided.
_STEPS = {
    2: (3.0, 3.6, 4.2, 4.9, 5.6, 6.5, 2.5),
    3: (7.0, 7.6, 8.2, 8.9, 9.7, 10.8, 6.4),
    4: (15.0, 15.9, 16.9, 18.0, 19.5, 14.3, 13.6),
    8: (255.0, 254.0, 256.0, 257.0, 253.0, 258.0, 251.5),
}


@register
@dataclass(frozen=True)
class Affine(PackedCodec):
    """Integers of 2, 3, 4 or 8 bits with a scale, and possibly a zero point, per group of columns.

    Parameters
    ----------
    bits
        Bits of a code.
    group
        Columns that share a scale, a multiple of 32; or ``row``.
    sym
        Whether the zero point is the middle code and is not stored.
    scale
        Dtype of the scales.
    act_order
        Whether a segment lists the group of each column, as GPTQ's ``g_idx`` does; groups may then have any size. Only copied.
    """

    id: ClassVar[str] = "affine"

    bits: Literal[2, 3, 4, 8] = 4
    group: int | Literal["row"] = 128
    sym: bool = True
    scale: Literal["f16", "bf16", "f32"] = "f16"
    act_order: bool = optional(False, copied=True)

    def __post_init__(self) -> None:
        multiple = 1 if self.act_order else 32
        if (self.group == "row" and self.act_order) or (
            self.group != "row" and (self.group % multiple or not 0 < self.group <= LONGEST)
        ):
            words = "a positive number" if self.act_order else "row or a positive multiple of 32"
            raise ValueError(f"group may be {words} up to {LONGEST}, not {self.group}")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of a group; or whole rows, if they are not longer or the columns of a group are scattered."""
        cols = max(1, matrix.cols)
        return self.padded(cols if self.act_order else self._columns(cols))

    def layout(self, matrix: Matrix) -> Layout:
        """Return scales, zeros and groups of columns if there are any, and codes."""
        columns = self._columns(max(1, matrix.cols))
        zeros = () if self.sym else (Array("zeros", 1, columns),)
        places = (Array("g_idx", _INDEX.itemsize * matrix.cols, None),) if self.act_order else ()
        return (Array("scales", self._scale.size, columns), *zeros, *places, self._code_array)

    @property
    def _scale(self) -> Any:
        return DTYPES[self.scale]

    def _columns(self, cols: int) -> int:
        """Return the columns of a group in rows of `cols`."""
        return cols if self.group == "row" else min(self.group, cols)

    def _quantize(self, values: NDArray[Any], cols: int, fitted: Any) -> Quantized:
        assert not self.act_order
        x = values.reshape(-1)
        group = self.padded(self._columns(cols))
        groups = len(values) * cuts(values.shape[1], group)
        scales = np.empty(groups, np.float32)
        zeros = np.full(groups, 1 << (self.bits - 1), np.uint8)
        search, kind = load("affine_search"), _KINDS[self.scale]
        if self.sym:
            search.symmetric(x, cols, group, self.bits, kind, np.array(_EXTREMES[self.bits], np.float32), scales)
        else:
            search.asymmetric(x, cols, group, self.bits, kind, np.array(_STEPS[self.bits], np.float32), scales, zeros)
        codes = np.empty(self._code_bytes(x.size), np.uint8)
        lanes = np.zeros(load("blocks").LANES)
        peak, largest, zeroed = load("affine").encode(x, cols, group, scales, zeros, codes, lanes, self.bits)
        overflowed = int((~np.isfinite(scales)).sum())
        with np.errstate(all="ignore"):
            zeroed += int(((scales != 0) & np.isinf(1 / scales)).sum())  # no code can be found with these
        stored = Elements(F32, scales).cast(self._scale)
        parts = (stored.data.cast("B"), *(() if self.sym else (zeros.data,)), codes.data)
        return Quantized(parts, lanes, peak, largest, overflowed, zeroed)

    def _decode_rows(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        if not self.act_order:
            super()._decode_rows(parts, out)
            return
        rows, cols = out.shape
        assert self.group != "row"
        each = cuts(cols, self.group)
        check_length(parts[-2], _INDEX.itemsize * cols, "groups of columns")
        places = np.frombuffer(parts[-2], _INDEX)
        if places.max(initial=0) >= each:
            raise ValueError(f"a column is in group {places.max()} of {each}")
        scales, zeros, codes = self._numbers(parts, rows * each, rows * self.padded(cols))
        load("affine").dequantize_mapped(scales, zeros, places, codes, out, self.bits)

    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        padded = out.shape[1]
        group = padded if self.group == "row" else self.group
        scales, zeros, codes = self._numbers(parts, len(out) * cuts(padded, group), out.size)
        load("affine").dequantize(scales, zeros, codes, out.reshape(-1), padded, group, self.bits)

    def _numbers(self, parts: Sequence[Buffer], groups: int, elements: int) -> tuple[Any, Any, Any]:
        """Return scales in float32, zeros and packed codes."""
        check_length(parts[0], groups * self._scale.size, "scales")
        check_length(parts[-1], self._code_bytes(elements), "codes")
        scales = Elements(self._scale, np.frombuffer(parts[0], self._scale.storage)).to_f32()
        if self.sym:
            zeros = np.full(groups, 1 << (self.bits - 1), np.uint8)
        else:
            check_length(parts[1], groups, "zeros")
            zeros = np.frombuffer(parts[1], np.uint8)
        return scales, zeros, np.frombuffer(parts[-1], np.uint8)
