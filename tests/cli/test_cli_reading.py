"""What the commands that read .qf files say: roots, and names that a terminal must not see as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import qformat
from qformat.errors import FormatError, QFormatError, SourceError, printable
from tests.helpers.cli import one_line, run_all
from tests.helpers.files import Draft

ESCAPES = "\x1b[31mEVIL\x1b]0;pwn\x07\x9b31m\u202e"


def test_commands_refuse_a_file_with_another_root(tmp_path: Path) -> None:
    path, other = tmp_path / "m.qf", tmp_path / "other.qf"
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    qformat.save_file({"w": x}, path, "scm")
    qformat.save_file({"w": x + 1}, other, "scm")
    with qformat.safe_open(path) as f:
        root = f.root
    commands = {
        "convert": [tmp_path / "a.qf", "-t", "f32"],
        "export": [tmp_path / "a.safetensors", "--to", "safetensors"],
        "truncate": [tmp_path / "b.qf", "-q", "3"],
        "quantize-stats": ["-t", "q4_0"],
    }
    for command, rest in commands.items():
        (refused,) = run_all([command, other, *rest, "--root", root])
        assert "other.qf: its root is " in one_line(refused)
        assert f", not {root}: it is not the file that was verified" in one_line(refused)
        (taken,) = run_all([command, path, *rest, "--root", root])
        assert taken.code == 0
    save_file({"w": x}, tmp_path / "m.safetensors")
    (refused,) = run_all(["convert", tmp_path / "m.safetensors", tmp_path / "c.qf", "--root", root])
    assert "m.safetensors: is not a .qf file, so it has no root; give --root only for one" in one_line(refused)


def hostile_files(folder: Path) -> dict[str, list[object]]:
    """Return commands on files whose names and contents hold control codes of terminals."""
    (folder / "index").mkdir()
    (folder / "index" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ESCAPES}}))
    header = json.dumps({"a": {"dtype": ESCAPES, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "d.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    named = folder / f"{ESCAPES}.qf"
    named.write_bytes(b"no")
    draft = Draft().place()
    draft.index["shards"] = [{"name": "\x9b31mEVIL\u202e", "bytes": 1, "root_sha256": "0" * 64}]
    draft.index["must_understand"] = ["shards"]
    (folder / "head.qf").write_bytes(draft.pack())
    return {
        "index": ["convert", folder / "index", folder / "x.qf"],
        "dtype": ["convert", folder / "d.safetensors", folder / "x.qf"],
        "inspect": ["inspect", named],
        "verify": ["verify", named],
        "head": ["inspect", folder / "head.qf"],
        "verified head": ["verify", folder / "head.qf"],
    }


@pytest.mark.skipif(os.name != "posix", reason="needs any bytes in file names")
def test_names_are_printed_without_control_codes(tmp_path: Path) -> None:
    commands = hostile_files(tmp_path)
    for what, result in zip(commands, run_all(*commands.values()), strict=True):
        printed = result.out + result.err
        assert result.code == 1, what
        assert "EVIL" in printed, what
        assert all(character.isprintable() or character == "\n" for character in printed), what


def test_messages_of_exceptions_are_printable() -> None:
    for error in (QFormatError(ESCAPES), SourceError(ESCAPES), FormatError(ESCAPES, path=ESCAPES)):
        assert str(error).isprintable()
    assert printable("a\x1b\x9b\u202e\ud800é") == "a\\x1b\\x9b\\u202e\\ud800é"
