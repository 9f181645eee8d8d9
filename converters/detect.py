"""Find out what a path holds."""

from __future__ import annotations

import re
from pathlib import Path

from qformat.container.layout import MAGIC
from qformat.errors import QualityError, SourceError
from qformat.files import open_regular
from qformat.quality import Quality
from qformat.source import Checkpoint


def open_checkpoint(path: Path, quality: Quality | None = None) -> Checkpoint:
    """Return the checkpoint at a path: a Hugging Face directory, a single .safetensors file, or a container file.

    Parameters
    ----------
    path
        The file or directory.
    quality
        How much to read of the layered tensors of a container file.

    Raises
    ------
    SourceError
        If there is none, or none that can be read.
    QualityError
        If a quality is given for something else than layered tensors.
    """
    from qformat.converters.container import open_container
    from qformat.converters.hf import open_hf
    from qformat.converters.safetensors import open_safetensors

    quality = quality or Quality()
    if path.is_dir():
        _check_quality(path, quality)
        return open_hf(path)
    if not path.exists():
        raise SourceError(f"{path}: there is no such file or directory")
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith(MAGIC):
        return open_container(path, quality)
    _check_quality(path, quality)
    if len(start) == 9 and start[8:] == b"{":
        return Checkpoint(open_safetensors(path), warnings=_alone(path), files=[path])
    if not start:
        raise SourceError(f"{path}: the file is empty")
    raise SourceError(f"{path}: not a safetensors file; give one, a directory with safetensors weights, or a .qf file")


def _check_quality(path: Path, quality: Quality) -> None:
    if quality != Quality():
        raise QualityError(
            f"{path}: is no .qf file, whose layered tensors could be read at a quality; to store weights at one, give it with "
            "the type, as in -t scm:bpw=3"
        )


def _alone(path: Path) -> list[str]:
    shard = re.search(r"-[0-9]+-of-0*([0-9]+)\.", path.name)
    if shard and int(shard[1]) > 1:
        return [f"{path.name} is one shard of {shard[1]}: give its directory for the whole model"]
    if (path.parent / "config.json").exists():
        return [
            f"only the tensors of {path.name} are taken; give its directory to take its config.json and tokenizer too"
        ]
    return []
