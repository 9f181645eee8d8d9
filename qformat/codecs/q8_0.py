"""GGUF's Q8_0: blocks of 32 eight-bit codes with one binary16 scale (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qformat.codecs.blocks import BlockCodec
from qformat.codecs.registry import register


@register
@dataclass(frozen=True)
class Q8_0(BlockCodec):  # noqa: N801  the format's name
    """Blocks of 32 eight-bit codes with a scale, the largest magnitude over 127 as in GGUF: 8.5 bits per weight."""

    id: ClassVar[str] = "q8_0"
