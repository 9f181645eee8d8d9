"""GGUF's Q5_1: blocks of 32 five-bit codes with a binary16 scale and minimum (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qformat.codecs.blocks import BlockCodec
from qformat.codecs.registry import register


@register
@dataclass(frozen=True)
class Q5_1(BlockCodec):  # noqa: N801  the format's name
    """Blocks of 32 five-bit codes with a scale and a minimum, spread over all weights as in GGUF: 6 bits per weight."""

    id: ClassVar[str] = "q5_1"
    pads_with_zeros: ClassVar[bool] = False
    codes: ClassVar[int] = 32
    header_bytes: ClassVar[int] = 4
