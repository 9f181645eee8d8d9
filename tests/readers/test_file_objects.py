"""Reading from file objects: no more than needed, and nothing left open."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.container.reader import ContainerReader
from qformat.converters.truncate import truncate
from qformat.errors import FormatError, QualityError
from qformat.quality import Quality
from qformat.readers.torch import load_file
from tests.helpers.layered import ASSETS, METADATA, OTHERS, elements, normal, write


class Counting(io.RawIOBase):
    """Bytes that note which of them are read."""

    def __init__(self, data: bytes, *, most: int | None = None, end: int | None = None) -> None:
        self.data, self.most, self.end = data, most, len(data) if end is None else end
        self.at = 0
        self.spans: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: len(self.data)}[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = len(view) if self.most is None else min(len(view), self.most)
        part = self.data[self.at : min(self.end, self.at + wanted)]
        view[: len(part)] = part
        self.spans.append((self.at, self.at + len(part)))
        self.at += len(part)
        return len(part)

    @property
    def touched(self) -> np.ndarray:
        found = np.zeros(len(self.data), bool)
        for start, stop in self.spans:
            found[start:stop] = True
        return found


def read_all(source: Any, quality: Any = None) -> dict[str, tuple[Any, ...]]:
    with qformat.safe_open(source, quality=quality) as f:
        assets = {name: f.get_asset(name) for name in f.assets()}
        assert assets == ASSETS
        arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def test_only_the_needed_ranges_of_a_file_object_are_read(layered_qf):
    file = Counting(layered_qf.read_bytes())
    with ContainerReader(layered_qf) as container:
        index = (container.trailer.index_offset, len(file.data))
        with qformat.safe_open(file, quality=2) as f:
            after_opening = file.touched
            assert not after_opening[64 : index[0]].any()
            assert after_opening[:64].all()
            assert after_opening[index[0] :].all()
            for name in f.keys():  # noqa: SIM118
                before = len(file.spans)
                f.get_tensor(name)
                needed = Quality(bits=2).of(container.tensor(name)).segments
                start, stop = needed[0].offset, needed[-1].stop
                for span in file.spans[before:]:
                    assert start <= span[0] <= span[1] <= stop
                assert len(file.spans) - before <= 2  # segments follow each other, so one range will do
                assert all(file.touched[s.offset : s.stop].all() for s in needed)
    assert file.touched.sum() < 0.12 * len(file.data)
    assert not file.closed


@pytest.mark.parametrize("quality", [2, 3.5, "max_rmse=0.01", "lossless", None])
def test_file_objects_read_like_the_path(quality, layered_qf, tmp_path):
    data = layered_qf.read_bytes()
    expected = read_all(layered_qf, quality)
    for source in (io.BytesIO(data), Counting(data), Counting(data, most=1000), io.BufferedReader(Counting(data))):
        assert read_all(source, quality) == expected
        assert not source.closed
    with layered_qf.open("rb") as file:
        file.seek(77)
        assert read_all(file, quality) == expected
        assert not file.closed
    for mode in ("rb", "r+b"):
        with (tmp_path / "copy.qf").open("wb") as file:
            file.write(data)
        with (tmp_path / "copy.qf").open(mode, buffering=0) as raw:
            assert read_all(raw, quality) == expected
    assert read_all(str(layered_qf), quality) == expected


def test_rows_and_metadata_are_read_from_file_objects(layered_qf):
    file = io.BytesIO(layered_qf.read_bytes())
    with qformat.safe_open(file, quality=3) as f, qformat.safe_open(layered_qf, quality=3) as g:
        assert f.root == g.root
        assert f.metadata == METADATA
        assert f.info("a.weight") == g.info("a.weight")
        for name in ("a.weight", "m.long", "z.q4", "z.raw"):
            assert f.get_rows(name, [1, 0]).tobytes() == g.get_rows(name, [1, 0]).tobytes()
        assert f.get_tensor("z.bias", copy=False).tobytes() == OTHERS["z.bias"].data.tobytes()
        with pytest.raises(KeyError):
            f.get_tensor("nothing")


def test_fsspec_files_are_read(layered_qf):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.pipe("/models/whole.qf", layered_qf.read_bytes())
    try:
        with fs.open("/models/whole.qf", "rb") as file:
            assert read_all(file, 3) == read_all(layered_qf, 3)
            assert {n: t.shape for n, t in load_file(file, quality=2).items()}["a.weight"] == (120, 90)
            assert not file.closed
        fs.pipe("/models/short.qf", layered_qf.read_bytes()[:-1])
        with fs.open("/models/short.qf", "rb") as file, pytest.raises(FormatError, match=r"short\.qf"):
            qformat.safe_open(file)
    finally:
        fs.rm("/models", recursive=True)


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_reads_of_file_objects_are_continued(most, tmp_path):
    write(tmp_path / "x.qf", "scm", {"a": elements("f32", normal(20, 30))})
    file = Counting((tmp_path / "x.qf").read_bytes(), most=most)
    assert read_all(file, 4) == read_all(tmp_path / "x.qf", 4)
    assert max(stop - start for start, stop in file.spans) <= most


def test_file_objects_that_end_early_are_refused(layered_qf):
    data = layered_qf.read_bytes()
    with ContainerReader(layered_qf) as container:
        segment = container.tensor("m.long").segments[3]
        index = container.trailer.index_offset
    for end in (0, 30, 64, index - 1, index + 5, len(data) - 1):
        file = Counting(data, end=end)
        with pytest.raises(FormatError) as caught:
            qformat.safe_open(file)
        assert "\n" not in str(caught.value)
        assert not file.closed
    for size in (0, 1, 63, 200, len(data) // 2, len(data) - 1):
        with pytest.raises(FormatError):
            qformat.safe_open(io.BytesIO(data[:size]))
    file = Counting(data)
    with qformat.safe_open(file, quality=4, verify=False) as f:
        file.end = segment.offset + 5
        assert f.get_tensor("a.weight").shape == (120, 90)
        with pytest.raises(FormatError, match="the file became shorter while it was read"):
            f.get_tensor("m.long")
        with pytest.raises(FormatError):
            f.get_rows("m.long", 0)


def test_damage_in_file_objects_is_found(layered_qf):
    with ContainerReader(layered_qf) as container:
        at = container.tensor("a.weight").segments[2].offset
    data = bytearray(layered_qf.read_bytes())
    data[at] ^= 1
    with qformat.safe_open(io.BytesIO(data)) as f:
        with pytest.raises(FormatError, match=r"tensor 'a.weight', segment 'layer.2' is damaged"):
            f.get_tensor("a.weight")
        assert f.get_tensor("b.bf16").shape == (90, 130)
    with qformat.safe_open(io.BytesIO(data), quality=2) as f:
        assert f.get_tensor("a.weight").shape == (120, 90)


def test_os_errors_of_file_objects_are_passed_on(layered_qf):
    class Broken(Counting):
        def readinto(self, buffer: Any) -> int:
            if 64 < self.at < 20_000:
                raise OSError(5, "the network is gone")
            return super().readinto(buffer)

    with qformat.safe_open(Broken(layered_qf.read_bytes())) as f, pytest.raises(OSError, match="the network is gone"):
        f.get_tensor("a.weight")


def open_descriptors() -> set[str]:
    """Return the files that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:  # the directory's own
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_opened_files_are_closed_and_given_file_objects_stay_open(layered_qf, tmp_path):
    path = tmp_path / "mine.qf"
    path.write_bytes(layered_qf.read_bytes())
    with qformat.safe_open(path, quality=2) as f:
        assert str(path) in open_descriptors()
        f.get_tensor("a.weight")
    assert str(path) not in open_descriptors()
    load_file(path, quality=2)
    assert str(path) not in open_descriptors()
    truncate(path, tmp_path / "cut.qf", Quality(bits=3))
    assert str(path) not in open_descriptors()
    with pytest.raises(QualityError):
        qformat.safe_open(path, quality="best")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        qformat.safe_open(path)
    assert str(path) not in open_descriptors()
    with layered_qf.open("rb") as file:
        with qformat.safe_open(file, quality=2) as f:
            f.get_tensor("a.weight")
        assert file.seek(0) == 0
        assert file.read(4) == b"\x89QFM"
        load_file(file)
        assert not file.closed
        with qformat.safe_open(file) as f:  # once more
            assert f.get_tensor("d.one").shape == (1,)
