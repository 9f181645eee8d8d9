"""Eight-bit floats with scales for bands of rows and groups of columns (spec/codecs.md, "fp8")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Codec
from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.packed import LONGEST, cuts
from qformat.codecs.quantized import check_length
from qformat.codecs.registry import register
from qformat.dtypes import DTYPES, DType, Elements

_BAND = np.dtype("<u4")  # number of a band


@register
@dataclass(frozen=True)
class Fp8(Codec):
    """Eight-bit floats times a scale.

    Parameters
    ----------
    format
        Which eight-bit floats.
    rows, cols
        How many rows and columns share a scale; or ``all``.
    scale
        The dtype of the scales.
    """

    id: ClassVar[str] = "fp8"

    format: Literal["e4m3", "e5m2"] = "e4m3"
    rows: int | Literal["all"] = "all"
    cols: int | Literal["all"] = "all"
    scale: Literal["f16", "bf16", "f32"] = "f32"

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size != "all" and not 0 < size <= LONGEST:
                raise ValueError(f"rows and cols may be all or a positive number up to {LONGEST}, not {size}")

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of a row."""
        return max(1, matrix.cols)

    def layout(self, matrix: Matrix) -> Layout:
        """Return scales, bands of rows if they are listed, and codes."""
        row, band = max(1, matrix.cols), self._band_bytes(matrix.cols)
        bands = cuts(matrix.rows, max(1, matrix.rows) if self.rows == "all" else self.rows)
        scales = Array("scales", band, row) if self.rows == 1 else Array("scales", bands * band, None)
        places = (Array("bands", _BAND.itemsize, row),) if self._listed else ()
        return (scales, *places, Array("codes", 1))

    @property
    def _listed(self) -> bool:
        """Whether a segment lists the band of each row."""
        return self.rows not in (1, "all")

    @property
    def _scale(self) -> DType:
        return DTYPES[self.scale]

    def _groups(self, cols: int) -> int:
        return 1 if self.cols == "all" else cuts(cols, self.cols)

    def _band_bytes(self, cols: int) -> int:
        """Return the bytes of a band's scales, in rows that are not empty."""
        return self._groups(cols) * self._scale.size if cols else 0

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode whole rows."""
        scales = self._scales_of_rows(parts, *out.shape)
        check_length(parts[-1], out.size, "codes")
        codes = np.frombuffer(parts[-1], np.uint8).reshape(out.shape)
        values = Elements(DTYPES[f"f8_{self.format}"], np.arange(256, dtype=np.uint8)).to_f32()
        np.take(values, codes, out=out, mode="clip")  # faster than a check of indices, which cannot be out of range
        if self.cols != "all" and scales.shape[1] > 1:
            scales = np.repeat(scales, self.cols, axis=1)[:, : out.shape[1]]
        with np.errstate(all="ignore"):
            np.multiply(out, scales, out=out)

    def _scales_of_rows(self, parts: Sequence[Buffer], rows: int, cols: int) -> NDArray[np.float32]:
        """Return the scales of each row, or a single row of scales that all rows share."""
        stored = parts[0]
        bands = {1: rows, "all": 1}.get(self.rows, len(stored) // max(1, self._band_bytes(cols)))
        check_length(stored, bands * self._band_bytes(cols), "scales")
        scales = Elements(self._scale, np.frombuffer(stored, self._scale.storage)).to_f32()
        scales = scales.reshape(bands, self._groups(cols))
        if not self._listed:
            return scales
        check_length(parts[1], _BAND.itemsize * rows, "bands")
        places = np.frombuffer(parts[1], _BAND)
        if places.max(initial=0) >= bands:
            raise ValueError(f"a row is in band {places.max()} of {bands}")
        return scales[places]
