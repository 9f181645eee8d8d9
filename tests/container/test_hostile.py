"""Damaged and hostile files: read as they are meant, or refused with a `FormatError`; and never differently by the two readers."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qformat
from qformat import FormatError
from qformat.container.verify import verify
from tests.helpers.checkpoints import safetensors_bytes, weights
from tests.helpers.files import (
    MAGIC,
    VOCABULARY,
    Draft,
    Edit,
    align,
    canonical,
    drop,
    find,
    header,
    put,
    q4_0_tensor,
    raw_asset,
    raw_tensor,
    replace_text,
    segment,
    sha256,
    small_draft,
    trailer,
    trailer_record,
    zstd_asset,
)
from tests.helpers.hostile import (
    bounded_memory,
    compare_readers,
    read_package,
    read_reference,
    verify_one,
)
from tests.helpers.reference import reference

NAMES = [tensor["name"] for tensor in small_draft().tensors]
ASSETS = [asset["name"] for asset in small_draft().assets]
TWO_53 = 2**53


# ---- what a file reads as


@pytest.fixture(scope="module")
def small() -> bytes:
    return small_draft().pack()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a file that the package wrote."""
    path = tmp_path_factory.mktemp("saved") / "saved.qf"
    tensors = {
        "b.weight": weights(0, 3, 40),
        "empty": np.zeros((0, 4), np.float32),
        "f32": weights(1, 6),
        "half": weights(2, 3).astype(np.float16),
        "flags": np.array([True, False, True]),
        "scalar": np.array(-5),
    }
    assets = {"config.json": b"{}", "tok/vocab.txt": VOCABULARY}
    qformat.save_file(tensors, path, "q4_0", metadata={"key": "välue"}, assets=assets)
    return path.read_bytes()


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


# ---- attacks with all digests right: the table that both readers are held to


@dataclass(frozen=True)
class Case:
    """A change of the small file, and what has to come of it.

    Attributes
    ----------
    refused
        Whether opening fails.
    lost
        Names of the tensors and assets that cannot be read; all others can.
    says
        What the message has to contain.
    verified
        Whether `verify` is content; by default that follows from `refused`.
    """

    name: str
    edit: Edit
    refused: bool = False
    lost: tuple[str, ...] = ()
    says: str = ""
    verified: bool | None = None


CASES: list[Case] = []


def fine(name: str, edit: Edit) -> None:
    CASES.append(Case(name, edit))


def refused(name: str, edit: Edit, says: str = "") -> None:
    CASES.append(Case(name, edit, refused=True, says=says))


def loses(names: str | tuple[str, ...], name: str, edit: Edit, says: str = "") -> None:
    CASES.append(Case(name, edit, lost=(names,) if isinstance(names, str) else names, says=says))


def spoils(name: str, edit: Edit, says: str = "") -> None:
    """Expect the asset `x.bin` not to decode."""
    CASES.append(Case(name, edit, lost=("x.bin",), says=says, verified=False))


def damaged(names: str | tuple[str, ...], name: str, edit: Edit, says: str = "") -> None:
    lost = (names,) if isinstance(names, str) else names
    CASES.append(Case(name, edit, lost=lost, says=says, verified=False))


def edits(*steps: Edit) -> Edit:
    def edit(draft: Draft) -> bytes | None:
        done = None
        for step in steps:
            done = step(draft)
        return done

    return edit


def add_tensor(record: dict[str, Any]) -> Edit:
    """Add a tensor where its name belongs."""

    def edit(draft: Draft) -> None:
        draft.tensors.append(deepcopy(record))
        draft.tensors.sort(key=lambda tensor: tensor["name"])

    return edit


def add_asset(record: dict[str, Any]) -> Edit:
    def edit(draft: Draft) -> None:
        draft.assets.append(deepcopy(record))
        draft.assets.sort(key=lambda asset: asset["name"])

    return edit


def before_placing(change: Callable[[Draft], object]) -> Edit:
    def edit(draft: Draft) -> None:
        change(draft)

    return edit


def index_is(data: bytes) -> Edit:
    return lambda draft: draft.place().pack(data)


def reworded(change: Callable[[dict[str, Any]], bytes]) -> Edit:
    """Encode the index in another way."""

    def edit(draft: Draft) -> bytes:
        draft.index_bytes()
        return draft.pack(change(draft.index))

    return edit


def nested(depth: int, core: str) -> str:
    return "[" * depth + core + "]" * depth


# -- JSON

refused("index: empty", index_is(b""))
refused("index: white space around", reworded(lambda index: b" " + canonical(index)), "canonical")
refused("index: final line end", reworded(lambda index: canonical(index) + b"\n"), "canonical")
refused(
    "index: default separators", reworded(lambda index: json.dumps(index, ensure_ascii=False, sort_keys=True).encode())
)
refused(
    "index: ASCII escapes",
    reworded(lambda index: json.dumps(index, sort_keys=True, separators=(",", ":")).encode()),
    "canonical",
)
refused(
    "index: keys in another order",
    reworded(
        lambda index: json.dumps(
            dict(sorted(index.items(), reverse=True)), ensure_ascii=False, separators=(",", ":")
        ).encode()
    ),
    "canonical",
)
refused("index: byte-order mark", reworded(lambda index: b"\xef\xbb\xbf" + canonical(index)))
refused("index: UTF-16", reworded(lambda index: canonical(index).decode().encode("utf-16-le")))
refused("index: UTF-32", reworded(lambda index: canonical(index).decode().encode("utf-32-le")))
refused("index: NUL at the end", reworded(lambda index: canonical(index) + b"\0"))
refused("index: two objects", reworded(lambda index: canonical(index) * 2))
refused("index: cut short", reworded(lambda index: canonical(index)[:-1]))
refused("index: comment", reworded(lambda index: canonical(index).replace(b"{", b"{/**/", 1)))
refused("index: comma at the end", reworded(lambda index: canonical(index)[:-1] + b",}"))
for other in (b"[]", b'"text"', b"7", b"true", b"null", b"{}", b"[{}]", b"\0" * 64, b"\xff" * 64, b"{" * 200_000):
    refused(f"index: is {other[:8]!r}", index_is(other))
