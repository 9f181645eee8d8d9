"""Files of every released format version: they have to be there, and to read as they always did."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.container.layout import MAJOR, MINOR
from qformat.container.verify import verify
from tests.helpers.reference import ROOT, load_script

GOLDEN = ROOT / "spec" / "golden"
# Listed here, so that a file that is lost is missed.
FILES = [(version, name) for version in ("1.0", "1.1", "1.2", "1.3", "1.4", "1.5") for name in ("tensors", "empty")]
FILES += [(version, name) for version in ("1.4", "1.5") for name in ("copied", "head")]
FILES += [("1.4", "head-00001-of-00002"), ("1.4", "head-00002-of-00002")]
FILES += [("1.5", "head-00001-of-00002-93aee9c62b2b"), ("1.5", "head-00002-of-00002-2def8c1a2a4b")]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(params=FILES, ids="/".join)
def golden(request) -> tuple[Path, dict[str, np.ndarray]]:
    version, name = request.param
    folder = GOLDEN / version
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return folder / f"{name}.qf", dict(arrays)


def test_every_golden_file_is_listed():
    assert sorted(FILES) == sorted((path.parent.name, path.stem) for path in GOLDEN.glob("*/*.qf"))
    assert (GOLDEN / f"{MAJOR}.{MINOR}").is_dir(), "this format version has no golden files"


def test_golden_files_are_unchanged(golden):
    path, _ = golden
    sums = dict(reversed(line.split("  ")) for line in (path.parent / "SHA256SUMS").read_text().splitlines())
    for file in (path, path.with_suffix(".npz")):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sums[file.name]


def test_both_readers_return_the_golden_values(golden, reference):
    path, arrays = golden
    assert verify([str(path)])[0].ok
    independent = reference.read_path(path)
    with qformat.safe_open(path) as f:
        assert f.root == independent.root
        assert f.keys() == list(independent.tensors) == sorted(k[8:] for k in arrays if k.startswith("decoded/"))
        for name in f.keys():  # noqa: SIM118  no mapping
            assert same(f.get_tensor(name), arrays[f"decoded/{name}"]), name
            assert same(reference.decode(independent.tensors[name]), arrays[f"decoded/{name}"]), name
        assert f.assets() == list(independent.assets)
        for name in f.assets():
            assert f.get_asset(name) == reference.decode_asset(independent.assets[name])
        assert f.metadata == independent.metadata


def test_this_version_writes_the_golden_bytes(golden, tmp_path):
    path, arrays = golden
    if path.parent.name != f"{MAJOR}.{MINOR}":
        pytest.skip("an older version")
    make = load_script(GOLDEN / "make.py")
    if path.stem not in make.sources():
        pytest.skip("a shard, which is written with its head")
    sources = {name.removeprefix("source/"): array for name, array in arrays.items() if name.startswith("source/")}
    again = make.sources()[path.stem]
    assert all(same(sources[name], again[name]) for name in again)
    assert set(sources) == set(again)
    make.write(path.stem, dict(reversed(sources.items())), tmp_path / path.name, jobs=2)
    for written in tmp_path.iterdir():
        assert written.read_bytes() == (path.parent / written.name).read_bytes()


def test_the_golden_script_does_not_overwrite_files(monkeypatch):
    make = load_script(GOLDEN / "make.py")
    monkeypatch.setattr("sys.argv", ["make.py", f"{MAJOR}.{MINOR}"])
    with pytest.raises(FileExistsError):
        make.main()
