"""Wrong or unusual names, segments, shapes and codecs in records: both readers agree on each."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.cases import (
    LAST,
    NAMES,
    TWO_53,
    A,
    B,
    Case,
    Cases,
    add_asset,
    add_tensor,
    before_placing,
    check,
    edits,
)
from tests.helpers.checkpoints import weights
from tests.helpers.files import Draft, Edit, drop, find, put, q4_0_tensor, raw_asset, raw_tensor, segment

CASES = Cases()


# -- names

X = np.arange(3, dtype="<f4")
CONTROLS = {"NUL": "a\0b", "LF": "a\nb", "ESC": "a\x1bb", "0x1f": "a\x1fb", "DEL": "a\x7fb"}
for what, name in (CONTROLS | {"empty": "", "1025 characters": "n" * 1025, "1026 bytes": "é" * 513}).items():
    CASES.refused(f"tensor name: {what}", add_tensor(raw_tensor(name, "f32", X)), "name")
    CASES.refused(f"asset name: {what}", add_asset(raw_asset(name, b"x")), "name")
    CASES.refused(f"segment name: {what}", put("tensors", "b.weight", "segments", 0, "name", name), "name")
for what, name in (
    *(("1024 characters", "n" * 1024), ("1024 bytes", "é" * 512), ("a C1 control", "\x80"), ("an emoji", "\U0001f600")),
    *(("a space", " "), ("a path", "../../etc/passwd"), ("a path of another system", "a\\b:c"), ("a dot", ".")),
):
    CASES.fine(f"tensor name: {what}", add_tensor(raw_tensor(name, "f32", X)))
for name in ("x", "data ", "Data", "../data", "\U0001f600"):
    CASES.loses("a.weight", f"segment name: {name}", put("tensors", "a.weight", "segments", 0, "name", name))
for name in (
    "../x", "..", "a/..", "a\\b", "..\\x", "C:x", "C:/x", "a:b", "\\\\h\\s", "//h/s",
    ".", "/x", "/", "a//b", "a/", "a/./b", "a/../b", "./a",
):  # fmt: skip
    CASES.refused(f"asset name: {name}", add_asset(raw_asset(name, b"x")), "path")
for name in ("a", "a/b/c/d", "...", "..a", "a..", ".hidden", "con", "~", "~root/x", "-rf", "*", "a b", "é", "%2e%2e/x"):
    CASES.fine(f"asset name: {name}", add_asset(raw_asset(name, b"x")))
CASES.refused(
    "asset is the folder of another", edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("a/b", b"y")))
)
CASES.refused(
    "asset is the folder of a far one", edits(add_asset(raw_asset("a/b", b"x")), add_asset(raw_asset("a/b/c/d", b"y")))
)
CASES.refused(
    "asset is a folder, and another name stands between",
    edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("a-", b"x")), add_asset(raw_asset("a/b", b"y"))),
)
CASES.fine("asset name of 16 components", add_asset(raw_asset("/".join("f" * 16), b"x")))
CASES.refused("asset name of 17 components", add_asset(raw_asset("/".join("f" * 17), b"x")), "path")
CASES.fine(
    "asset names with the same beginning", edits(add_asset(raw_asset("a", b"x")), add_asset(raw_asset("ab/c", b"y")))
)
CASES.refused("tensors not sorted", before_placing(lambda d: d.tensors.reverse()), "sorted")
CASES.refused("assets not sorted", before_placing(lambda d: d.assets.reverse()), "sorted")
CASES.refused("tensor twice", before_placing(lambda d: d.tensors.append(deepcopy(d.tensors[-1]))), "twice")
CASES.refused("asset twice", before_placing(lambda d: d.assets.append(deepcopy(d.assets[-1]))), "twice")
CASES.fine(
    "sorted by code point, not as UTF-16",
    edits(add_tensor(raw_tensor("\uffff", "f32", X)), add_tensor(raw_tensor("\U00010000", "f32", X))),
)
CASES.refused(
    "sorted as UTF-16",
    before_placing(lambda d: d.tensors.extend([raw_tensor("\U00010000", "f32", X), raw_tensor("\uffff", "f32", X)])),
    "sorted",
)
CASES.fine(
    "composed and decomposed characters differ",
    edits(add_tensor(raw_tensor("e\u0301", "f32", X)), add_tensor(raw_tensor("\u00e9", "f32", X))),
)
CASES.fine("tensor and asset of one name", add_asset(raw_asset("a.weight", b"x")))

# -- segments


def move(path: tuple[Any, ...], key: str, by: int) -> Edit:
    def edit(draft: Draft) -> None:
        find(draft.place().index, *path)[key] += by

    return edit


for by in (-64, -1, 1, 8, 32, 63, 64):
    for place in ((*A, "segments", 0), (*B, "segments", 0), (*LAST, "segments", 0), ("assets", "LICENSE")):
        CASES.refused(f"offset of {place[1]} moved by {by}", move(place, "offset", by))
for offset in (0, TWO_53 - 1, 2**40):
    CASES.refused(f"offset {offset}", put(*A, "segments", 0, "offset", offset))
for length in (TWO_53 - 1, 2**40, 2**31, 100_000):
    CASES.refused(f"length {length}", put(*A, "segments", 0, "length", length))
    CASES.refused(f"length {length} of the last", put(*LAST, "segments", 0, "length", length))
    CASES.refused(f"length {length} of an asset", put("assets", "tok/vocab.txt", "length", length))
CASES.refused(
    "offset and length at their ends",
    edits(put(*LAST, "segments", 0, "offset", TWO_53 - 1), put(*LAST, "segments", 0, "length", TWO_53 - 1)),
)
CASES.refused("length into the next segment", put(*A, "segments", 0, "length", 65))
CASES.damaged("a.weight", "length into the padding", put(*A, "segments", 0, "length", 25))
CASES.damaged("a.weight", "length one short", put(*A, "segments", 0, "length", 23))
CASES.refused("length 0", put(*A, "segments", 0, "length", 0))


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


CASES.refused("two tensors in the same bytes", overlap)
CASES.refused("a tensor's bytes shared with another", share)
CASES.refused("bytes that nothing accounts for", without("tensors", "b.weight"))
CASES.refused("bytes of an asset that nothing accounts for", without("assets", "LICENSE"))
CASES.refused("bytes that nothing accounts for at the end", without("tensors", "zhalf"))
CASES.fine("without the empty tensor", without("tensors", "empty"))
CASES.refused("64 bytes before the index", body_with(bytes(64)), "index")
CASES.refused("1 MiB before the index", body_with(bytes(1 << 20)), "index")
CASES.refused("1 byte before the index", body_with(bytes(1)))
CASES.loses(("a.weight", "zhalf"), "segments of two tensors swapped", swap)
CASES.fine(
    "no tensors and no assets", before_placing(lambda d: (d.tensors.clear(), d.assets.clear(), d.metadata.clear()))
)
CASES.fine("no assets", before_placing(lambda d: d.assets.clear()))


def segments_in_reverse(draft: Draft) -> None:
    # "Segments may stand in any order relative to the index."
    tensors = draft.tensors
    tensors.reverse()
    draft.place().index["tensors"] = sorted(tensors, key=lambda tensor: tensor["name"])


CASES.fine("segments in another order than the index", segments_in_reverse)


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
    CASES.loses(
        "a.weight",
        f"one segment and {more}" if more else "no segments",
        before_placing(
            lambda d, more=more: d.tensors[0].update(
                segments=[*(d.tensors[0]["segments"] if more else []), *deepcopy(more)]
            )
        ),
    )
CASES.loses(
    "a.weight",
    "the same segment name twice",
    before_placing(lambda d: d.tensors[0]["segments"].append(segment("data", b"x" * 24))),
)
for size in (0, 1, 23, 25, 48, 4096):
    CASES.loses(
        "a.weight",
        f"{size} bytes for 6 floats",
        before_placing(lambda d, size=size: d.tensors[0]["segments"][0].update(bytes=bytes(size))),
    )
for size in (0, 18, 90, 107, 109, 126, 4096):
    CASES.loses(
        "b.weight",
        f"{size} bytes for 6 blocks",
        before_placing(lambda d, size=size: d.tensors[1]["segments"][0].update(bytes=bytes(size))),
    )
CASES.loses(
    "empty", "4 bytes for no element", before_placing(lambda d: d.tensors[3]["segments"][0].update(bytes=bytes(4)))
)

# -- shapes

for shape in ([6], [1, 6], [3, 2], [6] + [1] * 15, [1] * 15 + [6], [2, 1, 3]):
    CASES.fine(f"shape {shape}", put(*A, "shape", shape))
for shape in (
    *([], [5], [7], [2, 4], [0], [2, 0], [0, 2**52], [TWO_53 - 1, 0], [2**52], [2**26, 2**26], [TWO_53 - 1]),
    [TWO_53 - 1] + [1] * 15,
):
    CASES.loses("a.weight", f"shape {shape[:4]} of {len(shape)}", put(*A, "shape", shape))
    CASES.loses("b.weight", f"q4_0 shape {shape[:4]} of {len(shape)}", put(*B, "shape", shape))
for shape in (
    *([2**52, 2**52], [2**27, 2**26], [TWO_53 - 1, 2], [2**32, 2**32], [2**52, 2**52, 0], [0, 2**27, 2**26]),
    *([2**4] * 16, [TWO_53 - 1] * 16, [1] * 17, [1] * 100_000),
):
    CASES.refused(f"shape {shape[:4]} of {len(shape)}", put(*A, "shape", shape), "a.weight")
for shape in (
    *([0], [0, 0], [4, 0], [0, 2**52], [2**52, 0], [TWO_53 - 1, 0], [0, TWO_53 - 1]),
    [0] * 16,
    [2**26, 0, 2**26],
    [0] + [8] * 15,
):
    for codec in ("f32", "q4_0"):
        record = q4_0_tensor("void", weights(0, 0)) | {"error": {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}}
        if codec == "f32":
            record = raw_tensor("void", "f32", weights(0, 0))
        CASES.fine(f"{codec} without elements: {shape[:4]} of {len(shape)}", add_tensor(record | {"shape": shape}))

# -- codecs, dtypes, params, errors

for name in ("q9_9", "", "F32", "f32 ", "q4_0:search=naive", "../q4_0", "é", "x" * 100_000):
    CASES.loses("a.weight", f"codec {name[:20]} of length {len(name)}", put(*A, "codec", name))
    CASES.loses("a.weight", f"dtype {name[:20]} of length {len(name)}", put(*A, "dtype", name))
CASES.loses(
    tuple(NAMES),
    "all codecs unknown",
    before_placing(lambda d: [t.update(codec="future") for t in d.tensors]),
    "future",
)
for codec, dtype in (
    *(("f32", "i64"), ("i64", "f32"), ("u8", "i8"), ("f8_e4m3", "f32")),
    *(("f8_e4m3", "f8_e5m2"), ("bool", "u8"), ("q4_0", "i32"), ("q4_0", "bool")),
):
    CASES.loses("a.weight", f"codec {codec} for {dtype}", edits(put(*A, "codec", codec), put(*A, "dtype", dtype)))
for value in (0, 1, "x", True, "", TWO_53 - 1):
    CASES.loses("a.weight", f"unknown parameter {value!r}", put(*A, "params", "unknown", value))
    CASES.loses("b.weight", f"unknown parameter {value!r} of q4_0", put(*B, "params", "block", value))
    CASES.fine(f"unknown encoder parameter {value!r}", put(*B, "encoder", "unknown", value))
CASES.loses("b.weight", "an encoder's parameter among the decoder's", put(*B, "params", {"search": "naive"}))
CASES.fine("without encoder", drop(*B, "encoder"))
CASES.fine("encoder of a raw tensor", put(*A, "encoder", {"x": 1}))
CASES.loses("b.weight", "without error", drop(*B, "error"))
CASES.loses(
    "a.weight", "error of a raw tensor", put(*A, "error", {"rmse": "0.000000000e+00", "max": "0.000000000e+00"})
)
CASES.fine("unknown key in error", put(*B, "error", "median", 3))
for text in ("0.000000000e+00", "9.999999999e+99", "1.000000000e-99", "2.922014871e-03", "1.000000000e+00"):
    CASES.fine(f"error {text}", put(*B, "error", "max", text))
for text in (
    *("1.000000000e+100", "1.000000000e-100", "4.940656458e-324", "", "0", "1.5e-2", "1.000000000e-2"),
    *("1.000000000e-002", "1.000000000e+0", "1.000000000e+0100", "-1.000000000e-02", "+1.000000000e-02"),
    *("-0.000000000e+00", "0.000000000e-00", "0.000000000e+01", "0.500000000e+00", "1.000000000E-02"),
    *("1.00000000e-02", "1.0000000000e-02", "10.00000000e-02", "1,000000000e-02", " 1.000000000e-02"),
    *("1.000000000e-02 ", "1.000000000e-02\n", "inf", "nan", "1.000000000e+400", "1.000000000e-400"),
):
    for key in ("rmse", "max"):
        CASES.refused(f"error {key} {text!r}", put(*B, "error", key, text))
CASES.loses("bool", "bool that is 2", before_placing(lambda d: d.tensors[2]["segments"][0].update(bytes=b"\0\1\2\1\0")))
CASES.loses(
    "bool", "bool that is 255", before_placing(lambda d: d.tensors[2]["segments"][0].update(bytes=b"\0\1\1\1\xff"))
)
for dtype in ("f16", "bf16", "f32", "f64"):
    bits = {"f16": 0x7C01, "bf16": 0x7F81, "f32": 0x7F800001, "f64": 0x7FF0000000000001}[dtype]
    size = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}[dtype]
    pattern = np.frombuffer(bits.to_bytes(size, "little") * 3, f"V{size}")
    CASES.fine(f"NaN in a raw {dtype}", add_tensor(raw_tensor("nan", dtype, pattern)))

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
        CASES.loses(label, f"must understand an {level}: {place}", change, "zzz_feature")
    else:
        CASES.refused(f"must understand an {level} of the file", change, "zzz_feature")
for place in ((), ("tensors", "b.weight"), ("tensors", "b.weight", "segments", 0), ("assets", "LICENSE")):
    CASES.fine(f"unknown key: {place}", put(*place, "zzz", {"deep": [1, {"x": "y"}], "flag": False}))
CASES.fine(
    "must understand known keys of the file",
    put("must_understand", ["tensors", "assets", "metadata", "header_sha256", "must_understand"]),
)
CASES.fine(
    "must understand known keys of a tensor",
    put(*B, "must_understand", ["name", "shape", "error", "encoder", "params", "must_understand", "name"]),
)
CASES.fine("must understand known keys of an absent one", put(*A, "must_understand", ["error", "encoder"]))
CASES.fine("must understand known keys of a segment", put(*B, "segments", 0, "must_understand", ["offset", "sha256"]))
CASES.fine("must understand known keys of an asset", put("assets", "LICENSE", "must_understand", ["size", "encoding"]))
CASES.refused("must understand a tensor's key of the file", put("must_understand", ["shape"]), "shape")
CASES.loses(
    "b.weight", "must understand a file's key of a tensor", put(*B, "must_understand", ["metadata"]), "metadata"
)
CASES.loses(
    "b.weight",
    "must understand a tensor's key of a segment",
    put(*B, "segments", 0, "must_understand", ["shape"]),
    "shape",
)
CASES.loses("b.weight", "must understand an empty key", put(*B, "must_understand", [""]))
CASES.loses("b.weight", "must understand a key of 100,000 characters", put(*B, "must_understand", ["k" * 100_000]))
CASES.fine("must_understand within metadata has no meaning", put("metadata", "must_understand", "x"))
CASES.fine("must_understand within encoder has no meaning", put(*B, "encoder", "must_understand", "x"))
CASES.fine("must_understand within error has no meaning", put(*B, "error", "must_understand", ["x"]))
CASES.fine("a future tensor beside", add_tensor(raw_tensor("c", "f32", X) | {"zzz": [1]}))


@CASES.each
def test_both_readers_agree_on_records_with(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "f.qf")
