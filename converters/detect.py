"""Find out what a path holds."""

from __future__ import annotations

from pathlib import Path

from qformat.errors import SourceError
from qformat.source import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at a path: a Hugging Face directory or a single .safetensors file.

    Raises
    ------
    SourceError
        If there is none, or none that can be read.
    """
    from qformat.converters.hf import open_hf
    from qformat.converters.safetensors import open_safetensors

    if path.is_dir():
        return open_hf(path)
    if not path.exists():
        raise SourceError(f"{path}: there is no such file or directory")
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{":
        return Checkpoint(open_safetensors(path))
    if not start:
        raise SourceError(f"{path}: the file is empty")
    raise SourceError(f"{path}: not a safetensors file; give one, or a directory with safetensors weights")