refused("index: 100,000 arrays in each other", index_is(nested(100_000, "").encode()))
refused("index: 100,000 arrays left open", index_is(b"[" * 100_000))
refused("index: 100,000 objects in each other", index_is(b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
refused("duplicate key in the index", replace_text('{"assets":[', '{"assets":[],"assets":['))
refused("duplicate key in a tensor", replace_text('"shape":[2,3]', '"shape":[2,3],"shape":[2,3]'))
refused("duplicate key in metadata", replace_text('"metadata":{', '"metadata":{"made by":"another",'))
for number in (
    "2.0", "2e0", "2E0", "-2", "-0", "02", "+2", "0x2", ".5", "2.", "NaN", "Infinity", "-Infinity", "null",
    str(TWO_53), str(2**64), "9" * 400, "9" * 4300, "9" * 5000, "-" + "9" * 5000, "1e400", "1e-400", "1e99999", "2 ", "1_0", "٢",
):  # fmt: skip
    refused(
        f"shape: number {number[:12]} of length {len(number)}", replace_text('"shape":[2,3]', f'"shape":[{number},3]')
    )
    refused(
        f"unknown key: {number[:12]} of length {len(number)}", replace_text('{"assets"', f'{{"@":{number},"assets"')
    )
for text, what in (
    (r"\u0041", "an escaped letter"),
    (r"\/", "an escaped slash"),
    (r"\u001F", "an upper-case escape"),
    (r"\u0009", "a long escape"),
    (r"\u2028", "an escaped separator"),
    (r"\u007f", "an escaped DEL"),
    (r"\ud800", "a lone surrogate"),
    (r"\udc00", "a lone low surrogate"),
    (r"\udc00\ud800", "swapped surrogates"),
    (r"\ud83d\ude00", "an escaped pair of surrogates"),
    (r"\x41", "no escape of JSON"),
    ("\\", "a lone backslash"),
    ("\t", "a bare TAB"),
    ("\n", "a bare LF"),
    ("\0", "a bare NUL"),
    ('"', "a bare quote"),
):
    refused(f"string: {what}", replace_text("a test", text))
for data in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80", b"\xf0\x82\x82\xac"):
    refused(f"string: bytes {data.hex()} are not UTF-8", replace_text("a test", data))
for text in (
    "\x7f",
    "\x80",
    "\u2028",
    "\ufeff",
    "\uffff",
    "\U0010ffff",
    r"\"\\\b\t\n\f\r\u0000\u001f",
    "/",
    "\u00e9",
    "e\u0301",
):
    fine(f"string: {text.encode('unicode_escape').decode()}", replace_text("a test", text))
fine("32 levels", replace_text('{"assets"', '{"@":' + nested(31, "") + ',"assets"'))
fine("32 levels around a number", replace_text('{"assets"', '{"@":' + nested(31, "0") + ',"assets"'))
fine("32 levels around a string", replace_text('{"assets"', '{"@":' + nested(31, '"x"') + ',"assets"'))
fine("32 levels of objects", replace_text('{"assets"', '{"@":' + '{"":' * 31 + "true" + "}" * 31 + ',"assets"'))
refused("33 levels", replace_text('{"assets"', '{"@":' + nested(32, "") + ',"assets"'), "nested")
refused(
    "33 levels of objects", replace_text('{"assets"', '{"@":' + '{"":' * 32 + "0" + "}" * 32 + ',"assets"'), "nested"
)
fine("largest integer", replace_text('{"assets"', f'{{"@":{TWO_53 - 1},"assets"'))

# -- missing keys, wrong types

REQUIRED: list[tuple[str | int, ...]] = [
    *[(key,) for key in ("assets", "header_sha256", "metadata", "tensors")],
    *[("tensors", "b.weight", key) for key in ("name", "shape", "dtype", "codec", "params", "segments")],
    *[("tensors", "b.weight", "segments", 0, key) for key in ("name", "offset", "length", "sha256")],
    *[
        ("assets", "LICENSE", key)
        for key in ("name", "encoding", "offset", "length", "sha256", "size", "content_sha256")
    ],
    *[("tensors", "b.weight", "error", key) for key in ("rmse", "max")],
]
OPTIONAL: list[tuple[str | int, ...]] = [
    ("tensors", "b.weight", "encoder"),
    ("tensors", "b.weight", "error"),
    ("must_understand",),
    ("tensors", "b.weight", "must_understand"),
    ("tensors", "b.weight", "segments", 0, "must_understand"),
    ("assets", "LICENSE", "must_understand"),
]


def kind_of(path: tuple[str | int, ...]) -> type:
    if path[-1] == "must_understand":
        return list
    return type(find(small_draft().place().index, *path))


for place in REQUIRED:
    refused(f"missing: {place}", drop(*place))
for place in REQUIRED + OPTIONAL:
    for wrong in (True, 1, "x", [], {}):
        if type(wrong) is not kind_of(place):
            refused(f"{place} is {wrong!r}", put(*place, wrong))
    refused(f"{place} is null", put(*place, None))
for place in OPTIONAL:
    if place[-1] == "must_understand":
        for wrong in ([1], [True], [[]], ["name", 1], [{}]):
            refused(f"{place} is {wrong!r}", put(*place, wrong))
        fine(f"{place} is empty", put(*place, []))
for wrong in (True, "1", [1], {}, [], None):
    refused(f"shape with {wrong!r}", put("tensors", "a.weight", "shape", [wrong, 3]))
for wrong in (1, True, [], {}, None):
    refused(f"metadata with {wrong!r}", put("metadata", "key", wrong))
for wrong in ([], {}, {"a": 1}, None):
    refused(f"params with {wrong!r}", put("tensors", "a.weight", "params", "key", wrong))
    refused(f"encoder with {wrong!r}", put("tensors", "b.weight", "encoder", "key", wrong))
for wrong in (1, "x", [], True):
    refused(f"tensor record {wrong!r}", before_placing(lambda d, wrong=wrong: d.place().index["tensors"].append(wrong)))
    refused(f"asset record {wrong!r}", before_placing(lambda d, wrong=wrong: d.place().index["assets"].append(wrong)))
    refused(
        f"segment record {wrong!r}",
        before_placing(lambda d, wrong=wrong: find(d.place().index, "tensors", "a.weight", "segments").append(wrong)),
    )
for place in (
    ("header_sha256",),
    ("tensors", "a.weight", "segments", 0, "sha256"),
    ("assets", "LICENSE", "sha256"),
    ("assets", "LICENSE", "content_sha256"),
):
    for digest in ("", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 63 + "\n", "0" * 64 + "\n", "٠" * 64):
        refused(f"{place} is {digest[-4:]!r} of length {len(digest)}", put(*place, digest))
refused("header_sha256 of another header", put("header_sha256", "0" * 64), "header")
damaged("a.weight", "digest of a segment", put("tensors", "a.weight", "segments", 0, "sha256", "0" * 64), "damaged")
damaged("empty", "digest of an empty segment", put("tensors", "empty", "segments", 0, "sha256", "0" * 64), "damaged")
damaged("tok/vocab.txt", "digest of an asset", put("assets", "tok/vocab.txt", "sha256", "0" * 64), "damaged")

# -- names

X = np.arange(3, dtype="<f4")
for name, what in (
    ("", "empty"),
    ("a\0b", "NUL"),
    ("a\nb", "LF"),
    ("a\x1bb", "ESC"),
    ("a\x1fb", "0x1f"),
    ("a\x7fb", "DEL"),
    ("n" * 1025, "1025 letters"),
    ("é" * 513, "1026 bytes"),
):
    refused(f"tensor name: {what}", add_tensor(raw_tensor(name, "f32", X)), "name")
    refused(f"asset name: {what}", add_asset(raw_asset(name, b"x")), "name")
    refused(f"segment name: {what}", put("tensors", "b.weight", "segments", 0, "name", name), "name")
for name, what in (
    ("n" * 1024, "1024 letters"),
    ("é" * 512, "1024 bytes"),
    ("\x80", "a C1 control"),
    ("\U0001f600", "an emoji"),
    (" ", "a space"),
    ("../../etc/passwd", "a path"),
    ("a\\b:c", "a path of another system"),
    (".", "a dot"),
):
    fine(f"tensor name: {what}", add_tensor(raw_tensor(name, "f32", X)))
for name in ("x", "data ", "Data", "../data", "\U0001f600"):
    loses("a.weight", f"segment name: {name}", put("tensors", "a.weight", "segments", 0, "name", name), "a.weight")
for name in (
    "../x", "..", "a/..", "a\\b", "..\\x", "C:x", "C:/x", "a:b", "\\\\h\\s", "//h/s",
    ".", "/x", "/", "a//b", "a/", "a/./b", "a/../b", "./a",
):  # fmt: skip
    refused(f"asset name: {name}", add_asset(raw_asset(name, b"x")), "path")
for name in ("a", "a/b/c/d", "...", "..a", "a..", ".hidden", "con", "~", "~root/x", "-rf", "*", "a b", "é", "%2e%2e/x"):
    fine(f"asset name: {name}", add_asset(raw_asset(name, b"x")))
refused("asset is the folder of another", edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("a/b", b"y"))))
refused(
    "asset is the folder of a far one", edits(add_asset(raw_asset("a/b", b"x")), add_asset(raw_asset("a/b/c/d", b"y")))
)
refused(
    "asset is a folder, and another name stands between",
    edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("a-", b"x")), add_asset(raw_asset("a/b", b"y"))),
)
fine("asset name of 16 components", add_asset(raw_asset("/".join("f" * 16), b"x")))
refused("asset name of 17 components", add_asset(raw_asset("/".join("f" * 17), b"x")), "path")
fine("asset names with the same beginning", edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("ab/c", b"y"))))
refused("tensors not sorted", before_placing(lambda d: d.tensors.reverse()), "sorted")
refused("assets not sorted", before_placing(lambda d: d.assets.reverse()), "sorted")
refused("tensor twice", before_placing(lambda d: d.tensors.append(deepcopy(d.tensors[-1]))), "twice")
refused("asset twice", before_placing(lambda d: d.assets.append(deepcopy(d.assets[-1]))), "twice")
fine(
    "sorted by code point, not as UTF-16",
    edits(add_tensor(raw_tensor("\uffff", "f32", X)), add_tensor(raw_tensor("\U00010000", "f32", X))),
)
refused(
    "sorted as UTF-16",
    before_placing(lambda d: d.tensors.extend([raw_tensor("\U00010000", "f32", X), raw_tensor("\uffff", "f32", X)])),
    "sorted",
)
fine(
    "composed and decomposed letters differ",
    edits(add_tensor(raw_tensor("e\u0301", "f32", X)), add_tensor(raw_tensor("\u00e9", "f32", X))),
)
fine("tensor and asset of one name", add_asset(raw_asset("a.weight", b"x")))

