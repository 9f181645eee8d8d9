"""Files and directories that are mistaken for checkpoints, or hold one in a form that has to be unpacked first: what to do."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import open_regular

_START = 32  # bytes by which a file is recognized
_OLD_GGML = (
    "of before GGUF; convert it with the tools of the program that it is for (convert_llama_ggml_to_gguf.py of llama.cpp; "
    "whisper.cpp still uses such files)"
)
# The first bytes of files, in lower case, and what they are
_BY_START = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with git lfs pull",
    b"<!doctype": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
    b"mzqfpd": "is a llamafile, a program with a GGUF file in it; unpack that with unzip, and give it",
    b"lmgg": f"is a file of ggml {_OLD_GGML}",
    b"fmgg": f"is a file of ggml (ggmf) {_OLD_GGML}",
    b"tjgg": f"is a file of ggml (ggjt) {_OLD_GGML}",
    b"algg": "is a LoRA adapter of ggml (ggla) of before GGUF; convert the original one with llama.cpp's convert_lora_to_gguf.py",
}
_IMATRIX = struct.Struct("<ii")
_MOST_ENTRIES, _LONGEST_NAME = 100_000, 256
_GGUF = b"GGUF"


def check_known(path: Path, start: bytes) -> None:
    """Raise `SourceError` with a way out if a file that begins so is known not to be a checkpoint by itself."""
    for prefix, description in _BY_START.items():
        if start.lower().startswith(prefix):
            raise SourceError(f"{path}: {description}")
    if _is_imatrix(start):
        raise SourceError(
            f"{path}: is an importance matrix of llama.cpp (imatrix.dat), which holds statistics of inputs and no weights; give "
            "the model itself"
        )


def check_directory(directory: Path) -> None:
    """Raise `SourceError` if a directory holds GGUF files without a suffix."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if not path.suffix and _starts_with(path, _GGUF)]
    if found:
        raise SourceError(
            f"{directory}: holds no weights under a usual name; {found[0].name}{and_more(found)} is a GGUF file (as in ollama's "
            "blobs): give it"
        )


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _is_imatrix(start: bytes) -> bool:
    """Return whether a file that begins so counts entries, and has the name of a tensor first."""
    if len(start) < _START:
        return False
    entries, length = _IMATRIX.unpack_from(start)
    name = start[_IMATRIX.size : _IMATRIX.size + max(0, length)]
    return (
        0 < entries <= _MOST_ENTRIES
        and 0 < length <= _LONGEST_NAME
        and re.fullmatch(rb"[a-z]+[a-z0-9_.]*\0*", name, re.DOTALL) is not None
        and b"." in name
    )
