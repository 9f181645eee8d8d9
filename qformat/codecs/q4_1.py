"""GGUF's Q4_1: blocks of 32 four-bit codes with a binary16 scale and minimum (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qformat.codecs.base import option
from qformat.codecs.blocks import SearchedBlockCodec
from qformat.codecs.registry import register


@register
@dataclass(frozen=True)
class Q4_1(SearchedBlockCodec):  # noqa: N801  the format's name
    """Blocks of 32 four-bit codes with a scale and a minimum: 5 bits per weight.

    Parameters
    ----------
    search
        How scale and minimum are chosen: ``naive`` spreads the codes from the smallest weight to the largest, as GGUF does;
        ``als`` refines several starts by alternating least squares; ``best`` many more, close to the optimum.
    """

    id: ClassVar[str] = "q4_1"
    pads_with_zeros: ClassVar[bool] = False
    codes: ClassVar[int] = 16
    chosen: ClassVar[int] = 2
    header_bytes: ClassVar[int] = 4

    search: Literal["naive", "als", "best"] = option("als")
