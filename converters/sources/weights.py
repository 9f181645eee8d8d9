"""One file of weights, of the kind that its first bytes say."""

from __future__ import annotations

from pathlib import Path

from qformat.converters.sources.ctranslate2 import is_ctranslate2, open_ctranslate2
from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.safetensors import open_safetensors
from qformat.errors import SourceError, install_hint
from qformat.files import open_regular
from qformat.pipeline.source import Checkpoint

_ZIP = b"PK"
_LEGACY = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save puts first into the older format, after the pickle's version
)
_PICKLE = b"\x80"
# What downloads leave in place of weights
_INSTEAD = {
    b"version https://git-lfs": "is a pointer to a file that Git LFS keeps; fetch it with git lfs pull",
    b"<!doctype": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
}


def first_bytes(path: Path) -> bytes:
    """Return the start of a file, enough to tell what it is.

    Raises
    ------
    SourceError
        If it is no file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read(32)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None


def open_weights(path: Path, options: SourceOptions, *, shard: bool = False) -> Checkpoint:
    """Return the checkpoint in one .safetensors, torch or CTranslate2 file.

    Parameters
    ----------
    path
        The file.
    options
        How to read it.
    shard
        Whether it is one of several.

    Raises
    ------
    SourceError
        If it is neither, damaged, or holds what cannot be stored.
    """
    if not path.is_file():
        raise SourceError(f"{path}: is not a file")
    start = first_bytes(path)
    for known, what in _INSTEAD.items():
        if start.lower().startswith(known):
            raise SourceError(f"{path}: {what}")
    safetensors = start[8:9] == b"{"
    if not safetensors and (start.startswith(_ZIP) or start[2:].startswith(_LEGACY)):
        try:
            from qformat.converters.sources.torch import open_torch
        except ImportError:
            raise SourceError(f"{path}: torch is needed to read it; {install_hint('torch')}") from None
        return open_torch(path, options, shard=shard)
    if safetensors or path.suffix == ".safetensors":
        check_no_key(path, options)
        return Checkpoint(open_safetensors(path), files=[path])
    if is_ctranslate2(start):
        check_no_key(path, options)
        return open_ctranslate2(path)
    if not start:
        raise SourceError(f"{path}: the file is empty; download it again")
    if start.startswith(_PICKLE):
        raise SourceError(
            f"{path}: is a pickle, but none that torch.save made; it is not loaded, as it can run any code"
        )
    raise SourceError(
        f"{path}: holds no weights of a known kind; give a .safetensors, torch (.pth, .pt, .bin, .ckpt), CTranslate2, .gguf or .qf "
        "file, or a directory with weights"
    )


def check_no_key(path: Path, options: SourceOptions) -> None:
    """Raise `SourceError` if a state dict is chosen of a file that has none."""
    if options.state_dict_key is not None:
        raise SourceError(
            f"{path}: is no torch checkpoint, of which --state-dict-key could choose a part; leave it out"
        )
