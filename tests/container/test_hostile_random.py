"""Random changes of files: both readers agree on each."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.cases import ASSETS, FRAME, NAMES, SKIPPED, TWO_53, stored
from tests.helpers.files import MAGIC, align, canonical, find, header, small_draft, trailer
from tests.helpers.hostile import compare_readers, read_package

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

INTEGERS = st.sampled_from([0, 1, 2, 3, 18, 24, 63, 64, 108, 128, 2**31, 2**32, 2**52, TWO_53 - 1, TWO_53, 2**64, -1])
WORDS = [
    *("", "data", "blocks", "f32", "f16", "q4_0", "bool", "raw", "zstd", "name", "future"),
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
