"""Hostile files that ask for much memory or time, and views of them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import qformat
from qformat import FormatError
from tests.helpers.cases import NAMES, A, B, handmade, stored
from tests.helpers.checkpoints import weights
from tests.helpers.files import Draft, header, put, raw_asset, raw_tensor, small_draft, trailer, trailer_record
from tests.helpers.hostile import bounded_memory, compare_readers, read_package


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


def test_assets_that_claim_more_than_4_gib_together_are_refused(tmp_path: Path) -> None:
    for count, refused in ((16, False), (17, True)):
        draft = Draft(
            assets=[raw_asset(f"{number:02}", b"") | {"encoding": "zstd", "size": 1 << 28} for number in range(count)]
        )
        content, _ = compare_readers(tmp_path / "f.qf", draft.pack())
        assert bool(content.refused) == refused
        assert len(content.errors) == (0 if refused else count)


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
    """Open a file in a process that may have 1 GiB; return ``opened`` or the error."""
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
