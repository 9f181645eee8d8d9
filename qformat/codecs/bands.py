"""Bands of rows and groups of columns whose elements share numbers (spec/codecs.md, "fp8" and "scaled")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Array, Buffer, Matrix
from qformat.codecs.packed import LONGEST, cuts
from qformat.codecs.quantized import check_length
from qformat.dtypes import DType, Elements

_BAND = np.dtype("<u4")  # number of a band


@dataclass(frozen=True)
class Bands:
    """How many rows and columns share a number; or ``all``."""

    rows: int | Literal["all"]
    cols: int | Literal["all"]

    def check(self) -> None:
        """Raise `ValueError` if a size is impossible."""
        for size in (self.rows, self.cols):
            if size != "all" and not 0 < size <= LONGEST:
                raise ValueError(f"rows and cols may be all or a positive number up to {LONGEST}, not {size}")

    def groups(self, cols: int) -> int:
        """Return how many groups rows have that are not empty."""
        return 1 if self.cols == "all" else cuts(cols, self.cols)

    def numbers(self, name: str, dtype: DType, matrix: Matrix) -> Array:
        """Return the segment with a number for each band and group; part of a row can be cut from it only if `rows` is 1."""
        row = max(1, matrix.cols)
        if self.rows == 1:
            return Array(name, dtype.size, row if self.cols == "all" else self.cols)
        bands = cuts(matrix.rows, max(1, matrix.rows) if self.rows == "all" else self.rows)
        return Array(name, bands * self.groups(matrix.cols) * dtype.size if matrix.cols else 0, None)

    def places(self, matrix: Matrix) -> tuple[Array, ...]:
        """Return the segment that lists the band of each row, if there is one."""
        return (Array("bands", _BAND.itemsize, max(1, matrix.cols)),) if self.listed else ()

    @property
    def listed(self) -> bool:
        """Whether a segment lists the band of each row."""
        return self.rows not in (1, "all")

    def read(self, stored: Buffer, dtype: DType, name: str, rows: int, cols: int) -> NDArray[np.float32]:
        """Return the numbers of a chunk, [bands, groups]; raise `ValueError` if their length is wrong."""
        band = self.groups(cols) * dtype.size if cols else 0
        bands = {1: rows, "all": 1}.get(self.rows, len(stored) // max(1, band))
        check_length(stored, bands * band, name)
        return Elements(dtype, np.frombuffer(stored, dtype.storage)).to_f32().reshape(bands, self.groups(cols))

    def of_rows(self, places: Sequence[Buffer], rows: int, bands: int) -> NDArray[Any]:
        """Return the band of each row of a chunk, given the part that lists it, if any; raise `ValueError` if one is missing."""
        if not self.listed:
            return np.arange(rows, dtype=_BAND) if self.rows == 1 else np.zeros(rows, _BAND)
        check_length(places[0], _BAND.itemsize * rows, "bands")
        listed = np.frombuffer(places[0], _BAND)
        if listed.max(initial=0) >= bands:
            raise ValueError(f"a row is in band {listed.max()} of {bands}")
        return listed
