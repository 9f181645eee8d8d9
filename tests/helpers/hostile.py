"""Reading damaged and hostile files with both readers, and the parts such files are made of."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import qformat
from qformat import FormatError
from qformat.container.verify import FileReport, verify
from tests.helpers.files import Draft, Json
from tests.helpers.reference import reference

ERROR = {"rmse": "1.000000000e-01", "max": "5.000000000e-01"}  # of a record, in the form of the index

# Shapes of small tensors, and shapes whose segments have other lengths.
SHAPES = [(2, 341), (3, 5, 3), (1,), (), (0, 64), (5, 0)]
OTHER_SHAPES = [(31,), (2, 373), (3, 341), (341, 2), (2**20, 341), (2, 2**45), (2**26, 2**26), (2**52,)]

# Values and names of parameters, most of them impossible.
NUMBERS = [*range(9), 16, 31, 32, 33, 48, 64, 96, 128, 129, 256, 512, -1, -32, 2**20, 2**20 + 32, 2**53 - 32]
WORDS = ["", "row", "row ", "ROW", "Row", "tensor", "Tensor", "block", "col", "true", "4", "32", "128", "f16", "F16"]
WORDS += ["f32", "f64", "bf16", "BF16", "float16", "f8_e4m3"]
ODD_VALUES = [True, False, 2**53 - 1, 2**53, 2**64, 1.0, 4.0, 128.0, None, [], [128], {}, {"row": 1}]
PARAMETERS = ["Block", "block", "bits", "group", "scale", "search", "optimize", "fit", "zeros", "data"]
PARAMETERS += ["must_understand"]


@dataclass
class Content:
    """Result of reading a file: the error of opening it, or values and errors by kind (``tensor``, ``asset``) and name."""

    refused: str | None = None
    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    errors: dict[tuple[str, str], str] = field(default_factory=dict)


def value_of(array: np.ndarray | bytes) -> Any:
    """Return a value that is equal for results with the same bits, NaNs included."""
    return array if isinstance(array, bytes) else (array.dtype.str, array.shape, array.tobytes())


def read_package(path: Path) -> Content:
    """Read everything in a file with the package."""
    content = Content()

    def take(kind: str, name: str, get: Callable[[], Any]) -> None:
        try:
            content.values[kind, name] = value_of(get())
        except FormatError as error:
            content.errors[kind, name] = one_line(error, path)

    try:
        file = qformat.safe_open(path, jobs=1)
    except FormatError as error:
        return Content(one_line(error, path))
    with file:
        for name in file.keys():  # noqa: SIM118
            take("tensor", name, lambda name=name: file.get_tensor(name))
        for name in file.assets():
            take("asset", name, lambda name=name: file.get_asset(name))
    return content


def read_reference(data: bytes) -> Content:
    """Read everything in a file with the independent reader."""
    content = Content()
    try:
        file = reference.read(data)
    except reference.SpecError as error:
        return Content(str(error))
    for kind, items, decode in (
        ("tensor", file.tensors, reference.decode),
        ("asset", file.assets, reference.decode_asset),
    ):
        for name, item in items.items():
            try:
                content.values[kind, name] = value_of(decode(item))
            except reference.SpecError as error:
                content.errors[kind, name] = str(error)
    return content


def one_line(error: FormatError, path: Path) -> str:
    """Return the message of an error, which is one short line that begins with the path."""
    text = str(error)
    assert error.path == str(path)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 1000
    return text


def verify_one(path: Path) -> FileReport:
    """Return the report of `verify` on a file."""
    (report,) = verify([str(path)], jobs=1)
    assert all("\n" not in damage.what for damage in report.errors)
    return report


def compare_readers(path: Path, data: bytes) -> tuple[Content, FileReport]:
    """Write a file, read it with both readers and `verify`, and assert that they agree."""
    path.write_bytes(data)
    package, report, other = read_package(path), verify_one(path), read_reference(data)
    if package.refused:
        assert not report.ok
        assert other.refused, f"only the package refuses: {package.refused}"
    elif other.refused:
        # The reference checks all digests and padding first. In the package that is the business of `verify`.
        assert not report.ok, f"only the reference refuses: {other.refused}"
    else:
        unreadable = {name for kind, name in package.errors if kind == "asset"}
        assert {damage.asset for damage in report.errors} <= unreadable, f"only verify complains: {report.errors}"
        assert package.errors.keys() == other.errors.keys()
        assert package.values == other.values
    return package, report


@contextmanager
def bounded_memory(limit: int) -> Iterator[None]:
    """Assert that the block allocates fewer than `limit` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


def packed(record: Json, **changes: Any) -> bytes:
    """Return a file with one tensor; keys whose value is ``...`` are left out of its record."""
    record = record | changes
    record["segments"] = [dict(one) for one in record["segments"]]
    return Draft(tensors=[{key: value for key, value in record.items() if value is not ...}]).pack()


def readable(path: Path, record: Json, **changes: Any) -> bool:
    """Return whether the only tensor of a file can be read; both readers have to agree, and to give the same bits."""
    content, _ = compare_readers(path, packed(record, **changes))
    return content.refused is None and not content.errors


def taken_apart(data: bytes) -> Json:
    """Return the record of the only tensor of a file, its segments with their bytes: the inverse of `packed`."""
    draft = Draft.of(data)
    (tensor,) = deepcopy(draft.index["tensors"])
    for one in tensor["segments"]:
        at = one.pop("offset") - len(draft.header)
        one["bytes"] = draft.body[at : at + one.pop("length")]
        del one["sha256"]
    return tensor


def changed(record: Json, **contents: bytes) -> list[Json]:
    """Return the segments of a record, some of them with other bytes."""
    return [one | {"bytes": contents.get(one["name"], one["bytes"])} for one in record["segments"]]


class Records(dict[Any, Json]):
    """Records of written tensors, whose representation is short: hypothesis prints it for each example."""

    def __repr__(self) -> str:
        return "Records()"


def edited(content: bytes, data: st.DataObject) -> bytes:
    """Return bytes with one to three drawn changes."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        near = data.draw(st.sampled_from([12, 60, 300, len(found)]))
        at = data.draw(st.integers(0, max(0, min(near, len(found)) - 1)))
        kind = data.draw(st.sampled_from(["bit", "byte", "swap", "copy"]))
        if kind == "bit" and found:
            found[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte" and found:
            found[at] = data.draw(st.integers(0, 255))
        elif kind == "swap" and len(found) > at + 1:
            found[at], found[at + 1] = found[at + 1], found[at]
        elif kind == "copy":
            found[at : at + 8] = found[: len(found[at : at + 8])]
    return bytes(found)