# -- segments

A, B, LAST = ("tensors", "a.weight"), ("tensors", "b.weight"), ("tensors", "zhalf")


def move(path: tuple[Any, ...], key: str, by: int) -> Edit:
    def edit(draft: Draft) -> None:
        find(draft.place().index, *path)[key] += by

    return edit


for by in (-64, -1, 1, 8, 32, 63, 64):
    for place in ((*A, "segments", 0), (*B, "segments", 0), (*LAST, "segments", 0), ("assets", "LICENSE")):
        refused(f"offset of {place[1]} moved by {by}", move(place, "offset", by))
for offset in (0, TWO_53 - 1, 2**40):
    refused(f"offset {offset}", put(*A, "segments", 0, "offset", offset))
for length in (TWO_53 - 1, 2**40, 2**31, 100_000):
    refused(f"length {length}", put(*A, "segments", 0, "length", length))
    refused(f"length {length} of the last", put(*LAST, "segments", 0, "length", length))
    refused(f"length {length} of an asset", put("assets", "tok/vocab.txt", "length", length))
refused(
    "offset and length at their ends",
    edits(put(*LAST, "segments", 0, "offset", TWO_53 - 1), put(*LAST, "segments", 0, "length", TWO_53 - 1)),
)
refused("length into the next segment", put(*A, "segments", 0, "length", 65))
damaged("a.weight", "length into the padding", put(*A, "segments", 0, "length", 25), "a.weight")
damaged("a.weight", "length one short", put(*A, "segments", 0, "length", 23), "a.weight")
refused("length 0", put(*A, "segments", 0, "length", 0))


def overlap(draft: Draft) -> None:
    index = draft.place().index
    find(index, *B)["segments"][0] |= {
        key: find(index, *A, "segments", 0)[key] for key in ("offset", "length", "sha256")
    }


def share(draft: Draft) -> None:
    tensor = deepcopy(find(draft.place().index, *A))
    draft.index["tensors"].insert(0, tensor | {"name": "a"})


def without(kind: str, name: str) -> Edit:
    def edit(draft: Draft) -> None:
        index = draft.place().index
        index[kind] = [record for record in index[kind] if record["name"] != name]

    return edit


def swap(draft: Draft) -> None:
    first, last = find(draft.place().index, *A), find(draft.index, *LAST)
    first["segments"], last["segments"] = last["segments"], first["segments"]


def body_with(more: bytes) -> Edit:
    def edit(draft: Draft) -> None:
        draft.place().body += more

    return edit


refused("two tensors in the same bytes", overlap)
refused("a tensor's bytes shared with another", share)
refused("bytes that nothing accounts for", without("tensors", "b.weight"))
refused("bytes of an asset that nothing accounts for", without("assets", "LICENSE"))
refused("bytes that nothing accounts for at the end", without("tensors", "zhalf"))
fine("without the empty tensor", without("tensors", "empty"))
refused("64 bytes before the index", body_with(bytes(64)), "index")
refused("1 MiB before the index", body_with(bytes(1 << 20)), "index")
refused("1 byte before the index", body_with(bytes(1)))
loses(("a.weight", "zhalf"), "segments of two tensors swapped", swap)
fine("no tensors and no assets", before_placing(lambda d: (d.tensors.clear(), d.assets.clear(), d.metadata.clear())))
fine("no assets", before_placing(lambda d: d.assets.clear()))


def segments_in_reverse(draft: Draft) -> None:
    # "Segments may stand in any order relative to the index."
    tensors = draft.tensors
    tensors.reverse()
    draft.place().index["tensors"] = sorted(tensors, key=lambda tensor: tensor["name"])


fine("segments in another order than the index", segments_in_reverse)


def pad_with(byte: int, at: int) -> Edit:
    def edit(draft: Draft) -> None:
        body = bytearray(draft.place().body)
        assert body[at] == 0
        body[at] = byte
        draft.body = bytes(body)

    return edit


