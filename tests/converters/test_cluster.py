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
from safetensors.numpy import save_file as save_safetensors

from qformat import __version__
from qformat.converters.convert import convert
from qformat.converters.output import FileContents, WriteOptions
from qformat.converters.request import Request
from qformat.converters.runners import DaskRunner, write_on_worker
from qformat.errors import SourceError
from tests.helpers.checkpoints import layers, model
from tests.helpers.cli import invoke

NAMES = "layer.{:02}.weight"
distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("source") / "model", layers(16, 256, 384, name=NAMES))


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
def test_bytes_of_a_dask_conversion_are_those_of_one_process(source, tmp_path, scheduler, kind, size):
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


def test_errors_of_a_dask_worker_name_the_tensor_and_leave_no_files(source, tmp_path, scheduler):
    rng = np.random.default_rng(1)
    bad = rng.normal(size=(64, 64)).astype(np.float32)
    bad[3, 4] = np.nan
    save_safetensors({"a": bad, "b": np.zeros((4, 32), np.float32)}, tmp_path / "bad.safetensors")
    request = Request(str(tmp_path / "bad.safetensors"))
    with pytest.raises(SourceError, match="tensor 'a' holds NaN or infinity"):
        run(request, tmp_path / "m.qf", DaskRunner(request, scheduler.scheduler_address))
    assert list(files(tmp_path)) == ["bad.safetensors"]
    assert not (tmp_path / "m.qf.partial").exists()


def test_dask_workers_read_a_changed_source_again(tmp_path, scheduler):
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
def test_a_finished_dask_conversion_resumes_without_a_cluster(source, tmp_path, scheduler, monkeypatch):
    request = Request(str(source))
    for size in (None, 600_000):
        output = tmp_path / f"{size}.qf"
        first = run(request, output, DaskRunner(request, scheduler.scheduler_address), resume=True, shard_size=size)
        with monkeypatch.context() as context:
            context.setattr(DaskRunner, "write", None)
            again = run(request, output, DaskRunner(request, "nonsense://1"), resume=True, shard_size=size)
        assert (again.root, again.nbytes, again.resumed) == (first.root, first.nbytes, 16)


def test_a_worker_of_another_version_is_refused(source, tmp_path):
    contents, request = FileContents(tmp_path / "p.qf"), Request(str(source))
    with pytest.raises(SourceError, match=r"a worker has qformat .* and not 0\.0\.1"):
        write_on_worker(contents, request, tmp_path, WriteOptions(), version="0.0.1")


def test_an_unreachable_cluster_is_refused(source, tmp_path):
    request = Request(str(source))
    with pytest.raises(SourceError, match=r"cluster at nonsense://1 cannot be reached"):
        run(request, tmp_path / "m.qf", DaskRunner(request, "nonsense://1"))
    assert files(tmp_path) == {}


def test_a_repeated_task_resumes_the_finished_part(source, tmp_path):
    contents = FileContents(tmp_path / "p.qf", "fingerprint/p.qf", 2, 5)
    request = Request(str(source), type="q8_0")
    first, again = (write_on_worker(contents, request, tmp_path, WriteOptions(), __version__) for _ in range(2))
    assert (first.root, first.resumed, again.root, again.resumed) == (again.root, 0, first.root, 3)
    assert [record.to_json() for record in again.records] == [record.to_json() for record in first.records]
    assert [record.name for record in again.records] == [f"layer.{i:02}.weight" for i in (2, 3, 4)]


def test_a_conversion_survives_a_killed_worker(tmp_path):
    folder = model(tmp_path / "model", layers(12, 1024, 1024, seed=7, name=NAMES))
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


def test_convert_with_the_dask_engine_writes_the_same_bytes(source, tmp_path):
    for name, options in (("a", []), ("b", ["--engine", "dask", "--jobs", "1"])):
        invoke("convert", source, tmp_path / name, *options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    wrong = invoke("convert", source, tmp_path / "c", "--scheduler", "tcp://127.0.0.1:1", code=2)
    assert "--scheduler is for --engine dask" in wrong.output
