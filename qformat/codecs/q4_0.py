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
    """Four bits and a sixteenth of a binary16 for each weight.

    Parameters
    ----------
    search
        How the scale is chosen: ``naive`` takes the largest weight over -8, as GGUF does; ``table`` the best of a few
        divisors, refined by least squares; ``exact`` the best scale there is.
    """

    id: ClassVar[str] = "q4_0"
    codes: ClassVar[int] = 16

    search: Literal["naive", "table", "exact"] = option("table")
