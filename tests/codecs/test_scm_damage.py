"""``scm``: damaged and impossible layers are refused, or read alike by both readers."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qformat
from qformat.dtypes import DTYPES, Elements
from qformat.errors import FormatError
from tests.helpers import hostile
from tests.helpers.layered import elements
from tests.helpers.scm import drawn, read, record_of, store

KINDS = ("dense", "sparse", "wide", "bf16", "f16", "lossy", "zeros", "tiny")
every_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(kind: str) -> tuple[str, Elements]:
    x = drawn("normal", 11, 31, seed=8)
    if kind == "sparse":
        x[:, ::3] = np.where(x[:, ::3] < 0, np.float32(-0.0), np.float32(0))
    elif kind == "wide":
        x[::5, ::7] *= 100
        x[0, 0] = 1000
    elif kind == "zeros":
        x[:] = 0
    elif kind == "tiny":
        x = x[:1, :2]
    return ("scm:bpw=5" if kind == "lossy" else "scm"), elements(kind if kind in DTYPES else "f32", x)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> hostile.Records:
    path, found = tmp_path_factory.mktemp("scm") / "x.qf", hostile.Records()
    for kind in KINDS:
        type_, source = of_kind(kind)
        store(path, type_, t=source)
        found[kind] = hostile.taken_apart(path.read_bytes())
    long = np.zeros((1, 524_288 + 40), np.float32)
    long[0, ::500] = drawn("normal", 1049)
    store(path, "scm", t=long)
    found["long"] = hostile.taken_apart(path.read_bytes())
    return found


def check_all_qualities(path: Path) -> int:
    """Read at each quality without comparing digests; return how many reads are refused."""
    refused = 0
    for quality in (2, 5, None):
        with qformat.safe_open(path, quality=quality, verify=False) as f:
            shape = f.info("t").shape
            for get in (lambda f: f.get_tensor("t"), lambda f: f.get_rows("t", slice(None))):
                try:
                    found = get(f)
                except FormatError as error:
                    refused += "\n" not in str(error)
                else:
                    assert found.shape == shape
                    assert found.dtype in (np.float32, np.float16)
    return refused


def lengthened(content: bytes) -> bytes:
    """Return a segment of one chunk with the length that it has."""
    return struct.pack("<I", len(content)) + content


@every_kind
@settings(max_examples=25)
@given(data=st.data())
def test_both_readers_agree_on_changed_scm_segments(written, kind, data, tmp_path_factory):
    """By both readers of the format, digests being right."""
    record = written[kind]
    number = data.draw(st.integers(0, len(record["segments"]) - 1))
    name, content = (record["segments"][number][key] for key in ("name", "bytes"))
    if name == "grid":
        content = hostile.edited(content, data)
    else:
        chunk = hostile.edited(content[4:], data)
        cut = data.draw(st.sampled_from(["no", "no", "end", "start", "more"]))
        at = data.draw(st.integers(0, len(chunk)))
        chunk = {"no": chunk, "end": chunk[:at], "start": chunk[at:], "more": chunk + chunk[:at]}[cut]
        content = lengthened(chunk)
    path = tmp_path_factory.getbasetemp() / "changed.qf"
    data_ = hostile.packed(record, segments=hostile.changed(record, **{name: content}))
    if name == "layer.1" and len(content) * 1024 < math.prod(record["shape"]):
        return
    path.write_bytes(data_)
    package, other = hostile.read_package(path), hostile.read_reference(data_)
    assert package.refused is None
    assert hostile.verify_one(path).ok
    assert package.errors.keys() == other.errors.keys(), (package.errors, other.errors)
    assert package.values == other.values
    assert (check_all_qualities(path) > 0) >= bool(package.errors)


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_flipped_bytes_of_scm_files_are_refused_or_decode(written, kind, data, tmp_path_factory):
    """Without digests, and with all of them wrong."""
    content = bytearray(hostile.packed(written[kind]))
    first = content.index(next(one["bytes"] for one in written[kind]["segments"] if one["bytes"]))
    last = max(content.index(one["bytes"]) + len(one["bytes"]) for one in written[kind]["segments"] if one["bytes"])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(first, last - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.qf"
    path.write_bytes(content)
    check_all_qualities(path)


@every_kind
def test_truncated_scm_segments_are_refused(written, kind, tmp_path):
    """With and without lengths that fit; at every byte of short ones."""
    record = written[kind]
    for one in record["segments"]:
        name, content = one["name"], one["bytes"]
        ends = range(0, len(content), 2) if len(content) < 30 else [0, 3, 6, len(content) // 2, len(content) - 1]
        for end in ends:
            choices = [content[:end]] if name == "grid" else [content[:end], lengthened(content[4 : max(4, end)])]
            for wrong in choices:
                if wrong == content:
                    continue
                path = tmp_path / "x.qf"
                path.write_bytes(hostile.packed(record, segments=hostile.changed(record, **{name: wrong})))
                with qformat.safe_open(path) as f, pytest.raises(FormatError, match="tensor 't'"):
                    f.get_tensor("t")


def test_wrong_chunk_lengths_of_scm_layers_are_refused(written, tmp_path):
    record = written["long"]
    for one in record["segments"][1:5]:
        content = one["bytes"]
        (first,) = struct.unpack_from("<I", content)
        wrong = [
            struct.pack("<2I", first - 1, len(content) - 8 - first + 1) + content[8:],
            struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF) + content[8:],
            struct.pack("<2I", 0, len(content) - 8) + content[8:],
            content[:4],
            content + b"\0",
            content[4:],
        ]
        for changed_content in wrong:
            (tmp_path / "x.qf").write_bytes(
                hostile.packed(record, segments=hostile.changed(record, **{one["name"]: changed_content}))
            )
            with qformat.safe_open(tmp_path / "x.qf") as f, pytest.raises(FormatError, match="tensor 't'"):
                f.get_tensor("t")


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"layers": 0, "lossless": True}},
        {"params": {"layers": 65, "lossless": True}},
        {"params": {"layers": 3, "lossless": True}},
        {"params": {"layers": True, "lossless": True}},
        {"params": {"layers": 19}},
        {"params": {"layers": 19, "lossless": True, "bpw": "3"}},
        {"params": {"layers": 19, "lossless": False}},
        *({"dtype": "f64"}, {"dtype": "f8_e4m3"}, {"shape": [2**26, 2**20]}, {"shape": [12, 31]}),
        *({"shape": [0, 31]}, {"range": ...}),
        {"error": {"rmse": "1.000000000e-01", "max": "5.000000000e-01"}},
    ],
)
def test_impossible_scm_records_are_refused(written, change, tmp_path):
    record = written["dense"]
    (tmp_path / "x.qf").write_bytes(hostile.packed(record))
    assert read(tmp_path / "x.qf", name="t").shape == (11, 31)
    (tmp_path / "x.qf").write_bytes(hostile.packed(record, **change))
    with pytest.raises(FormatError, match="tensor 't'"):
        read(tmp_path / "x.qf", name="t")


def test_a_wrong_digest_of_an_scm_layer_is_reported_unless_the_layer_is_not_read(written, tmp_path):
    data = bytearray(hostile.packed(written["dense"]))
    layer = next(one["bytes"] for one in written["dense"]["segments"] if one["name"] == "layer.3")
    data[data.index(layer) + len(layer) - 2] ^= 1
    (tmp_path / "x.qf").write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor 't', segment 'layer.3' is damaged: its SHA-256"):
        read(tmp_path / "x.qf", name="t")
    record = record_of(tmp_path / "x.qf", "t")
    assert read(tmp_path / "x.qf", record.layers[1].bpw, "t").shape == (
        11,
        31,
    )  # digests of unread layers are not compared