CASES.append(Case("padding: first byte", pad_with(1, 16), verified=False))
CASES.append(Case("padding: last byte of an asset's", pad_with(255, 63), verified=False))
CASES.append(Case("padding: last byte before the index", pad_with(128, -1), verified=False))
for more in ([], [{"name": "data", "bytes": b""}], [{"name": "x", "bytes": b"more"}]):
    loses(
        "a.weight",
        f"one segment and {more}" if more else "no segments",
        before_placing(
            lambda d, more=more: d.tensors[0].update(
                segments=[*(d.tensors[0]["segments"] if more else []), *deepcopy(more)]
            )
        ),
        "a.weight",
    )
loses(
    "a.weight",
    "the same segment name twice",
    before_placing(lambda d: d.tensors[0]["segments"].append(segment("data", b"x" * 24))),
)
for size in (0, 1, 23, 25, 48, 4096):
    loses(
        "a.weight",
        f"{size} bytes for 6 floats",
        before_placing(lambda d, size=size: d.tensors[0]["segments"][0].update(bytes=bytes(size))),
        "a.weight",
    )
for size in (0, 18, 90, 107, 109, 126, 4096):
    loses(
        "b.weight",
        f"{size} bytes for 6 blocks",
        before_placing(lambda d, size=size: d.tensors[1]["segments"][0].update(bytes=bytes(size))),
        "b.weight",
    )
loses(
    "empty",
    "4 bytes for no element",
    before_placing(lambda d: d.tensors[3]["segments"][0].update(bytes=bytes(4))),
    "empty",
)

# -- shapes

for shape in ([6], [1, 6], [3, 2], [6] + [1] * 15, [1] * 15 + [6], [2, 1, 3]):
    fine(f"shape {shape}", put(*A, "shape", shape))
for shape in (
    [],
    [5],
    [7],
    [2, 4],
    [0],
    [2, 0],
    [0, 2**52],
    [TWO_53 - 1, 0],
    [2**52],
    [2**26, 2**26],
    [TWO_53 - 1],
    [TWO_53 - 1] + [1] * 15,
):
    loses("a.weight", f"shape {shape[:4]} of {len(shape)}", put(*A, "shape", shape), "a.weight")
    loses("b.weight", f"q4_0 shape {shape[:4]} of {len(shape)}", put(*B, "shape", shape), "b.weight")
for shape in (
    [2**52, 2**52],
    [2**27, 2**26],
    [TWO_53 - 1, 2],
    [2**32, 2**32],
    [2**52, 2**52, 0],
    [0, 2**27, 2**26],
    [2**4] * 16,
    [TWO_53 - 1] * 16,
    [1] * 17,
    [1] * 100_000,
):
    refused(f"shape {shape[:4]} of {len(shape)}", put(*A, "shape", shape), "a.weight")
for shape in (
    [0],
    [0, 0],
    [4, 0],
    [0, 2**52],
    [2**52, 0],
    [TWO_53 - 1, 0],
    [0, TWO_53 - 1],
    [0] * 16,
    [2**26, 0, 2**26],
    [0] + [8] * 15,
):
    for codec in ("f32", "q4_0"):
        record = q4_0_tensor("void", weights(0, 0)) | {"error": {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}}
        if codec == "f32":
            record = raw_tensor("void", "f32", weights(0, 0))
        fine(f"{codec} without elements: {shape[:4]} of {len(shape)}", add_tensor(record | {"shape": shape}))

# -- codecs, dtypes, params, errors

for name in ("q9_9", "", "F32", "f32 ", "q4_0:search=naive", "../q4_0", "é", "x" * 100_000):
    loses("a.weight", f"codec {name[:20]} of length {len(name)}", put(*A, "codec", name), "a.weight")
    loses("a.weight", f"dtype {name[:20]} of length {len(name)}", put(*A, "dtype", name), "a.weight")
loses(
    tuple(NAMES),
    "all codecs unknown",
    before_placing(lambda d: [t.update(codec="future") for t in d.tensors]),
    "future",
)
for codec, dtype in (
    ("f32", "i64"),
    ("i64", "f32"),
    ("u8", "i8"),
    ("f8_e4m3", "f32"),
    ("f8_e4m3", "f8_e5m2"),
    ("bool", "u8"),
    ("q4_0", "i32"),
    ("q4_0", "bool"),
):
    loses("a.weight", f"codec {codec} for {dtype}", edits(put(*A, "codec", codec), put(*A, "dtype", dtype)), "a.weight")
for value in (0, 1, "x", True, "", TWO_53 - 1):
    loses("a.weight", f"unknown parameter {value!r}", put(*A, "params", "unknown", value), "a.weight")
    loses("b.weight", f"unknown parameter {value!r} of q4_0", put(*B, "params", "block", value), "b.weight")
    fine(f"unknown encoder parameter {value!r}", put(*B, "encoder", "unknown", value))
loses("b.weight", "an encoder's parameter among the decoder's", put(*B, "params", {"search": "naive"}), "b.weight")
fine("without encoder", drop(*B, "encoder"))
fine("encoder of a raw tensor", put(*A, "encoder", {"x": 1}))
loses("b.weight", "without error", drop(*B, "error"), "b.weight")
loses(
    "a.weight",
    "error of a raw tensor",
    put(*A, "error", {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}),
    "a.weight",
)
fine("unknown key in error", put(*B, "error", "median", 3))
for text in (
    "0.000000000e+00",
    "9.999999999e+99",
    "1.000000000e-99",
    "2.922014871e-03",
    "1.000000000e+00",
):
    fine(f"error {text}", put(*B, "error", "max", text))
for text in (
    "1.000000000e+100",
    "1.000000000e-100",
    "4.940656458e-324",
    "",
    "0",
    "1.5e-2",
    "1.000000000e-2",
    "1.000000000e-002",
    "1.000000000e+0",
    "1.000000000e+0100",
    "-1.000000000e-02",
    "+1.000000000e-02",
    "-0.000000000e+00",
    "0.000000000e-00",
    "0.000000000e+01",
    "0.500000000e+00",
    "1.000000000E-02",
    "1.00000000e-02",
    "1.0000000000e-02",
    "10.00000000e-02",
    "1,000000000e-02",
    " 1.000000000e-02",
    "1.000000000e-02 ",
    "1.000000000e-02\n",
    "inf",
    "nan",
    "1.000000000e+400",
    "1.000000000e-400",
):
    for key in ("rmse", "max"):
        refused(f"error {key} {text!r}", put(*B, "error", key, text))
loses(
    "bool", "bool that is 2", before_placing(lambda d: d.tensors[2]["segments"][0].update(bytes=b"\0\1\2\1\0")), "bool"
)
loses(
    "bool",
    "bool that is 255",
    before_placing(lambda d: d.tensors[2]["segments"][0].update(bytes=b"\0\1\1\1\xff")),
    "bool",
)
for dtype in ("f16", "bf16", "f32", "f64"):
    bits = {"f16": 0x7C01, "bf16": 0x7F81, "f32": 0x7F800001, "f64": 0x7FF0000000000001}[dtype]
    size = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}[dtype]
    pattern = np.frombuffer(bits.to_bytes(size, "little") * 3, f"V{size}")
    fine(f"NaN in a raw {dtype}", add_tensor(raw_tensor("nan", dtype, pattern)))

