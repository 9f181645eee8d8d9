"""GGUF's Q5_0: blocks of 32 five-bit codes with one binary16 scale (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qformat.codecs.blocks import BlockCodec
from qformat.codecs.registry import register


@register
@dataclass(frozen=True)
class Q5_0(BlockCodec):  # noqa: N801  the format's name
    """Blocks of 32 five-bit codes with a scale, the weight of largest magnitude over -16 as in GGUF: 5.5 bits per weight."""

    id: ClassVar[str] = "q5_0"
    codes: ClassVar[int] = 32
