"""What a user may say of how a checkpoint shall be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qformat.quality import Quality


@dataclass(frozen=True)
class SourceOptions:
    """How to read a checkpoint.

    Attributes
    ----------
    quality
        How much to read of the layered tensors of a container file.
    state_dict_key
        Which state dict of a torch checkpoint to take: keys from the outside to the inside with dots between them, ``"."`` for all.
    gptq_format
        How GPTQ's zeros are stored, whatever the checkpoint says.
    """

    quality: Quality = field(default_factory=Quality)
    state_dict_key: str | None = None
    gptq_format: Literal["v1", "v2"] | None = None

    def __str__(self) -> str:
        """Return the same text for the same options, empty for the defaults."""
        key = "" if self.state_dict_key is None else f"state_dict_key={self.state_dict_key!r}"
        gptq = "" if self.gptq_format is None else f"gptq_format={self.gptq_format}"
        return " ".join(text for text in (key, gptq) if text)
