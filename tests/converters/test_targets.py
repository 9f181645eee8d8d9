"""Targets that exist, cannot be written, or have another writer, and runs that are interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qformat import safe_open
from qformat.container.layout import MAGIC
from qformat.container.verify import verify
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe
from tests.helpers.checkpoints import weights, write_safetensors
from tests.helpers.cli import cli_finish, cli_start, invoke, one_line, run_all, run_cli, valid
from tests.helpers.stopping import Stopped, stop_after


def test_convert_keeps_an_existing_file_without_force(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.write_bytes(b"precious")
    message = one_line(run_cli("convert", source, target))
    assert str(target) in message
    assert "--force" in message
    assert target.read_bytes() == b"precious"
    assert run_cli("convert", source, target, "--dry-run").code == 0
    assert target.read_bytes() == b"precious"
    assert run_cli("convert", source, target, "--force").code == 0
    valid(target)
    assert not Path(f"{target}.partial").exists()


def test_convert_keeps_a_broken_link_without_force(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.symlink_to(tmp_path / "elsewhere")
    assert "--force" in one_line(run_cli("convert", source, target))
    assert target.is_symlink()
    assert run_cli("convert", source, target, "--force").code == 0
    assert target.is_symlink()
    valid(tmp_path / "elsewhere")


IMPOSSIBLE = {"directory": "is a directory", "": "is a directory", "none/m.qf": "does not exist", "file/m.qf": "file"}
IMPOSSIBLE |= {"x" * 253 + ".qf": "its name is too long: 256 bytes, and 255 are allowed", "ü" * 150: "too long"}
IMPOSSIBLE |= {"pipe": "not a regular file", "loop": "is a link that leads to itself"}


@pytest.mark.parametrize(("name", "says"), IMPOSSIBLE.items())
def test_impossible_targets_are_refused(name: str, says: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    target = tmp_path / name
    before = sorted(tmp_path.rglob("*"))
    for result in run_all(["convert", source, target], ["convert", source, target, "--force"]):
        message = one_line(result)
        assert str(target) in message
        assert says in message or (name in ("pipe", "loop") and "exists already" in message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("length", [236, 240, 248, 255])
def test_names_as_long_as_the_file_system_permits(length: int, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    output = folder / ("a" * (length - 3) + ".qf")
    with pytest.raises(Stopped):
        convert(open_checkpoint(source), output, Recipe.parse("f32"), resume=True, jobs=1, progress=stop_after(2))
    assert convert(open_checkpoint(source), output, Recipe.parse("f32"), resume=True).resumed
    assert [*folder.iterdir()] == [output]
    valid(output)


@pytest.mark.parametrize("options", [(), ("--shard-size", "1kB")])
def test_a_target_that_is_a_link_is_followed(options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    store, link = tmp_path / "store", tmp_path / "latest.qf"
    store.mkdir()
    (store / "v1.qf").write_bytes(b"old")
    link.symlink_to("store/v1.qf")
    assert "exists already" in one_line(run_cli("convert", source, link))
    assert (store / "v1.qf").read_bytes() == b"old"
    assert run_cli("convert", source, link, "--force", *options).code == 0
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.qf", "model", "store"]
    assert all(report.ok for report in verify([str(link), str(store / "v1.qf")]))
    with safe_open(link) as linked, safe_open(store / "v1.qf") as real:
        assert linked.keys() == real.keys()
    invoke("export", store / "v1.qf", tmp_path / "real", "--to", "hf")
    (tmp_path / "hf").symlink_to("real")
    invoke("export", link, tmp_path / "hf", "--to", "hf", "--force")
    assert (tmp_path / "hf").is_symlink()
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["directory", "file", "link", "broken link", "pipe"])
def test_whatever_has_the_name_of_the_workspace_is_kept(kind: str, source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "m.qf.partial"
    other = tmp_path / "other"
    if kind == "directory":
        partial.mkdir()
        (partial / "m.qf").write_bytes(b"precious")
    elif kind == "file":
        partial.write_bytes(MAGIC)
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.symlink_to(other)
        if kind == "link":
            other.mkdir()
            (other / "m.qf").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    assert f"{partial}: exists, but is not the workspace" in one_line(
        run_cli("convert", source, tmp_path / "m.qf", "--resume")
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_bytes() == b"precious" for path in tmp_path.rglob("m.qf"))


def test_the_workspace_of_a_killed_conversion_is_reused(source: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "m.qf", tmp_path / "m.qf.partial"
    for rest in (
        {},
        {"m.qf.lock": b""},
        {"m.qf.lock": b"qformat w"},
        {"m.qf.lock": b"qformat workspace\n", "m.qf": b"x", "m.qf.draft": b"x"},
    ):
        partial.mkdir(0o700)
        for name, data in rest.items():
            (partial / name).write_bytes(data)
        assert run_cli("convert", source, target, "--force").code == 0
        valid(target)
        assert not partial.exists()
        assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_target_in_an_unwritable_directory_is_refused(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o500)
    if os.access(directory, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "not writable" in one_line(run_cli("convert", source, directory / "m.qf"))


def limit_file_size(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_conversion_that_hits_the_file_size_limit_leaves_the_target_unchanged(tmp_path: Path) -> None:
    source, target, full = tmp_path / "x.safetensors", tmp_path / "m.qf", tmp_path / "full.qf"
    write_safetensors(source, {"w": weights(0, 400, 400), "z": weights(1, 10)})
    assert run_cli("convert", source, full, "-t", "f32").code == 0
    size = full.stat().st_size
    limits = [(limit, None) for limit in (0, 64, 1 << 19, size - 300)]
    for limit, before in [*limits, (1 << 19, b"precious"), (size - 1, b"precious")]:
        target.unlink(missing_ok=True)
        if before:
            target.write_bytes(before)
        options = ["-t", "f32", *(["--force"] if before else [])]
        message = one_line(run_cli("convert", source, target, *options, preexec_fn=limit_file_size(limit)))
        assert str(target) in message
        assert "file size" in message
        assert not Path(f"{target}.partial").exists()
        assert (target.read_bytes() if target.exists() else None) == before
    assert run_cli("convert", source, target, "-t", "f32", "--force", preexec_fn=limit_file_size(size)).code == 0
    assert target.read_bytes() == full.read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if not mount or not umount or subprocess.run([mount, *options], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no small file system can be mounted")
    yield directory
    subprocess.run([umount, str(directory)], check=True)


def test_a_conversion_to_a_full_disk_leaves_the_target_unchanged(small_disk: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", small_disk / "m.qf"
    write_safetensors(source, {"w": weights(0, 1000, 1000)})
    message = one_line(run_cli("convert", source, target, "-t", "f32"))
    assert str(target) in message
    assert "the disk is full" in message
    assert list(small_disk.iterdir()) == []
    assert run_cli("convert", source, target).code == 0  # q4_0 has room
    before = target.read_bytes()
    assert "the disk is full" in one_line(run_cli("convert", source, target, "--force"))
    assert list(small_disk.iterdir()) == [target]
    assert target.read_bytes() == before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_the_mode_of_a_converted_file_follows_the_umask(umask: int, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    for options in ([], ["--force"]):
        assert run_cli("convert", source, target, *options, preexec_fn=lambda: os.umask(umask)).code == 0
        assert target.stat().st_mode & 0o7777 == 0o666 & ~umask


# ---- interrupted and concurrent runs


def sparse_source(path: Path, megabytes: int) -> Path:
    """Make a checkpoint of zeros that takes no room on the disk, and some time to convert."""
    rows = megabytes * 256
    head = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + rows * 4096)
    return path


def default_signals() -> None:
    # Where tests run in the background of a shell, children would inherit that SIGINT is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def begun(source: Path, target: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a conversion and stop it when it has begun to write; it goes on with SIGCONT."""
    process = cli_start("convert", source, target, "-j1", *options, preexec_fn=default_signals)
    partial = Path(f"{target}.partial", target.name)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if partial.stat().st_size > 0:
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                assert partial.exists(), "it was too fast"
                return process
        time.sleep(0.001)
    raise AssertionError(cli_finish(process))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_conversion_leaves_no_new_files(number: signal.Signals, force: bool, tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 2000), tmp_path / "m.qf"
    if force:
        target.write_bytes(b"precious")
    process = begun(source, target, *(["--force"] if force else []))
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    result = cli_finish(process)
    assert result.code == 128 + number
    assert (
        result.err.strip()
        == f"Interrupted: nothing was left at {target}; with --resume, a run keeps what it has finished"
    )
    assert not Path(f"{target}.partial").exists()
    if force:
        assert target.read_bytes() == b"precious"
    else:
        assert not target.exists()


