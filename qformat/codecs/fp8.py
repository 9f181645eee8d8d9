"""Eight-bit floats with scales for bands of rows and groups of columns (spec/codecs.md, "fp8")."""

from __future__ import annotations

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
from qformat.dtypes import DTYPES, DType, Elements


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
        self._bands.check()

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the columns of a row."""
        return max(1, matrix.cols)

    def layout(self, matrix: Matrix) -> Layout:
        """Return scales, bands of rows if they are listed, and codes."""
        scales = self._bands.numbers("scales", self._scale, matrix)
        return (scales, *self._bands.places(matrix), Array("codes", 1))

    @property
    def _bands(self) -> Bands:
        return Bands(self.rows, self.cols)

    @property
    def _scale(self) -> DType:
        return DTYPES[self.scale]

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode whole rows."""
        rows, cols = out.shape
        scales = self._bands.read(parts[0], self._scale, "scales", rows, cols)
        if self._bands.listed:
            scales = scales[self._bands.of_rows(parts[1:-1], rows, len(scales))]
        check_length(parts[-1], out.size, "codes")
        codes = np.frombuffer(parts[-1], np.uint8).reshape(out.shape)
        values = Elements(DTYPES[f"f8_{self.format}"], np.arange(256, dtype=np.uint8)).to_f32()
        np.take(values, codes, out=out, mode="clip")  # faster than a check of indices, which cannot be out of range
        if self.cols != "all" and scales.shape[1] > 1:
            scales = np.repeat(scales, self.cols, axis=1)[:, :cols]
        with np.errstate(all="ignore"):
            np.multiply(out, scales, out=out)