# -- must understand

for level, (place, label) in itertools.product(
    ("unknown key", "key that is not there"),
    (
        (("tensors", "b.weight"), "b.weight"),
        (("tensors", "b.weight", "segments", 0), "b.weight"),
        (("assets", "LICENSE"), "LICENSE"),
        (("assets", "tok/vocab.txt"), "tok/vocab.txt"),
        ((), ""),
    ),
):
    change = edits(
        put(*place, "zzz_feature" if level == "unknown key" else "aaa", {"deep": [1, {"x": "y"}]}),
        put(*place, "must_understand", ["zzz_feature"]),
    )
    if label:
        loses(label, f"must understand an {level}: {place}", change, "zzz_feature")
    else:
        refused(f"must understand an {level} of the file", change, "zzz_feature")
for place in ((), ("tensors", "b.weight"), ("tensors", "b.weight", "segments", 0), ("assets", "LICENSE")):
    fine(f"unknown key: {place}", put(*place, "zzz", {"deep": [1, {"x": "y"}], "flag": False}))
fine(
    "must understand known keys of the file",
    put("must_understand", ["tensors", "assets", "metadata", "header_sha256", "must_understand"]),
)
fine(
    "must understand known keys of a tensor",
    put(*B, "must_understand", ["name", "shape", "error", "encoder", "params", "must_understand", "name"]),
)
fine("must understand known keys of an absent one", put(*A, "must_understand", ["error", "encoder"]))
fine("must understand known keys of a segment", put(*B, "segments", 0, "must_understand", ["offset", "sha256"]))
fine("must understand known keys of an asset", put("assets", "LICENSE", "must_understand", ["size", "encoding"]))
refused("must understand a tensor's key of the file", put("must_understand", ["shape"]), "shape")
loses("b.weight", "must understand a file's key of a tensor", put(*B, "must_understand", ["metadata"]), "metadata")
loses(
    "b.weight",
    "must understand a tensor's key of a segment",
    put(*B, "segments", 0, "must_understand", ["shape"]),
    "shape",
)
loses("b.weight", "must understand an empty key", put(*B, "must_understand", [""]), "b.weight")
loses("b.weight", "must understand a key of 100,000 letters", put(*B, "must_understand", ["k" * 100_000]), "b.weight")
fine("must_understand within metadata has no meaning", put("metadata", "must_understand", "x"))
fine("must_understand within encoder has no meaning", put(*B, "encoder", "must_understand", "x"))
fine("must_understand within error has no meaning", put(*B, "error", "must_understand", ["x"]))
fine("a future tensor beside", add_tensor(raw_tensor("c", "f32", X) | {"zzz": [1]}))

# -- assets

TOK = ("assets", "tok/vocab.txt")
FRAME = zstandard.ZstdCompressor(level=9).compress(VOCABULARY)
EMPTY_FRAME = zstandard.ZstdCompressor().compress(b"")
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(VOCABULARY)
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(VOCABULARY)
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"skip"
DICTIONARY = zstandard.ZstdCompressionDict(
    b"token 1\n" * 40 + VOCABULARY[:100], dict_type=zstandard.DICT_TYPE_RAWCONTENT
)
WITH_DICTIONARY = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(VOCABULARY)


def handmade(
    claim: int, *, descriptor: int = 0xE0, extra: bytes = b"", kind: int = 1, content: bytes = b"r", block: int = 100
) -> bytes:
    """Return a frame that says `claim` bytes, of one block: by default a hundred times the letter r, run-length encoded.

    The default descriptor is that of a single segment with eight bytes of content size.
    """
    head = (0xFD2FB528).to_bytes(4, "little") + bytes([descriptor]) + extra + claim.to_bytes(8, "little")
    return head + (block << 3 | kind << 1 | 1).to_bytes(3, "little") + content


def stored(frame: bytes, content: bytes = VOCABULARY, **fields: Any) -> Edit:
    """Store an asset `x.bin` as this frame."""
    return add_asset(zstd_asset("x.bin", content, frame) | fields)


R = b"r" * 100
fine("zstd: frame with a checksum", stored(CHECKED))
fine("zstd: frame made by hand", stored(handmade(100), R))
fine("zstd: window of 1 MiB", stored(handmade(100, descriptor=0xC0, extra=b"\x50"), R))
fine("zstd: dictionary 0", stored(handmade(100, descriptor=0xE1, extra=b"\0"), R))
fine("zstd: one byte less than its content", stored(handmade(18, block=18), R[:18]))
refused("zstd: as long as its content", stored(handmade(17, block=17), R[:17]), "x.bin")
refused("zstd: longer than its content", stored(zstandard.ZstdCompressor().compress(b"x"), b"x"), "x.bin")
refused("zstd: empty content", stored(EMPTY_FRAME, b""), "x.bin")
refused("zstd: nothing for nothing", stored(b"", b""), "x.bin")
refused("zstd: size 0", stored(FRAME, size=0), "x.bin")
refused("zstd: size above 256 MiB", stored(FRAME, size=(256 << 20) + 1), "x.bin")
refused("zstd: size 2^53 - 1", stored(FRAME, size=TWO_53 - 1), "x.bin")
spoils("zstd: more than size", stored(FRAME, size=len(VOCABULARY) - 1), "x.bin")
spoils("zstd: less than size", stored(FRAME, size=len(VOCABULARY) + 1), "x.bin")
spoils("zstd: size of 256 MiB", stored(FRAME, size=256 << 20), "x.bin")
spoils("zstd: no content size", stored(NO_SIZE), "x.bin")
for claim in (0, 99, 101, 2**31, 2**60, 2**64 - 1, 2**64 - 2):
    spoils(f"zstd: frame that claims {claim} bytes for 100", stored(handmade(claim), R), "x.bin")
