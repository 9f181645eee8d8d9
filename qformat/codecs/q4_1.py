"""GGUF's Q4_1: blocks of 32 four-bit codes with a binary16 scale and minimum (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import encoder_option
from qformat.codecs.blocks import BlockCodec
from qformat.codecs.registry import register
from qformat.kernels import load


@register
@dataclass(frozen=True)
class Q4_1(BlockCodec):  # noqa: N801  the format's name
    """Five bits for each weight.

    Parameters
    ----------
    search
        How scale and minimum are chosen: ``naive`` lets the codes run from the smallest weight to the largest, as GGUF does;
        ``als`` refines several such choices by least squares; ``best`` does so with many more and comes close to the optimum.
    """

    id: ClassVar[str] = "q4_1"
    keeps_zeros: ClassVar[bool] = False
    codes: ClassVar[int] = 16

    search: Literal["naive", "als", "best"] = encoder_option("als")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return 20

    @property
    def takes_bf16(self) -> bool:
        """The searches do not."""
        return self.search == "naive"

    def _fill(
        self, x: NDArray[Any], blocks: NDArray[np.uint8], lanes: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        if self.search == "naive":
            return super()._fill(x, blocks, lanes)
        scales, minima = (np.empty(x.size // self.unit, np.uint16) for _ in range(2))
        getattr(load("q4_1_search"), self.search)(x, scales, minima)
        measured: tuple[int, int, int, int] = self.kernels.encode(x, scales, minima, blocks, lanes)
        return measured