def test_a_killed_conversion_leaves_no_target_and_the_next_one_succeeds(tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 300), tmp_path / "m.qf"
    process = begun(source, target)
    process.kill()
    cli_finish(process)
    assert not target.exists()
    assert Path(f"{target}.partial").exists()
    for path in (target, tmp_path / "other.qf"):
        assert run_cli("convert", source, path).code == 0
    assert not Path(f"{target}.partial").exists()
    assert target.read_bytes() == (tmp_path / "other.qf").read_bytes()


def test_a_second_conversion_to_the_same_target_is_refused(tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 2000), tmp_path / "m.qf"
    process = begun(source, target)
    try:
        for options in ([], ["--force"]):
            message = one_line(run_cli("convert", source, target, *options))
            assert str(target) in message
            assert "another process" in message
        assert Path(f"{target}.partial").exists()
    finally:
        process.kill()
        cli_finish(process)


@pytest.mark.parametrize("force", [False, True])
def test_one_of_several_concurrent_conversions_to_a_target_succeeds(force: bool, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    running = [cli_start("convert", source, target, *(["--force"] if force else [])) for _ in range(6)]
    results = [cli_finish(process) for process in running]
    good = [result for result in results if result.code == 0]
    assert len(good) >= 1
    assert force or len(good) == 1
    for result in results:
        if result.code:
            assert re.search("another process|exists already|appeared there in the meantime", one_line(result))
    valid(target)
    assert not Path(f"{target}.partial").exists()
