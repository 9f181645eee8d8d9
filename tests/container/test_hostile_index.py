"""Indexes in wrong or unusual JSON, or with missing or wrong keys: both readers agree on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.cases import TWO_53, Case, Cases, before_placing, check
from tests.helpers.files import Draft, Edit, canonical, drop, find, put, replace_text, small_draft

CASES = Cases()


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

CASES.refused("index: empty", index_is(b""))
CASES.refused("index: white space around", reworded(lambda index: b" " + canonical(index)), "canonical")
CASES.refused("index: final line end", reworded(lambda index: canonical(index) + b"\n"), "canonical")
CASES.refused(
    "index: default separators", reworded(lambda index: json.dumps(index, ensure_ascii=False, sort_keys=True).encode())
)
CASES.refused(
    "index: ASCII escapes",
    reworded(lambda index: json.dumps(index, sort_keys=True, separators=(",", ":")).encode()),
    "canonical",
)
CASES.refused(
    "index: keys in another order",
    reworded(
        lambda index: json.dumps(
            dict(sorted(index.items(), reverse=True)), ensure_ascii=False, separators=(",", ":")
        ).encode()
    ),
    "canonical",
)
CASES.refused("index: byte-order mark", reworded(lambda index: b"\xef\xbb\xbf" + canonical(index)))
CASES.refused("index: UTF-16", reworded(lambda index: canonical(index).decode().encode("utf-16-le")))
CASES.refused("index: UTF-32", reworded(lambda index: canonical(index).decode().encode("utf-32-le")))
CASES.refused("index: NUL at the end", reworded(lambda index: canonical(index) + b"\0"))
CASES.refused("index: two objects", reworded(lambda index: canonical(index) * 2))
CASES.refused("index: cut short", reworded(lambda index: canonical(index)[:-1]))
CASES.refused("index: comment", reworded(lambda index: canonical(index).replace(b"{", b"{/**/", 1)))
CASES.refused("index: comma at the end", reworded(lambda index: canonical(index)[:-1] + b",}"))
for other in (b"[]", b'"text"', b"7", b"true", b"null", b"{}", b"[{}]", b"\0" * 64, b"\xff" * 64, b"{" * 200_000):
    CASES.refused(f"index: is {other[:8]!r}", index_is(other))
CASES.refused("index: 100,000 arrays in each other", index_is(nested(100_000, "").encode()))
CASES.refused("index: 100,000 arrays left open", index_is(b"[" * 100_000))
CASES.refused("index: 100,000 objects in each other", index_is(b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
CASES.refused("duplicate key in the index", replace_text('{"assets":[', '{"assets":[],"assets":['))
CASES.refused("duplicate key in a tensor", replace_text('"shape":[2,3]', '"shape":[2,3],"shape":[2,3]'))
CASES.refused("duplicate key in metadata", replace_text('"metadata":{', '"metadata":{"made by":"another",'))
for number in (
    "2.0", "2e0", "2E0", "-2", "-0", "02", "+2", "0x2", ".5", "2.", "NaN", "Infinity", "-Infinity", "null",
    str(TWO_53), str(2**64), "9" * 400, "9" * 4300, "9" * 5000, "-" + "9" * 5000, "1e400", "1e-400", "1e99999", "2 ", "1_0", "٢",
):  # fmt: skip
    CASES.refused(
        f"shape: number {number[:12]} of length {len(number)}", replace_text('"shape":[2,3]', f'"shape":[{number},3]')
    )
    CASES.refused(
        f"unknown key: {number[:12]} of length {len(number)}", replace_text('{"assets"', f'{{"@":{number},"assets"')
    )
for text, what in (
    *((r"\u0041", "an escaped letter"), (r"\/", "an escaped slash"), (r"\u001F", "an upper-case escape")),
    *((r"\u0009", "a long escape"), (r"\u2028", "an escaped separator"), (r"\u007f", "an escaped DEL")),
    *((r"\ud800", "a lone surrogate"), (r"\udc00", "a lone low surrogate"), (r"\udc00\ud800", "swapped surrogates")),
    *((r"\ud83d\ude00", "an escaped pair of surrogates"), (r"\x41", "no escape of JSON"), ("\\", "a lone backslash")),
    *(("\t", "a bare TAB"), ("\n", "a bare LF"), ("\0", "a bare NUL"), ('"', "a bare quote")),
):
    CASES.refused(f"string: {what}", replace_text("a test", text))
for data in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80", b"\xf0\x82\x82\xac"):
    CASES.refused(f"string: bytes {data.hex()} are not UTF-8", replace_text("a test", data))
for text in (
    *("\x7f", "\x80", "\u2028", "\ufeff", "\uffff", "\U0010ffff", r"\"\\\b\t\n\f\r\u0000\u001f", "/", "\u00e9"),
    "e\u0301",
):
    CASES.fine(f"string: {text.encode('unicode_escape').decode()}", replace_text("a test", text))
for what, values in (("objects", ["{}"] * (1 << 21)), ("numbers", ["0"] * ((1 << 22) + 2))):
    text = '{"@":[' + ",".join(values) + '],"assets"'
    CASES.refused(f"too many {what}", replace_text('{"assets"', text), "more values")
CASES.fine("32 levels", replace_text('{"assets"', '{"@":' + nested(31, "") + ',"assets"'))
CASES.fine("32 levels around a number", replace_text('{"assets"', '{"@":' + nested(31, "0") + ',"assets"'))
CASES.fine("32 levels around a string", replace_text('{"assets"', '{"@":' + nested(31, '"x"') + ',"assets"'))
CASES.fine("32 levels of objects", replace_text('{"assets"', '{"@":' + '{"":' * 31 + "true" + "}" * 31 + ',"assets"'))
CASES.refused("33 levels", replace_text('{"assets"', '{"@":' + nested(32, "") + ',"assets"'), "nested")
CASES.refused(
    "33 levels of objects", replace_text('{"assets"', '{"@":' + '{"":' * 32 + "0" + "}" * 32 + ',"assets"'), "nested"
)
CASES.fine("largest integer", replace_text('{"assets"', f'{{"@":{TWO_53 - 1},"assets"'))

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
    CASES.refused(f"missing: {place}", drop(*place))
for place in REQUIRED + OPTIONAL:
    for wrong in (True, 1, "x", [], {}):
        if type(wrong) is not kind_of(place):
            CASES.refused(f"{place} is {wrong!r}", put(*place, wrong))
    CASES.refused(f"{place} is null", put(*place, None))
for place in OPTIONAL:
    if place[-1] == "must_understand":
        for wrong in ([1], [True], [[]], ["name", 1], [{}]):
            CASES.refused(f"{place} is {wrong!r}", put(*place, wrong))
        CASES.fine(f"{place} is empty", put(*place, []))
for wrong in (True, "1", [1], {}, [], None):
    CASES.refused(f"shape with {wrong!r}", put("tensors", "a.weight", "shape", [wrong, 3]))
for wrong in (1, True, [], {}, None):
    CASES.refused(f"metadata with {wrong!r}", put("metadata", "key", wrong))
for wrong in ([], {}, {"a": 1}, None):
    CASES.refused(f"params with {wrong!r}", put("tensors", "a.weight", "params", "key", wrong))
    CASES.refused(f"encoder with {wrong!r}", put("tensors", "b.weight", "encoder", "key", wrong))
for wrong in (1, "x", [], True):
    CASES.refused(
        f"tensor record {wrong!r}", before_placing(lambda d, wrong=wrong: d.place().index["tensors"].append(wrong))
    )
    CASES.refused(
        f"asset record {wrong!r}", before_placing(lambda d, wrong=wrong: d.place().index["assets"].append(wrong))
    )
    CASES.refused(
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
        CASES.refused(f"{place} is {digest[-4:]!r} of length {len(digest)}", put(*place, digest))
CASES.refused("header_sha256 of another header", put("header_sha256", "0" * 64), "header")
CASES.damaged(
    "a.weight", "digest of a segment", put("tensors", "a.weight", "segments", 0, "sha256", "0" * 64), "damaged"
)
CASES.damaged(
    "empty", "digest of an empty segment", put("tensors", "empty", "segments", 0, "sha256", "0" * 64), "damaged"
)
CASES.damaged("tok/vocab.txt", "digest of an asset", put("assets", "tok/vocab.txt", "sha256", "0" * 64), "damaged")


@CASES.each
def test_both_readers_agree_on_an_index_with(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "f.qf")
