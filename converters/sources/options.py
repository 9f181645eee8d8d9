"""Options of reading a checkpoint."""

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
        The state dict of a torch checkpoint to read: keys from the outermost to the innermost with dots between them, ``"."`` for
        everything.
    gptq_format
        How the zero points of GPTQ are stored, whatever the checkpoint says.
    root
        The root that a container file must have.
    """

    quality: Quality = field(default_factory=Quality)
    state_dict_key: str | None = None
    gptq_format: Literal["v1", "v2"] | None = None
    root: str | None = None

    def __str__(self) -> str:
        """Return the options that decide what tensors hold; empty for the defaults."""
        key = "" if self.state_dict_key is None else f"state_dict_key={self.state_dict_key!r}"
        gptq = "" if self.gptq_format is None else f"gptq_format={self.gptq_format}"
        return " ".join(text for text in (key, gptq) if text)
