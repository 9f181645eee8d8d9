"""Conversions on a Dask cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file as save_safetensors

from qformat import __version__
from qformat.cli import cli
from qformat.converters.convert import convert
from qformat.converters.output import FileContents, WriteOptions
from qformat.converters.request import Request
from qformat.converters.runners import DaskRunner, write_on_worker
from qformat.errors import SourceError, TargetError

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(5)
    tensors = {f"layer.{i:02}.weight": rng.normal(size=(256, 384)).astype(np.float32) for i in range(16)}
    save_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


@pytest.fixture(scope="module")
def scheduler() -> Any:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


def run(request: Request, output: Path, runner: DaskRunner | None = None, **options: Any) -> Any:
    checkpoint, recipe = request.open()
    return convert(checkpoint, output, recipe, runner=runner, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ["q4_0", "lossless"])
@pytest.mark.parametrize("size", [None, 600_000])
def test_the_bytes_are_those_of_one_process(source, tmp_path, scheduler, kind, size):
    request = Request(str(source), type=kind, overrides=("*.03.weight=f16",))
    alone, together, seen = tmp_path / "alone", tmp_path / "together", []
    for folder in (alone, together):
        folder.mkdir()
    first = run(request, alone / "m.qf", shard_size=size)
    cluster = DaskRunner(request, scheduler.scheduler_address, part_size=300_000)
    second = run(request, together / "m.qf", cluster, shard_size=size, progress=seen.append)
    assert files(together) == files(alone)
    assert (second.root, second.nbytes, second.bpw) == (first.root, first.nbytes, first.bpw)
    assert sum(seen) == 16 * 256 * 384
    assert not (together / "m.qf.partial").exists()


def test_what_a_job_cannot_do_is_reported(source, tmp_path, scheduler):
    rng = np.random.default_rng(1)
    bad = rng.normal(size=(64, 64)).astype(np.float32)
    bad[3, 4] = np.nan
    save_safetensors({"a": bad, "b": np.zeros((4, 32), np.float32)}, tmp_path / "bad.safetensors")
    request = Request(str(tmp_path / "bad.safetensors"))
    with pytest.raises(SourceError, match="tensor 'a' holds NaN or infinity"):
        run(request, tmp_path / "m.qf", DaskRunner(request, scheduler.scheduler_address))
    assert list(files(tmp_path)) == ["bad.safetensors"]
    assert not (tmp_path / "m.qf.partial").exists()


def test_a_source_that_was_made_again_is_read_again(tmp_path, scheduler):
    path, request = tmp_path / "m.safetensors", Request(str(tmp_path / "m.safetensors"))
    cluster = DaskRunner(request, scheduler.scheduler_address)
    for number in range(2):
        tensors = {"w": np.random.default_rng(number).normal(size=(64, 64)).astype(np.float32)}
        save_safetensors(tensors, tmp_path / "new")
        (tmp_path / "new").rename(path)
        run(request, tmp_path / f"{number}.qf", cluster)
        run(request, tmp_path / "alone.qf", overwrite=True)
        assert (tmp_path / f"{number}.qf").read_bytes() == (tmp_path / "alone.qf").read_bytes()


@pytest.mark.usefixtures("marks")
def test_what_is_finished_is_not_done_again(source, tmp_path, scheduler, monkeypatch):
    request = Request(str(source))
    for size in (None, 600_000):
        output = tmp_path / f"{size}.qf"
        first = run(request, output, DaskRunner(request, scheduler.scheduler_address), resume=True, shard_size=size)
        with monkeypatch.context() as context:
            context.setattr(DaskRunner, "write", None)
            again = run(request, output, DaskRunner(request, "nonsense://1"), resume=True, shard_size=size)
        assert (again.root, again.nbytes, again.resumed) == (first.root, first.nbytes, 16)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_is_in_the_way_is_kept(source, tmp_path, kind):
    request, folder = Request(str(source)), tmp_path / "m.qf.partial"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "00000.qf").write_text("mine")
    if kind == "folder":
        mine.rename(folder)
    elif kind == "link":
        folder.symlink_to(mine)
    else:
        (mine / "00000.qf").rename(folder)
    with pytest.raises(TargetError, match=r"m\.qf\.partial: exists, but is not the workspace"):
        run(request, tmp_path / "m.qf", DaskRunner(request, "nonsense://1"))
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_another_version_is_refused(source, tmp_path):
    contents, request = FileContents(tmp_path / "p.qf"), Request(str(source))
    with pytest.raises(SourceError, match=r"a worker has qformat .* and not 0\.0\.1"):
        write_on_worker(contents, request, tmp_path, WriteOptions(), version="0.0.1")


def test_no_cluster(source, tmp_path):
    request = Request(str(source))
    with pytest.raises(SourceError, match=r"cluster at nonsense://1 cannot be reached"):
        run(request, tmp_path / "m.qf", DaskRunner(request, "nonsense://1"))
    assert files(tmp_path) == {}


def test_a_task_can_be_done_twice(source, tmp_path):
    contents = FileContents(tmp_path / "p.qf", "fingerprint/p.qf", 2, 5)
    request = Request(str(source), type="q8_0")
    first, again = (write_on_worker(contents, request, tmp_path, WriteOptions(), __version__) for _ in range(2))
    assert (first.root, first.resumed, again.root, again.resumed) == (again.root, 0, first.root, 3)
    assert [record.to_json() for record in again.records] == [record.to_json() for record in first.records]
    assert [record.name for record in again.records] == [f"layer.{i:02}.weight" for i in (2, 3, 4)]


def test_a_lost_worker_does_not_matter(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(7)
    tensors = {f"layer.{i:02}.weight": rng.normal(size=(1024, 1024)).astype(np.float32) for i in range(12)}
    save_safetensors(tensors, folder / "model.safetensors")
    request = Request(str(folder), type="q4_0:search=exact")
    run(request, tmp_path / "alone.qf")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs="CRITICAL"
    ) as own:
        killed: list[int] = []

        def kill() -> None:
            parts, until = tmp_path / "m.qf.partial", time.monotonic() + 60
            while time.monotonic() < until and not list(parts.glob("*.journal")):
                time.sleep(0.002)
            killed.append(next(iter(own.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        result = run(request, tmp_path / "m.qf", DaskRunner(request, own.scheduler_address, part_size=1_200_000))
        killer.join()
    assert killed
    assert (tmp_path / "m.qf").read_bytes() == (tmp_path / "alone.qf").read_bytes()
    assert len(result.records) == 12
    assert not (tmp_path / "m.qf.partial").exists()


def test_on_the_command_line(source, tmp_path):
    runner = CliRunner()
    for name, options in (("a", []), ("b", ["--engine", "dask", "--jobs", "1"])):
        shown = runner.invoke(cli, ["convert", str(source), str(tmp_path / name), *options])
        assert shown.exit_code == 0, shown.output
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    wrong = runner.invoke(cli, ["convert", str(source), str(tmp_path / "c"), "--scheduler", "tcp://127.0.0.1:1"])
    assert wrong.exit_code == 2
    assert "--scheduler is for --engine dask" in wrong.output
