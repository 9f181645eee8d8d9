"""Damaged, truncated and foreign files are refused with an error that names the damage."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat import FormatError
from qformat.container.verify import verify
from tests.helpers.cases import ASSETS, NAMES
from tests.helpers.checkpoints import safetensors_bytes, weights
from tests.helpers.files import MAGIC, Draft, sha256, small_draft
from tests.helpers.hostile import compare_readers, read_package, verify_one
from tests.helpers.reference import reference


def test_the_draft_helper_rebuilds_a_written_file(saved: bytes) -> None:
    draft = Draft.of(saved)
    draft.index["header_sha256"] = ...
    assert draft.pack() == saved


def test_the_small_draft_is_a_valid_file(tmp_path: Path, small: bytes) -> None:
    content, report = compare_readers(tmp_path / "f.qf", small)
    assert report.ok
    assert report.root == sha256(small_draft().index_bytes())
    assert len(content.values) == len(NAMES) + len(ASSETS)


# ---- damage


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_change_of_any_byte_is_found(tmp_path: Path, saved: bytes, flip: int) -> None:
    path = tmp_path / "f.qf"
    path.write_bytes(saved)
    good = read_package(path)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(saved):
            os.pwrite(file.fileno(), bytes([byte ^ flip]), at)
            assert not verify_one(path).ok, at
            content = read_package(path)
            for key, value in content.values.items():
                assert value == good.values[key], (at, key)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert verify_one(path).ok


def test_the_reference_reader_finds_a_change_of_any_byte(saved: bytes) -> None:
    data = bytearray(saved)
    for at in range(len(data)):
        data[at] ^= 0x10
        with pytest.raises(reference.SpecError):
            reference.read(bytes(data))
        data[at] ^= 0x10


def test_verify_names_the_damaged_tensor_or_asset(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "f.qf"
    index = small_draft().place().index
    for kind, records in (("tensor", index["tensors"]), ("asset", index["assets"])):
        for record in records:
            run = record["segments"][0] if kind == "tensor" else record
            if not run["length"]:
                continue
            data = bytearray(small)
            data[run["offset"] + run["length"] - 1] ^= 4
            path.write_bytes(data)
            (damage,) = verify_one(path).errors
            assert getattr(damage, kind) == record["name"]
            assert damage.segment == (run["name"] if kind == "tensor" else None)
            assert str(run["offset"]) in damage.what
            content = read_package(path)
            assert list(content.errors) == [(kind, record["name"])]
            assert record["name"] in content.errors[kind, record["name"]]


def test_damage_after_an_empty_tensor_is_found(tmp_path: Path) -> None:
    # Both segments have the same offset.
    path = tmp_path / "f.qf"
    arrays = {"a": np.zeros((0, 3), np.float32), "b": weights(0, 4)}
    qformat.save_file(arrays, path)
    data = bytearray(path.read_bytes())
    data[64] ^= 1
    path.write_bytes(data)
    with qformat.safe_open(path) as file:
        file.get_tensor("a")
        with pytest.raises(FormatError, match="'b'"):
            file.get_tensor("b")


def test_damaged_tensors_can_be_read_without_verification(tmp_path: Path) -> None:
    path = tmp_path / "f.qf"
    qformat.save_file({"a": weights(0, 4)}, path)
    data = bytearray(path.read_bytes())
    data[64] ^= 1
    path.write_bytes(data)
    with qformat.safe_open(path, verify=False) as file:
        assert file.get_tensor("a").shape == (4,)


def test_files_truncated_at_any_byte_are_refused(tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "f.qf"
    path.write_bytes(saved)
    for length in reversed(range(len(saved))):
        os.truncate(path, length)
        with pytest.raises(FormatError, match="empty" if length == 0 else "truncated"):
            qformat.safe_open(path)
        assert not verify_one(path).ok
        with pytest.raises(reference.SpecError):
            reference.read(saved[:length])


@pytest.mark.parametrize("extra", [b"\0", b"\n", bytes(64), bytes(4096), b"x" * 200, "the file itself"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_files_with_added_bytes_are_refused(tmp_path: Path, small: bytes, extra: bytes | str, where: str) -> None:
    more = small if isinstance(extra, str) else extra
    content, _ = compare_readers(tmp_path / "f.qf", more + small if where == "before" else small + more)
    assert content.refused


@pytest.mark.parametrize("at", [64, 128, 640])
@pytest.mark.parametrize("count", [1, 64])
def test_files_with_bytes_lost_or_added_in_the_middle_are_refused(
    tmp_path: Path, small: bytes, at: int, count: int
) -> None:
    for data in (small[:at] + small[at + count :], small[:at] + bytes(count) + small[at:]):
        content, _ = compare_readers(tmp_path / "f.qf", data)
        assert content.refused


def zip_bytes() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 500)
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "one byte": b"\x89",
    "safetensors": safetensors_bytes({"w": ("f32", (2, 30), weights(0, 60).tobytes())}),
    "zip": zip_bytes(),
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(300),
    "gguf": b"GGUF\x03\0\0\0" + bytes(300),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n" * 20,
    "html": b"<!DOCTYPE html><html><body>404: Not Found</body></html>" * 9,
    "zeros": bytes(5000),
    "random": np.random.default_rng(1).bytes(5000),
    "magic and zeros": MAGIC + bytes(500),
    "magic and random": MAGIC + np.random.default_rng(2).bytes(500),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    content, _ = compare_readers(tmp_path / "f.qf", FOREIGN[name])
    assert content.refused
    if not FOREIGN[name].startswith(MAGIC) and len(FOREIGN[name]) > 1:
        assert "not a qformat file" in content.refused
    if not FOREIGN[name]:
        assert "empty" in content.refused


TRANSFERS: dict[str, Callable[[bytes], bytes]] = {
    "LF to CR LF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR LF to LF": lambda data: data.replace(b"\r\n", b"\n"),
    "CR to LF": lambda data: data.replace(b"\r", b"\n"),
    "LF to CR": lambda data: data.replace(b"\n", b"\r"),
    "seven bits": lambda data: bytes(byte & 0x7F for byte in data),
    "decoded as UTF-8": lambda data: data.decode("utf-8", "replace").encode(),
    "Latin-1 to UTF-8": lambda data: data.decode("latin-1").encode(),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_damage_by_a_text_mode_transfer_is_recognized(tmp_path: Path, small: bytes, name: str) -> None:
    content, _ = compare_readers(tmp_path / "f.qf", TRANSFERS[name](small))
    assert content.refused
    assert "damaged in transfer" in content.refused


def test_paths_that_are_no_regular_files_raise_os_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is a directory"):
        qformat.safe_open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        qformat.safe_open(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        qformat.safe_open(tmp_path / "missing.qf")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        qformat.safe_open(tmp_path / "file" / "m.qf")
    reports = verify([str(tmp_path), str(tmp_path / "missing.qf")], jobs=1)
    assert [report.ok for report in reports] == [False, False]
    assert "directory" in reports[0].errors[0].what


def test_unknown_tensor_and_asset_names_raise_key_errors(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "f.qf"
    path.write_bytes(small)
    with qformat.safe_open(path) as file:
        for get in (file.get_tensor, file.info, file.get_asset):
            with pytest.raises(KeyError, match="nothing"):
                get("nothing")
