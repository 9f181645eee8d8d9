"""What `safe_open` and `save_file` take for a file."""

from __future__ import annotations

import gzip
import io
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

import qformat

W = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    qformat.save_file({"w": W}, tmp_path / "m.qf")
    return tmp_path / "m.qf"


def test_bytes_and_objects_with_a_path_are_paths(file, tmp_path):
    for path in (str(file), os.fsencode(file), file, os.scandir(tmp_path)):
        if not isinstance(path, (str, bytes, Path)):
            (path,) = path  # an os.DirEntry  # noqa: PLW2901
        with qformat.safe_open(path) as f:
            np.testing.assert_array_equal(f.get_tensor("w"), W)
    qformat.save_file({"w": W}, os.fsencode(tmp_path / "n.qf"))
    assert (tmp_path / "n.qf").read_bytes() == file.read_bytes()


def test_binary_files_that_seek_are_read(file, tmp_path):
    packed = tmp_path / "m.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    opened = (file.open("rb"), file.open("rb", buffering=0), io.BytesIO(file.read_bytes()), gzip.GzipFile(packed))
    for source in opened:
        with source, qformat.safe_open(source) as f:
            np.testing.assert_array_equal(f.get_tensor("w"), W)


SAYS = "give a path, or a binary file object that can be read and can seek, such as open(path, 'rb') or io.BytesIO(data); this is "


KINDS = ("text", "write only", "pipe", "memory map", "bytes", "bytearray", "memoryview", "int", "None")


@pytest.mark.parametrize("kind", KINDS)
def test_anything_else_is_a_type_error_that_says_what_is_taken(kind, file, tmp_path):
    reading, writing = os.pipe()
    with (
        file.open(encoding="latin-1") as text,
        (tmp_path / "x").open("wb") as write_only,
        os.fdopen(reading, "rb") as pipe,
        file.open("rb") as whole,
        mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        os.close(writing)
        data = bytearray(file.read_bytes())
        values = (text, write_only, pipe, mapped, bytes(data), data, memoryview(data), 3, None)
        value = dict(zip(KINDS, values, strict=True))[kind]
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        with pytest.raises(TypeError, match=re.escape(SAYS + name) + "$"):
            qformat.safe_open(value)


def test_save_file_takes_paths_only():
    with pytest.raises(TypeError, match=re.escape("give a path (str, bytes or os.PathLike); this is _io.BytesIO")):
        qformat.save_file({"w": W}, io.BytesIO())
