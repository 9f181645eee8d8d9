"""spec/index.schema.json accepts the index of every golden file and refuses indexes that break a rule of spec/container.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.helpers.reference import ROOT

SPEC = ROOT / "spec"
GOLDEN = sorted((SPEC / "golden").glob("*/*.qf"))


@pytest.fixture(scope="module")
def schema() -> Any:
    content = json.loads((SPEC / "index.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def index_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    offset, length = struct.unpack_from("<QQ", data[-128:])
    return json.loads(data[offset : offset + length])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_schema_accepts_the_index_of_a_golden_file(schema, path):
    assert [error.message for error in schema.iter_errors(index_of(path))] == []


def put(place: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, key = place.split("/")
        for parent in parents:
            record = record[int(parent) if parent.isdigit() else parent]
        if value is ...:
            del record[key]
        else:
            record[key] = value

    return change


def tensor_with(key: str, value: object, codec: str = "q4_0") -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        put(key, value)(next(tensor for tensor in index["tensors"] if tensor["codec"] == codec))

    return change


TENSORS = {
    "no header digest": put("header_sha256", ...),
    "digest in upper case": put("header_sha256", "A" * 64),
    "digest and line feed": put("header_sha256", "a" * 64 + "\n"),
    "null": put("unknown", {"key": [None]}),
    "metadata of numbers": put("metadata/key", 1),
    "must_understand of numbers": put("must_understand", [1]),
    "shards beside tensors": put("shards", []),
    "must_understand names shards": put("must_understand", ["shards"]),
    "tensor without segments": tensor_with("segments", ...),
    "segment without a digest": tensor_with("segments/0/sha256", ...),
    "negative length": tensor_with("segments/0/length", -1),
    "length above 2^53 - 1": tensor_with("segments/0/length", 2**53),
    "length is a boolean": tensor_with("segments/0/length", True),
    "offset is not aligned": tensor_with("segments/0/offset", 65),
    "fraction in a shape": tensor_with("shape", [1.5]),
    "17 dimensions": tensor_with("shape", [1] * 17),
    "name with a control character": tensor_with("name", "a\n"),
    "unknown dtype": tensor_with("dtype", "f4"),
    "unknown codec": tensor_with("codec", "q4"),
    "fraction in params": tensor_with("params/x", 0.5),
    "array in encoder": tensor_with("encoder/x", []),
    "error without max": tensor_with("error/max", ...),
    "error is a number": tensor_with("error/rmse", 1),
    "error with a long exponent": tensor_with("error/rmse", "1.000000000e-100"),
    "range of a tensor that is not layered": tensor_with("range", "1.000000000e+00"),
    "layered tensor without a range": tensor_with("range", ..., "scm"),
    "layer without an error": tensor_with("segments/1/error", ..., "scm"),
    "grid with an error": tensor_with("segments/0/error", {}, "scm"),
    "error without elements": tensor_with("shape", [0], "scm"),
    "absolute name of an asset": put("assets/0/name", "/a"),
    "asset above its folder": put("assets/0/name", "a/../b"),
    "asset with a drive": put("assets/0/name", "c:a"),
    "asset in 16 folders": put("assets/0/name", "/".join("a" * 17)),
    "unknown encoding": put("assets/0/encoding", "gzip"),
    "asset of more than 256 MiB": put("assets/0/size", 2**28 + 1),
}
HEAD = {
    "no shards": put("shards", []),
    "must_understand lacks shards": put("must_understand", []),
    "shard in a folder": put("shards/0/name", "a/b"),
    "shard without a root": put("shards/0/root_sha256", ...),
}
CASES = [("tensors", *case) for case in TENSORS.items()] + [("head", *case) for case in HEAD.items()]


@pytest.mark.parametrize(("file", "change"), [case[::2] for case in CASES], ids=[case[1] for case in CASES])
def test_schema_refuses_a_changed_index(schema, file, change):
    index = index_of(SPEC / "golden" / "1.5" / f"{file}.qf")
    mutant = deepcopy(index)
    change(mutant)
    assert mutant != index
    assert not schema.is_valid(mutant)
