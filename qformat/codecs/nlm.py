"""Non-linear mappings: blocks with a range, a minimum and one of four rows of 16 levels (spec/codecs.md, "nlm")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import option
from qformat.codecs.blocks import BlockCodec
from qformat.codecs.layout import Buffer
from qformat.codecs.quantized import check_length
from qformat.codecs.registry import register
from qformat.kernels import load


@register
@dataclass(frozen=True)
class Nlm(BlockCodec):
    """Blocks of four-bit codes on one of four non-linear rows of levels, with a range and a minimum: 4.75 bits per weight.

    Parameters
    ----------
    block
        Weights of a block.
    optimize
        Criterion for the mapping, range and minimum of a block: least squared error (``rmse``) or least maximum error (``max``).
    """

    id: ClassVar[str] = "nlm"
    pads_with_zeros: ClassVar[bool] = False
    codes: ClassVar[int] = 16
    header_bytes: ClassVar[int] = 3

    block: Literal[32, 64, 128] = 32
    optimize: Literal["rmse", "max"] = option("rmse")

    @property
    def block_size(self) -> int:
        """Elements of a block."""
        return self.block

    @property
    def takes_bf16(self) -> bool:
        """False: the searches take float32 only."""
        return False

    def _fill(
        self, x: NDArray[Any], blocks: NDArray[np.uint8], lanes: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        search = load("nlm_search")
        headers = np.empty(x.size // self.block, np.uint32)
        (search.maximum if self.optimize == "max" else search.rmse)(x, headers, self.block)
        measured: tuple[int, int, int, int] = self.kernels.encode(x, headers, blocks, lanes, self.block)
        return measured

    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        check_length(parts[0], out.size // self.block * self.block_bytes, "blocks")
        self.kernels.dequantize(np.frombuffer(parts[0], np.uint8), out.reshape(-1), self.block)

    def _counts(self, blocks: NDArray[np.uint8]) -> dict[str, NDArray[np.int64]]:
        counts = {"histogram": np.zeros(16, np.int64), "mappings": np.zeros(4, np.int64)}
        self.kernels.code_histogram(blocks, counts["histogram"], self.block)
        self.kernels.mapping_histogram(blocks, counts["mappings"], self.block)
        return counts