spoils("zstd: frame and size claim 101 bytes for 100", stored(handmade(101), R, size=101))
spoils("zstd: frame and size claim 99 bytes for 100", stored(handmade(99), R, size=99))
spoils("zstd: frame and size claim 1 MiB for 100 bytes", stored(handmade(1 << 20), R, size=1 << 20))
spoils("zstd: window of 2 TiB", stored(handmade(100, descriptor=0xC0, extra=b"\xf8"), R))
spoils("zstd: two frames", stored(FRAME + FRAME), "x.bin")
spoils("zstd: a frame and an empty one", stored(FRAME + EMPTY_FRAME))
spoils("zstd: an empty frame and one", stored(EMPTY_FRAME + FRAME))
spoils("zstd: a byte after the frame", stored(FRAME + b"\0"))
spoils("zstd: a skippable frame before", stored(SKIPPABLE + FRAME))
spoils("zstd: a skippable frame after", stored(FRAME + SKIPPABLE))
spoils("zstd: nothing but a skippable frame", stored(SKIPPABLE))
spoils("zstd: nothing but an empty frame", stored(EMPTY_FRAME))
spoils("zstd: a frame cut short", stored(FRAME[:-1]))
spoils("zstd: half a frame", stored(FRAME[: len(FRAME) // 2]))
spoils("zstd: only a frame's header", stored(FRAME[:7]))
spoils("zstd: only the magic", stored(FRAME[:4]))
spoils("zstd: nothing", stored(b""))
spoils("zstd: zeros", stored(bytes(50)))
spoils("zstd: text", stored(VOCABULARY[:-1]))
spoils("zstd: a checksum cut off", stored(CHECKED[:-4]))
spoils("zstd: a wrong checksum", stored(CHECKED[:-1] + bytes([CHECKED[-1] ^ 1])))
spoils("zstd: a reserved block type", stored(handmade(100, kind=3), R))
spoils("zstd: a reserved bit", stored(handmade(100, descriptor=0xE8), R))
spoils("zstd: a block longer than the frame", stored(handmade(100, kind=0), R))
spoils("zstd: a compressed block of nothing", stored(handmade(100, kind=2, block=0, content=b""), R))
spoils("zstd: no last block", stored(handmade(100)[:-4] + (100 << 3 | 2).to_bytes(3, "little") + b"r", R))
spoils("zstd: content of another digest", stored(FRAME, content_sha256="0" * 64), "SHA-256")
spoils("zstd: needs a dictionary", stored(WITH_DICTIONARY), "x.bin")
spoils("zstd: names a dictionary", stored(handmade(100, descriptor=0xE1, extra=b"\7"), R))
for encoding in ("gzip", "", "ZSTD", "zstd ", "x" * 100_000):
    loses(
        "tok/vocab.txt",
        f"encoding {encoding[:10]} of length {len(encoding)}",
        put(*TOK, "encoding", encoding),
        "tok/vocab.txt",
    )
refused("raw: size is not length", put("assets", "LICENSE", "size", 15), "LICENSE")
refused("raw: digests differ", put("assets", "LICENSE", "content_sha256", "0" * 64), "LICENSE")
refused("zstd called raw", put(*TOK, "encoding", "raw"), "tok/vocab.txt")
refused("raw called zstd", put("assets", "LICENSE", "encoding", "zstd"), "LICENSE")
fine("empty raw asset", add_asset(raw_asset("x.bin", b"")))

# -- header


def header_is(data: bytes) -> Edit:
    return before_placing(lambda d: setattr(d, "header", data))


def header_says(**fields: Any) -> Edit:
    """Change the header of a file that is laid out for one of 64 bytes."""

    def edit(draft: Draft) -> None:
        draft.place().header = header(**fields)[:64]

    return edit


for size in (128, 192, 4096, 65472):
    fine(f"header of {size} bytes", header_is(header(size=size)))
    fine(f"header of {size} bytes with an unknown feature", header_is(header(size=size)[:64] + b"\xa5" * (size - 64)))
for size in (0, 1, 32, 63, 65, 96, 127, 65535):
    refused(f"header size {size}", header_says(size=size), "header size")
for size in (128, 1024, 65472):
    refused(f"header size {size} of a file laid out for 64", header_says(size=size))
refused(
    "file laid out for a longer header",
    edits(header_is(header(size=128)), lambda d: d.place().pack()[:10] + b"\x40" + d.pack()[11:]),
)
for bit in (0, 1, 31, 32, 63):
    refused(f"incompatible bit {bit}", header_says(incompatible=1 << bit), "features")
    fine(f"compatible bit {bit}", header_says(compatible=1 << bit))
fine("all compatible bits", header_says(compatible=2**64 - 1))
for major in (0, 2, 255, 256, 65535):
    refused(f"major {major}", header_says(major=major), f"version {major}")
fine(
    "reserved bytes of the header",
    before_placing(lambda d: setattr(d, "header", header()[:12] + b"\xff" * 4 + header()[16:32] + b"\xff" * 32)),
)
refused("another magic", header_says(magic=b"\x89QFN\r\n\x1a\n"), "not a qformat file")

# -- trailer


def trailer_says(**fields: Any) -> Edit:
    return lambda draft: draft.place().pack(**fields)


for minor in (1, 2, 2**31, 2**32 - 1):
    fine(f"minor {minor}", before_placing(lambda d, minor=minor: setattr(d, "minor", minor)))
fine("reserved bytes of the trailer", trailer_says(reserved=b"\xff" * 24))
refused("CRC-32", trailer_says(crc_xor=1), "CRC-32")
refused("end magic", trailer_says(end_magic=b"QFM-END\r"), "trailer")
refused("digest of the index", trailer_says(index_sha256=bytes(32)), "index")
refused("digest of the records", trailer_says(records_sha256=bytes(32)), "records")
for length in (0, 1, 2**31, 2**53, 2**63, 2**64 - 1):
    refused(f"index_length {length}", trailer_says(index_length=length))
    refused(f"records_length {length}", trailer_says(records_length=length or 1))
    refused(f"index_offset {length}", trailer_says(index_offset=length))


def wrap_around(draft: Draft) -> bytes:
    index = draft.index_bytes()
    return draft.pack(index_length=(len(index) + 64) % 2**64, records_length=2**64 - 64)


def index_later(by: int) -> Edit:
    """Let the trailer count the first bytes of the index as segments."""

    def edit(draft: Draft) -> bytes:
        index = draft.index_bytes()
        at = len(draft.header) + len(draft.body)
        return draft.header + draft.body + index + trailer(index[by:], at + by)

    return edit


refused("lengths that wrap around", wrap_around)
for by in (1, 64):
    refused(f"index {by} bytes later", index_later(by))
refused("index is the header", lambda d: header() + trailer(header(), 0))
refused("nothing but header and trailer", lambda d: header() + trailer(b"", 64))
refused("header and trailer overlap", lambda d: header()[:64] + trailer(b"", 0)[1:])
refused("no room for a header", lambda d: MAGIC + trailer(b"", 0))

# -- trailer records


def records_are(data: bytes) -> Edit:
    return before_placing(lambda d: setattr(d, "records", data))


SKIPPED = trailer_record(b"a signature, say")
fine("record: one", records_are(SKIPPED))
fine("record: many", records_are(b"".join(trailer_record(bytes(n), kind=n) for n in range(20))))
fine("record: other flags", records_are(trailer_record(b"x", flags=0xFFFFFFFE)))
fine("record: type 0 and empty", records_are(trailer_record(kind=0)))
fine("record: the largest type", records_are(trailer_record(kind=2**32 - 1)))
for flags in (1, 3, 0xFFFFFFFF):
    refused(
        f"record: must understand, flags {flags:#x}",
        records_are(SKIPPED + trailer_record(kind=9, flags=flags)),
        "record 9",
    )
for count in (1, 7, 8, 15):
    refused(f"record: {count} bytes", records_are(bytes(count)))
    refused(f"record: {count} bytes after one", records_are(SKIPPED + bytes(count)))
for length in (1, 17, 24, 2**31, 2**63, 2**64 - 1, 2**64 - 16, 2**64 - 32):
    refused(f"record: length {length} of 16", records_are(trailer_record(b"", length=length)))
    refused(f"record: length {length} of 16 after one", records_are(SKIPPED + trailer_record(b"", length=length)))
refused("record: padding is missing", records_are(trailer_record(b"x")[:-7]))
refused("record: padding is not zero", records_are(trailer_record(b"x")[:-1] + b"\1"))
refused("record: 8 bytes too many", records_are(SKIPPED + bytes(8)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode())
def test_both_readers_agree_on(case: Case, tmp_path: Path, small: bytes) -> None:
    draft = small_draft()
    data = case.edit(draft) or draft.pack()
    content, report = compare_readers(tmp_path / "f.qf", data)
    if case.refused:
        assert content.refused is not None
        assert case.says in content.refused
        assert not report.ok
        return
    assert content.refused is None
    assert {name for _, name in content.errors} == set(case.lost)
    for (_, name), message in content.errors.items():
        assert case.says in message
        assert name in message
    if case.verified is not None:
        assert report.ok == case.verified
    else:  # verify decodes assets, for that needs no codec
        refused = "needs" in case.says or "unknown encoding" in case.says or "must" in case.says
        assert report.ok or ("x.bin" in case.lost and not refused)
    original = read_reference(small)
    touched = {*case.lost, "a.weight", "bool"}
    for key in content.values.keys() & original.values.keys():
        if key[1] not in touched:
            assert content.values[key] == original.values[key]


def test_the_cases_for_both_readers_have_unique_names() -> None:
    names = [case.name for case in CASES]
    assert [name for name in set(names) if names.count(name) > 1] == []


# ---- what the table does not reach


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7C01, 0xFFFF])
def test_infinite_and_nan_scales_are_refused_or_decode(tmp_path: Path, scale: int, kernels: str) -> None:
    # A decoder may refuse them, or give any value for the block; the reference refuses.
    draft = small_draft()
    blocks = bytearray(draft.tensors[1]["segments"][0]["bytes"])
    blocks[18:20] = scale.to_bytes(2, "little")
    draft.tensors[1]["segments"][0]["bytes"] = bytes(blocks)
    path = tmp_path / "f.qf"
    path.write_bytes(draft.pack())
    code = textwrap.dedent("""
        import sys, qformat
        with qformat.safe_open(sys.argv[1]) as file:
            for dtype in (None, "float16", "float64"):
                try:
                    assert file.get_tensor("b.weight", dtype).shape == (3, 40)
                except qformat.FormatError:
                    pass
    """)
    env = os.environ | {"QFORMAT_KERNELS": kernels}
    subprocess.run([sys.executable, "-W", "error", "-c", code, path], check=True, env=env, timeout=60)


def test_tensors_read_without_a_copy_are_checked(tmp_path: Path) -> None:
    draft = small_draft()
    draft.tensors[2]["segments"][0]["bytes"] = b"\0\1\2\1\0"
    path = tmp_path / "f.qf"
    path.write_bytes(draft.pack())
    with qformat.safe_open(path) as file, pytest.raises(FormatError, match="bool"):
        file.get_tensor("bool", copy=False)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2**52, 0), (0, 2**52)])
