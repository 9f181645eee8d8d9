"""Files that are no checkpoints by themselves: each is refused by what it is, with a way out."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError
from tests.helpers.gguf import Draft

GGUF = Draft().pack()
IMATRIX = struct.pack("<ii", 100, 20) + b"blk.0.attn_q.weight\0" + bytes(4000)


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (
            "m.llamafile",
            b"MZqFpD='\n\n" + bytes(99),
            "is a llamafile, a program with a GGUF file in it; unpack that with unzip",
        ),
        (
            "ggml-base.bin",
            b"lmgg" + bytes(99),
            "is a file of ggml of before GGUF; convert it with the tools of the program",
        ),
        ("m.bin", b"tjgg" + bytes(99), "is a file of ggml (ggjt) of before GGUF"),
        ("m.bin", b"fmgg" + bytes(99), "is a file of ggml (ggmf) of before GGUF"),
        ("m.bin", b"algg" + bytes(99), "is a LoRA adapter of ggml (ggla) of before GGUF"),
        ("imatrix.dat", IMATRIX, "is an importance matrix of llama.cpp (imatrix.dat), which holds statistics"),
    ],
)
def test_files_that_are_mistaken_for_checkpoints_are_refused_with_a_way_out(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    assert says in refused(tmp_path / name)


def test_archives_with_a_checkpoint_in_them_are_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("m.Q8_0.gguf", GGUF)
    assert refused(tmp_path / "m.zip") == "is a zip archive with 'm.Q8_0.gguf' in it; unpack it, and give that"


def test_directories_of_blobs_name_what_to_do(tmp_path):
    (tmp_path / "sha256-00").write_text("{{ .Prompt }}")
    (tmp_path / "sha256-11").write_bytes(GGUF)
    assert "sha256-11 is a GGUF file (as in ollama's blobs): give it" in refused(tmp_path)
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert [tensor.name for tensor in open_checkpoint(tmp_path).tensors] == ["t"]
