"""GGUF's Q4_0: blocks of 32 four-bit codes with one binary16 scale (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qformat.codecs.base import option
from qformat.codecs.blocks import SearchedBlockCodec
from qformat.codecs.registry import register


@register
@dataclass(frozen=True)
class Q4_0(SearchedBlockCodec):  # noqa: N801  the format's name
    """Blocks of 32 four-bit codes with a scale: 4.5 bits per weight.

    Parameters
    ----------
    search
        How the scale is chosen: ``naive`` divides the weight of largest magnitude by -8, as GGUF does; ``table`` takes the best
        of twelve divisors, refined by least squares; ``exact`` the scale of least squared error among all binary16 numbers.
    """

    id: ClassVar[str] = "q4_0"
    codes: ClassVar[int] = 16

    search: Literal["naive", "table", "exact"] = option("table")