def test_tensors_without_elements_are_read_in_every_way(tmp_path: Path, shape: tuple[int, ...]) -> None:
    draft = Draft(tensors=[raw_tensor("raw", "f32", weights(0, 0)) | {"shape": list(shape)}])
    path = tmp_path / "f.qf"
    path.write_bytes(draft.pack())
    with qformat.safe_open(path) as file, bounded_memory(1 << 20):
        for copy in (True, False):
            assert file.get_tensor("raw", copy=copy).shape == shape
        if len(shape) == 2:
            assert file.get_rows("raw", []).shape == (0, shape[1])
            assert file.get_rows("raw", slice(0, 2)).shape == (min(2, shape[0]), shape[1])
        if len(shape) == 2 and shape[0]:
            assert file.get_rows("raw", 1).shape == shape[1:]
            assert file.get_rows("raw", [0, -1]).shape == (2, shape[1])


def test_the_torch_reader_refuses_hostile_files(tmp_path: Path) -> None:
    from qformat.readers.torch import load_file

    path = tmp_path / "f.qf"
    path.write_bytes(small_draft().pack())
    tensors = load_file(path)
    assert sorted(tensors) == NAMES
    for edit in (
        put(*A, "codec", "future"),
        put(*A, "dtype", "future"),
        put(*A, "shape", [2**52]),
        put(*A, "segments", 0, "sha256", "0" * 64),
        put(*B, "must_understand", ["future"]),
        put(*B, "shape", [2**26, 2**26]),
        put("header_sha256", "0" * 64),
    ):
        draft = small_draft()
        path.write_bytes(edit(draft) or draft.pack())
        with pytest.raises(FormatError), bounded_memory(4 << 20):
            load_file(path)


@pytest.mark.parametrize("shape", [(2**52,), (2**26, 2**26), (2**40, 1), (1, 2**40), (2**52, 0, 1)])
def test_absurd_shapes_are_refused_in_little_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "f.qf"
    for place in (A, B):
        draft = small_draft()
        put(*place, "shape", list(shape))(draft)
        path.write_bytes(draft.pack())
        with bounded_memory(4 << 20):
            content = read_package(path)
        assert len(content.errors) == 1


def many_blocks(**fields: Any) -> bytes:
    """Return a frame that claims 1 MiB and holds 62 MiB, in blocks of 128 KiB."""
    block = (1 << 17 << 3 | 2).to_bytes(3, "little") + b"r"
    return handmade(1 << 20, **fields)[:-4] + 500 * block + b"\1\0\0"


def test_zstd_bombs_are_refused_in_little_memory(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "f.qf"
    path.write_bytes(small)
    read_package(path)  # imports take memory too
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    for frame, fields in (
        (bomb, {"size": 1 << 20}),
        (bomb, {"size": 1 << 20, "encoding": "future"}),
        (handmade(2**62), {"size": 1 << 28}),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24)), {"size": 1 << 24}),
        (many_blocks(), {"size": 1 << 20}),
        (many_blocks(descriptor=0xC0, extra=b"\x38"), {"size": 1 << 20}),  # a window of 128 KiB
    ):
        draft = small_draft()
        stored(frame, **fields)(draft)
        path.write_bytes(draft.pack())
        with bounded_memory(4 << 20):
            content = read_package(path)
        assert list(content.errors) == [("asset", "x.bin")]


def sparse(path: Path, head: bytes, size: int, tail: bytes) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size - len(tail))
        file.seek(0, os.SEEK_END)
        file.write(tail)


@pytest.mark.parametrize("length", [(64 << 20) + 1, 1 << 30, 1 << 40])
def test_an_index_above_the_limit_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f.qf"
    sparse(path, header(), 64 + length + 128, trailer(b"", 64, index_length=length))
    with bounded_memory(1 << 20):
        content = read_package(path)
    assert content.refused
    assert "more than an index may have" in content.refused


