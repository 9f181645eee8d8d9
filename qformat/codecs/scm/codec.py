"""Significance coding in layers: read at any number of bits, up to losslessly (spec/codecs.md, "`scm`")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from qformat.codecs.base import Codec
from qformat.codecs.layout import Array, Buffer, Chunks, Layout, Matrix
from qformat.codecs.registry import register
from qformat.codecs.scm.grid import Grid
from qformat.codecs.scm.planes import Decoder
from qformat.codecs.scm.residual import read_residual
from qformat.dtypes import BF16, F16, F32, DType

_MOST_LAYERS = 64


@register
@dataclass(frozen=True)
class Scm(Codec):
    """A grid of cells, layers that narrow down the cell of each weight, and the residual that makes the tensor lossless.

    Parameters
    ----------
    layers
        Number of layers.
    lossless
        Whether the residual is stored.
    """

    id: ClassVar[str] = "scm"

    layers: int
    lossless: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= _MOST_LAYERS:
            raise ValueError(f"layers may be a number from 1 to {_MOST_LAYERS}, not {self.layers}")

    def decoded_from(self, dtype: DType) -> DType:
        """Return the dtype of the source with the residual, else float32."""
        return dtype if self.lossless else F32

    def accepts(self, dtype: DType) -> bool:
        """Return whether these are binary16, bfloat16 or binary32."""
        return dtype in (F16, BF16, F32)

    def is_lossless(self, dtype: DType) -> bool:
        """Return whether the residual is stored."""
        return self.lossless

    def layout(self, matrix: Matrix) -> Layout:
        """Return the grid, the layers and the residual."""
        layers = (Chunks(f"layer.{n}", None, dense=n == 1, layer=True) for n in range(1, self.layers + 1))
        residual = (Chunks("rest", None, dense=False),) if self.lossless else ()
        return (Array("grid", Grid.SIZE, None), *layers, *residual)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode a chunk from the grid, its layers and its residual."""
        grid = Grid.parse(bytes(parts[0]))
        decoder = Decoder.of(parts[1 : self.layers + 1], out.size)
        if not self.lossless:
            decoder.values(grid, out.reshape(-1))
            return
        dtype = {"float16": F16, "uint16": BF16, "float32": F32}[out.dtype.name]
        read_residual(parts[-1], decoder, grid, dtype, out)
