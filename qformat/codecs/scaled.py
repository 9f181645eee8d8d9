"""Integers with float scales and zeros for bands of rows and groups of columns (spec/codecs.md, "scaled")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.bands import Bands
from qformat.codecs.base import Codec
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.quantized import check_length
from qformat.codecs.registry import register
from qformat.dtypes import DTYPES
from qformat.kernels import load

_RUN = 32  # codes
_NOTHING = np.float32(-0.0)  # what no sum differs from: 0 would turn a sum of -0 into 0


@register
@dataclass(frozen=True)
class Scaled(Codec):
    """Integers whose scales and zero points are floats, as other tools store them.

    Parameters
    ----------
    bits
        Bits of a code.
    rows, cols
        How many rows and columns share a scale and a zero; or ``all``.
    scale, zero
        The dtypes of the scales and of the zeros; ``none`` without zeros.
    form
        ``add``: code times scale, plus zero; ``sub``: code less zero, times scale.
    offset
        What is first subtracted from a code.
    """

    id: ClassVar[str] = "scaled"

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = 4
    rows: int | Literal["all"] = 1
    cols: int | Literal["all"] = "all"
    scale: Literal["f16", "bf16", "f32"] = "f16"
    zero: Literal["f16", "bf16", "f32", "none"] = "f16"
    form: Literal["add", "sub"] = "add"
    offset: int = 0

    def __post_init__(self) -> None:
        self._bands.check()
        if not 0 <= self.offset < 1 << self.bits:
            raise ValueError(f"offset may be a number from 0 to {(1 << self.bits) - 1}, not {self.offset}")
        if self.zero == "none" and self.form != "add":
            raise ValueError("form is add if there are no zeros")

    def padded(self, cols: int) -> int:
        """Return the length of a row in whole runs of packed codes."""
        return -(-cols // _RUN) * _RUN

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of whole groups in whole runs; or of a row, if all chunks share the numbers of several groups."""
        cols = max(1, matrix.cols)
        if self.cols == "all" or self.cols >= cols:
            return _RUN
        return math.lcm(self.cols, _RUN) if self.rows == 1 else self.padded(cols)

    def layout(self, matrix: Matrix) -> Layout:
        """Return scales, zeros and bands of rows if there are any, and codes."""
        scales = self._bands.numbers("scales", DTYPES[self.scale], matrix)
        zeros = () if self.zero == "none" else (self._bands.numbers("zeros", DTYPES[self.zero], matrix),)
        return (scales, *zeros, *self._bands.places(matrix), Array("codes", 4 * self.bits, _RUN))

    @property
    def _bands(self) -> Bands:
        return Bands(self.rows, self.cols)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the rows of a chunk."""
        rows, cols = out.shape
        if not out.size:
            for part in parts:
                check_length(part, 0, "a tensor without elements")
            return
        scales = self._bands.read(parts[0], DTYPES[self.scale], "scales", rows, cols)
        if self.zero == "none":
            zeros, places = np.full_like(scales, _NOTHING), parts[1:-1]
        else:
            zeros, places = self._bands.read(parts[1], DTYPES[self.zero], "zeros", rows, cols), parts[2:-1]
        if zeros.shape != scales.shape:
            raise ValueError(f"{zeros.size} zeros where {scales.size} are needed")
        bands = self._bands.of_rows(places, rows, len(scales))
        check_length(parts[-1], rows * self.padded(cols) * self.bits // 8, "codes")
        codes, group = np.frombuffer(parts[-1], np.uint8), cols if self.cols == "all" else min(self.cols, cols)
        load("scaled").dequantize(
            scales.reshape(-1), zeros.reshape(-1), bands, codes, out, group, self.bits, self.offset, self.form == "sub"
        )
