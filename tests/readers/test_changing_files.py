"""Files that change while they are open, roots, limits of memory, forks and handles: an error, and never other values."""

from __future__ import annotations

import gc
import gzip
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import qformat
from qformat.container.reader import ContainerReader
from qformat.container.verify import verify
from qformat.converters.convert import convert
from qformat.converters.sources.container import open_container
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.gguf_file import build
from qformat.converters.sources.safetensors import open_safetensors
from qformat.errors import FormatError, IntegrityError, QualityError, SourceError
from qformat.locks import ForkLock
from qformat.pipeline.recipe import Recipe
from qformat.quality import Quality
from qformat.readers.torch import load_file

W = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture(params=["q8_0", "f32", "scm", "lut"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    qformat.save_file({"w": W, "x": W[:8]}, tmp_path / "m.qf", request.param, assets={"a.txt": b"text"})
    return tmp_path / "m.qf"


def test_a_file_that_is_changed_while_it_is_open_is_refused(path: Path) -> None:
    with qformat.safe_open(path) as f:
        first = f.get_tensor("w")
        segment = f.info("w").segments[0]
    data = path.read_bytes()
    for verified in (True, False):
        path.write_bytes(data)
        with qformat.safe_open(path, verify=verified) as f:
            os.utime(path, ns=(0, 0))
            overwrite(path, segment.offset, bytes(byte ^ 0x11 for byte in data[segment.offset : segment.offset + 8]))
            for read in (f.get_tensor, lambda name, f=f: f.get_rows(name, 0)):
                with pytest.raises(IntegrityError, match="the file was changed while it was open"):
                    read("w")
    path.write_bytes(data)
    with qformat.safe_open(path) as f:
        assert f.get_rows("w", 0).tobytes() == first[0].tobytes()
        overwrite(path, segment.offset, bytes(8))
        assert f.get_rows("w", 0).tobytes() == first[0].tobytes()  # of the copy that was checked


@pytest.mark.parametrize("verified", [True, False])
def test_a_file_that_is_cut_short_while_it_is_open_is_refused(path: Path, verified: bool) -> None:
    with qformat.safe_open(path, verify=verified) as f:
        os.truncate(path, 66)
        for read in (f.get_tensor, lambda name: f.get_rows(name, 1)):
            with pytest.raises(IntegrityError, match="the file became shorter while it was read"):
                read("w")
        with pytest.raises(IntegrityError, match="the file became shorter while it was read"):
            f.get_asset("a.txt")


def test_convert_and_export_refuse_sources_that_are_cut_short(path: Path, tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "m.safetensors")
    for opened in (open_container(path, Quality()), open_safetensors(tmp_path / "m.safetensors")):
        os.truncate(opened.files[0], 100)
        with pytest.raises(SourceError, match="the file became shorter while it was read"):
            convert(opened, tmp_path / "x.qf", Recipe.parse("f32"))
        assert not (tmp_path / "x.qf").exists()


@pytest.mark.parametrize("kind", ["zip", "old", "gguf"])
def test_torch_and_gguf_files_that_are_cut_short_while_they_are_converted_are_refused(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "m.bin"
    if kind == "gguf":
        qformat.save_file({"w": W}, tmp_path / "m.qf")
        path.write_bytes(build({}, [("w", "f32", W.shape)]).ljust(128, b"\0") + W.tobytes())
    else:
        torch.save({"w": torch.from_numpy(W)}, path, _use_new_zipfile_serialization=kind == "zip")
    opened = open_checkpoint(path)
    os.truncate(path, 300)
    with pytest.raises(SourceError, match=r"the file (became shorter|was changed) while it was read"):
        convert(opened, tmp_path / "x.qf", Recipe.parse("f32"))
    assert not (tmp_path / "x.qf").exists()


def test_sources_that_are_changed_or_replaced_are_refused(tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "m.safetensors")
    opened = open_safetensors(tmp_path / "m.safetensors")
    overwrite(tmp_path / "m.safetensors", 200, b"changed!")
    os.utime(tmp_path / "m.safetensors", ns=(5, 5))
    with pytest.raises(SourceError, match="the file was changed while it was read"):
        convert(opened, tmp_path / "x.qf", Recipe.parse("f32"))


def test_indices_are_checked_where_they_are_used(tmp_path: Path) -> None:
    """An index that is checked and then read again from shared memory leads out of bounds when another process changes it."""
    golden = Path(__file__).parents[2] / "spec" / "golden" / "1.4" / "copied.qf"
    path = tmp_path / "m.qf"
    path.write_bytes(golden.read_bytes())
    with qformat.safe_open(path, jobs=1) as f:
        expected = f.get_tensor("act_order.4")
        (places,) = [segment for segment in f.info("act_order.4").segments if segment.name == "g_idx"]
    good = path.read_bytes()[places.offset : places.stop]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            overwrite(path, places.offset, b"\xff\xff\xff\x7f" * (places.length // 4))
            overwrite(path, places.offset, good)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            with qformat.safe_open(path, jobs=1) as f:
                try:
                    assert f.get_tensor("act_order.4").tobytes() == expected.tobytes()
                except FormatError:
                    continue
    finally:
        stop.set()
        thread.join()


def test_verify_names_a_file_that_changes_meanwhile(path: Path) -> None:
    def change(_: int) -> None:
        os.utime(path, ns=(7, 7))

    (report,) = verify([str(path)], progress=change)
    assert [damage.what for damage in report.errors] == ["the file was changed while it was open: open it again"]


def test_a_root_pins_what_was_verified(path: Path, tmp_path: Path) -> None:
    with qformat.safe_open(path) as f:
        root = f.root
    assert load_file(path, root=root.upper()).keys() == {"w", "x"}
    other = tmp_path / "other.qf"
    qformat.save_file({"w": W + 1}, other)
    for read in (qformat.safe_open, load_file, ContainerReader):
        with pytest.raises(IntegrityError, match=rf"its root is [0-9a-f]{{64}}, not {root}"):
            read(other, root=root)
        with pytest.raises(IntegrityError, match="root 'abc' is not a SHA-256 in hexadecimal"):
            read(other, root="abc")


def test_a_quality_for_a_file_without_layers_is_an_error(tmp_path: Path) -> None:
    qformat.save_file({"w": W}, tmp_path / "m.qf", "q8_0")
    for read in (qformat.safe_open, load_file):
        with pytest.raises(QualityError, match=r"m\.qf: holds no layered tensors \(type scm\)"):
            read(tmp_path / "m.qf", quality=3)


def test_tensors_that_would_take_much_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    zeros = np.broadcast_to(np.float16(0), (1 << 13, 1 << 13))  # of 256 MiB as float32
    qformat.save_file({"w": np.ascontiguousarray(zeros), "x": W}, path, {"w": "ternary", "x": "f32"})
    stored = path.stat().st_size
    assert stored < 1 << 19
    message = r"would take \d+ bytes of memory, more than \d+, and has \d+ in the file; give max_bytes="
    with qformat.safe_open(path) as f:
        with pytest.raises(FormatError, match=f"tensor 'w' {message}"):
            f.get_tensor("w", np.float64)
        assert not f.get_rows("w", [0, 5, 5]).any()
    with qformat.safe_open(path, max_bytes=1000) as f, pytest.raises(FormatError, match=f"tensor 'x' {message}"):
        f.get_tensor("x")
    with pytest.raises(FormatError, match=f"its tensors {message}"):
        load_file(path, dtype="float64")
    with pytest.raises(FormatError, match=f"its tensors {message}"):
        load_file(path, max_bytes=1 << 20)


def test_assets_that_would_take_much_memory_are_refused(tmp_path: Path) -> None:
    qformat.save_file({}, tmp_path / "m.qf", assets={"a.txt": bytes(5000)})
    with (
        qformat.safe_open(tmp_path / "m.qf", max_bytes=4999) as f,
        pytest.raises(FormatError, match=r"asset 'a\.txt' would"),
    ):
        f.get_asset("a.txt")
    with qformat.safe_open(tmp_path / "m.qf", max_bytes=5000) as f:
        assert f.get_asset("a.txt") == bytes(5000)


# ---- processes


def in_child(work: object) -> int:
    """Return the exit status of a forked process that calls `work`."""
    process = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[arg-type]
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("how", ["path", "raw", "buffered"])
def test_handles_are_read_in_forked_processes(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.qf"
    qformat.save_file({f"w{i:02}": np.full((64, 64), i, np.float32) for i in range(20)}, path)
    source = path if how == "path" else path.open("rb", buffering=0 if how == "raw" else -1)
    code = multiprocessing.get_context("fork")
    with qformat.safe_open(source) as f:

        def work() -> None:
            for i in np.random.default_rng(os.getpid()).integers(0, 20, 200):
                assert (f.get_tensor(f"w{i:02}") == i).all()

        processes = [code.Process(target=work) for _ in range(2)]
        for process in processes:
            process.start()
        work()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    if how != "path":
        source.close()  # type: ignore[union-attr]


def test_file_objects_without_a_descriptor_of_their_own_are_refused_in_forked_processes(tmp_path: Path) -> None:
    qformat.save_file({"w": W}, tmp_path / "m.qf")
    with gzip.open(tmp_path / "m.gz", "wb") as packed:
        packed.write((tmp_path / "m.qf").read_bytes())
    with gzip.open(tmp_path / "m.gz", "rb") as file, qformat.safe_open(file) as f:  # type: ignore[arg-type]

        def work() -> None:
            with pytest.raises(SourceError, match="the open file belongs to another process"):
                f.get_tensor("w")

        assert in_child(work) == 0
        assert (f.get_tensor("w") == W).all()


def test_locks_are_free_in_a_forked_process() -> None:
    lock = ForkLock()

    def work() -> None:
        with lock:
            pass

    with lock:
        assert in_child(work) == 0


def test_handles_are_closed_without_the_garbage_collector(path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    gc.collect()
    gc.disable()
    try:
        before = len(list(descriptors.iterdir()))
        for _ in range(5):
            qformat.safe_open(path).get_tensor("w")
        assert len(list(descriptors.iterdir())) == before
    finally:
        gc.enable()


def test_pickled_handles_open_the_same_file_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with qformat.safe_open(path.name, jobs=1) as f:
        packed = pickle.dumps(f)
        expected = f.get_tensor("w")
    monkeypatch.chdir("/")
    with pickle.loads(packed) as again:
        assert again.get_tensor("w").tobytes() == expected.tobytes()
    path.unlink()
    qformat.save_file({"w": W + 1}, path)
    with pytest.raises(IntegrityError, match="its root is"):
        pickle.loads(packed)
    with path.open("rb") as file, qformat.safe_open(file) as f, pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(f)


# ---- many shards


def test_a_file_in_more_shards_than_open_files_is_read(tmp_path: Path) -> None:
    code = """
        import resource, sys
        import numpy as np
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import qformat
        from qformat.container.reader import ContainerReader
        with qformat.safe_open(sys.argv[1]) as f:
            assert len(f.keys()) == 90
            for _ in range(2):
                for i, name in enumerate(f.keys()):
                    assert (f.get_tensor(name) == i).all()
    """
    source = tmp_path / "s.safetensors"
    save_file({f"t{i:03}": np.full((4, 32), i, np.float32) for i in range(90)}, source)
    command = [
        sys.executable,
        "-m",
        "qformat",
        "convert",
        source,
        tmp_path / "m.qf",
        "--shard-size",
        "600",
        "-t",
        "f32",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert len(list(tmp_path.glob("m-*.qf"))) > 64
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "m.qf"], check=True, timeout=120)