def in_little_memory(path: Path) -> str:
    """Open a file in a process that may have 1 GiB; return what became of it."""
    code = textwrap.dedent("""
        import sys
        from qformat import FormatError
        from qformat.container.reader import ContainerReader
        try:
            ContainerReader(sys.argv[1]).close()
        except FormatError as error:
            print("FormatError", error)
        else:
            print("opened")
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )
    return done.stdout or done.stderr


@pytest.mark.parametrize("length", [(16 << 20) + 16, 1 << 30, 1 << 40])
def test_trailer_records_above_the_limit_are_refused_unread(tmp_path: Path, length: int) -> None:
    index = Draft().index_bytes()
    path = tmp_path / "f.qf"
    end = trailer(index, 64, records_length=length, records_sha256=bytes(32))
    sparse(path, header() + index, 64 + len(index) + length + 128, end)
    with bounded_memory(1 << 20):
        content = read_package(path)
    assert content.refused
    assert "more than they may have" in content.refused


def test_trailer_records_of_16_mib_are_accepted(tmp_path: Path) -> None:
    for more, ok in ((0, True), (8, False)):
        draft = Draft(records=trailer_record(bytes((16 << 20) - 16 + more)))
        content, report = compare_readers(tmp_path / "f.qf", draft.pack())
        assert report.ok == ok
        assert (content.refused is None) == ok


def test_files_with_segments_larger_than_memory_open(tmp_path: Path) -> None:
    size = 3 << 29
    draft = Draft(tensors=[raw_tensor("a", "bool", np.zeros(0, bool))])
    draft.place()
    record = draft.index["tensors"][0]
    record["shape"] = [size]
    record["segments"][0]["length"] = size
    index = draft.index_bytes()
    path = tmp_path / "f.qf"
    sparse(path, header(), 64 + size + len(index) + 128, index + trailer(index, 64 + size))
    assert in_little_memory(path) == "opened\n"


def test_files_with_thousands_of_tensors_are_read_in_time(tmp_path: Path) -> None:
    count = 3000
    record = raw_tensor("", "u8", np.zeros(0, np.uint8))
    draft = Draft(tensors=[deepcopy(record) | {"name": f"t{i:05}"} for i in range(count)])
    draft.metadata = {f"k{i}": "v" for i in range(count)}
    content, report = compare_readers(tmp_path / "f.qf", draft.pack())
    assert report.ok
    assert len(content.values) == count


def test_assets_in_thousands_of_folders_are_read_in_time(tmp_path: Path) -> None:
    names = sorted(f"{i:04}/" + "/".join(["folder" * 10] * 15) for i in range(1000))
    content, report = compare_readers(tmp_path / "f.qf", Draft(assets=[raw_asset(n, b"") for n in names]).pack())
    assert report.ok
    assert len(content.values) == len(names)


# ---- random mutations

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

INTEGERS = st.sampled_from([0, 1, 2, 3, 18, 24, 63, 64, 108, 128, 2**31, 2**32, 2**52, TWO_53 - 1, TWO_53, 2**64, -1])
WORDS = [
    "",
    "data",
    "blocks",
    "f32",
    "f16",
    "q4_0",
    "bool",
    "raw",
    "zstd",
    "name",
    "future",
    "0" * 64,
    "../x",
    "\0",
    "é",
]
STRINGS = st.sampled_from([*NAMES, *ASSETS, *WORDS])
SCALARS = st.one_of(INTEGERS, STRINGS, st.booleans(), st.none(), st.floats(allow_nan=False), st.text(max_size=5))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(STRINGS, SCALARS, max_size=2))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in [(*path, key), *places(child, (*path, key))]]


@FUZZ
@given(data=st.data())
def test_both_readers_agree_on_random_edits_of_the_index(data: st.DataObject, tmp_path: Path) -> None:
    draft = small_draft().place()
    index = draft.index
    draft.index_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        every = places(index)
        *path, last = data.draw(st.sampled_from(every))
        parent = find(index, *path) if path else index
        action = data.draw(st.sampled_from(["set", "set", "set", "remove", "add", "copy"]))
        if action == "set":
            parent[last] = data.draw(VALUES)
        elif action == "remove":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[data.draw(STRINGS)] = data.draw(VALUES)
        elif action == "copy":
            *source, key = data.draw(st.sampled_from(every))
            try:
                parent[last] = deepcopy((find(index, *source) if source else index)[key])
            except (KeyError, IndexError, TypeError, StopIteration):
                continue
        if not index:
            break
    try:
        encoded = canonical(index)
    except UnicodeEncodeError:
        return
    compare_readers(tmp_path / "f.qf", draft.pack(encoded))


@FUZZ
@given(data=st.data())
def test_both_readers_agree_on_random_bytes_in_the_index(data: st.DataObject, tmp_path: Path) -> None:
    draft = small_draft()
    index = bytearray(draft.index_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(index)))
        end = data.draw(st.integers(at, min(len(index), at + 8)))
        index[at:end] = data.draw(st.binary(max_size=8))
    compare_readers(tmp_path / "f.qf", draft.pack(bytes(index)))


@FUZZ
@given(data=st.data())
def test_both_readers_agree_on_random_headers_trailers_and_records(data: st.DataObject, tmp_path: Path) -> None:
    draft = small_draft().place()
    numbers = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4096), st.sampled_from([64, 128, 2**63, 2**64 - 64]))
    head = bytearray(draft.header)
    for _ in range(data.draw(st.integers(0, 2))):
        head[data.draw(st.integers(8, 63))] = data.draw(st.integers(0, 255))
    draft.header = bytes(head)
    draft.records = data.draw(st.one_of(st.just(b""), st.just(SKIPPED), st.binary(max_size=60)))
    draft.minor = data.draw(st.integers(0, 2**32 - 1))
    keys = st.sampled_from(["index_offset", "index_length", "records_length"])
    compare_readers(tmp_path / "f.qf", draft.pack(**data.draw(st.dictionaries(keys, numbers, max_size=1))))


@FUZZ
@given(data=st.binary(max_size=600), start=st.sampled_from([b"", MAGIC, header()]), end=st.booleans())
def test_random_bytes_are_refused_as_a_file(data: bytes, start: bytes, end: bool, tmp_path: Path) -> None:
    whole = start + data
    content, _ = compare_readers(tmp_path / "f.qf", whole + trailer(b"", align(len(whole))) if end else whole)
    assert content.refused


@FUZZ
@given(data=st.data())
def test_random_damage_is_found(data: st.DataObject, tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "f.qf"
    path.write_bytes(saved)
    good = read_package(path)
    broken = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken)))
        end = data.draw(st.integers(at, min(len(broken), at + 64)))
        broken[at:end] = data.draw(st.binary(max_size=64))
    content, report = compare_readers(path, bytes(broken))
    assert report.ok == (bytes(broken) == saved)
    for key, value in content.values.items():
        assert value == good.values[key]


@FUZZ
@given(frame=st.binary(max_size=80), size=st.integers(0, 2**20), real=st.booleans())
def test_both_readers_agree_on_random_zstd_frames(frame: bytes, size: int, real: bool, tmp_path: Path) -> None:
    data = FRAME[: 9 + size % 20] + frame if real else FRAME[:4] + frame
    draft = small_draft()
    stored(data, size=size)(draft)
    compare_readers(tmp_path / "f.qf", draft.pack())
