"""GGUF's Q4_0: blocks of 32 four-bit codes with one binary16 scale (spec/codecs.md, "Blocks")."""

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
class Q4_0(BlockCodec):  # noqa: N801  the format's name
    """Four bits and a sixteenth of a binary16 for each weight.

    Parameters
    ----------
    search
        How the scale is chosen: ``naive`` takes the largest weight over -8, as GGUF does; ``table`` the best of eight divisors,
        refined by least squares; ``exact`` the best scale there is.
    """

    id: ClassVar[str] = "q4_0"
    codes: ClassVar[int] = 16

    search: Literal["naive", "table", "exact"] = encoder_option("table")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return 18

    @property
    def takes_bf16(self) -> bool:
        """The naive kernel does."""
        return self.search == "naive"

    def _fill(
        self, x: NDArray[Any], blocks: NDArray[np.uint8], lanes: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        if self.search == "naive":
            return super()._fill(x, blocks, lanes)
        scales = np.empty(x.size // 32, np.uint16)
        getattr(load("q4_0_search"), self.search)(x, scales)
        measured: tuple[int, int, int, int] = self.kernels.encode(x, scales, blocks, lanes)
        return measured
