"""Conversions that were killed, and go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file as save_safetensors

from qformat.container.reader import ContainerReader
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError, TargetError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, SourceTensor
from tests.helpers.checkpoints import layers, model
from tests.helpers.cli import invoke
from tests.helpers.stopping import Stopped, stop_after


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = {name: json.dumps({"name": name * 50}) for name in ("config", "tokenizer")}
    return model(tmp_path / "model", layers(12, 64, 96), **texts)


def run(source: Path, output: Path, kind: str = "q4_0", **options: Any) -> Any:
    return convert(open_checkpoint(source), output, Recipe.parse(kind), **options)


def leftovers(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name.startswith(output.name))


def interrupted(source: Path, output: Path, number: int, kind: str = "q4_0", **options: Any) -> None:
    with pytest.raises(Stopped):
        run(source, output, kind, resume=True, jobs=1, progress=stop_after(number), **options)
    assert leftovers(output) == [f"{output.name}.partial"]


@pytest.mark.parametrize("kind", ["q4_0", "lossless", "scm:bpw=3"])
@pytest.mark.parametrize("number", [0, 1, 5, 11])
def test_a_stopped_conversion_resumes_without_reading_finished_tensors_again(
    source, tmp_path, monkeypatch, kind, number
):
    whole, output = tmp_path / "whole.qf", tmp_path / "m.qf"
    run(source, whole, kind)
    interrupted(source, output, number, kind)
    with monkeypatch.context() as context:
        read: list[str] = []
        real = SourceTensor.read_chunk
        noted = lambda tensor, chunk: read.append(tensor.name) or real(tensor, chunk)  # noqa: E731
        context.setattr(SourceTensor, "read_chunk", noted)
        result = run(source, output, kind, resume=True)
    assert output.read_bytes() == whole.read_bytes()
    assert leftovers(output) == ["m.qf"]
    done = sorted(plan.source.name for plan in result.plans)[: result.resumed]
    assert not set(done) & set(read)
    assert result.resumed >= number - 1 if kind == "q4_0" else True


def test_progress_of_a_resumed_conversion_counts_the_finished_tensors(source, tmp_path):
    output, seen = tmp_path / "m.qf", []
    interrupted(source, output, 6)
    run(source, output, resume=True, progress=seen.append)
    assert sum(seen) == 12 * 64 * 96
    assert seen[0] >= 5 * 64 * 96


@pytest.mark.usefixtures("marks")
def test_resume_leaves_a_finished_file_as_it_is(source, tmp_path):
    output = tmp_path / "m.qf"
    first = run(source, output, resume=True)
    before = output.stat()
    again = run(source, output, resume=True)
    assert output.stat().st_ino == before.st_ino
    assert again.root == first.root
    assert (again.resumed, again.nbytes, again.assets) == (12, first.nbytes, first.assets)
    with pytest.raises(TargetError, match="exists already"):
        run(source, output, "q8_0", resume=True)
    assert leftovers(output) == ["m.qf"]
    with pytest.raises(TargetError, match="exists already"):
        run(source, output)
    data = output.read_bytes()
    for damaged in (data[:-1], data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]):
        output.write_bytes(damaged)
        with pytest.raises(TargetError, match=r"exists already, but is damaged; use --force"):
            run(source, output, resume=True)
    assert run(source, output, resume=True, overwrite=True).resumed == 0
    assert output.read_bytes() == data


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "type": ("q4_0:search=exact", lambda source: source),
    "time of the source": ("q4_0", lambda source: os.utime(source / "model.safetensors", ns=(1, 1))),
    "assets": ("q4_0", lambda source: (source / "more.json").write_text("{}")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_conversion_with_another_type_source_or_asset_starts_over(source, tmp_path, change):
    output = tmp_path / "m.qf"
    interrupted(source, output, 8)
    kind, make = CHANGES[change]
    make(source)
    result = run(source, output, kind, resume=True)
    assert result.resumed == 0
    run(source, tmp_path / "whole.qf", kind)
    assert output.read_bytes() == (tmp_path / "whole.qf").read_bytes()
    assert leftovers(output) == ["m.qf"]


def test_resume_refuses_a_file_made_from_another_source_of_the_same_times_and_sizes(source, tmp_path):
    other, output = tmp_path / "other", tmp_path / "m.qf"
    shutil.copytree(source, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    for folder in (source, other):
        for path in folder.iterdir():
            os.utime(path, ns=(1, 1))
    run(source, output, resume=True)
    with pytest.raises(TargetError, match="exists already"):
        run(other, output, resume=True)


def test_resume_refuses_another_file_in_the_place_of_the_target(source, tmp_path):
    output, other = tmp_path / "m.qf", tmp_path / "other.qf"
    run(source, output, resume=True)
    run(source, other, "q8_0")
    output.write_bytes(other.read_bytes())  # which keeps what the file was marked with
    with pytest.raises(TargetError, match="exists already"):
        run(source, output, resume=True)


def test_resume_refuses_a_file_made_with_allow_nonfinite_without_it(tmp_path):
    source, output = tmp_path / "m.safetensors", tmp_path / "m.qf"
    save_safetensors({"a": np.array([np.nan], np.float32)}, source)
    run(source, output, resume=True, allow_nonfinite=True)
    with pytest.raises(TargetError, match="exists already"):
        run(source, output, resume=True)


def test_a_conversion_without_resume_starts_over_and_leaves_no_workspace(source, tmp_path):
    output = tmp_path / "m.qf"
    interrupted(source, output, 8)
    assert run(source, output).resumed == 0
    assert leftovers(output) == ["m.qf"]
    output.unlink()
    with pytest.raises(Stopped):
        run(source, output, progress=stop_after(3))
    assert leftovers(output) == []


def test_a_run_without_resume_says_that_it_discards_the_work_of_an_earlier_one(source, tmp_path, caplog):
    output = tmp_path / "m.qf"
    interrupted(source, output, 8)
    with pytest.raises(TypeSpecError):  # a mistake costs nothing
        convert(open_checkpoint(source), output, Recipe.parse("q4_0", ["none=q4_1"]))
    assert (output.with_name("m.qf.partial") / "m.qf.journal").exists()
    shown = invoke("convert", source, output, "-t", "q4_0").stderr
    assert "Warning: " + caplog.records[0].getMessage() in shown
    assert [record.getMessage() for record in caplog.records] == [
        f"{output}: the finished tensors (8) of an interrupted run are discarded; --resume would have kept them"
    ]


@pytest.mark.parametrize(
    ("resume", "count", "note"),
    [
        (True, 8, "the finished tensors (8) are kept; the same command with --resume goes on from there"),
        (False, 8, "the finished tensors (8) are discarded; with --resume, a run keeps what it has finished"),
        (False, 0, "with --resume, a run keeps what it has finished"),
    ],
)
def test_an_interrupted_conversion_says_what_it_leaves(source, tmp_path, resume, count, note):
    output, left = tmp_path / "m.qf", [count]

    def interrupt(amount: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(source, output, resume=resume, jobs=1, progress=interrupt)
    assert caught.value.__notes__ == [f"{output}: {note}" if count else f"nothing was left at {output}; {note}"]
    assert leftovers(output) == (["m.qf.partial"] if resume else [])


@pytest.mark.usefixtures("marks")
def test_a_conversion_that_is_interrupted_after_its_commit_says_that_it_is_complete(source, tmp_path, monkeypatch):
    output = tmp_path / "m.qf"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("qformat.container.commit.remove_unneeded", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(source, output)
    assert caught.value.__notes__ == [f"{output} is complete"]
    assert leftovers(output) == ["m.qf", "m.qf.partial"]
    run(source, output)  # the same run again: not refused, although the output exists
    assert leftovers(output) == ["m.qf"]


@pytest.mark.parametrize(
    "what", ["byte", "short", "padding", "journal digit", "journal cut", "journal garbage", "journal gone"]
)
def test_resume_converts_damaged_parts_of_the_workspace_again(source, tmp_path, what):
    output, whole = tmp_path / "m.qf", tmp_path / "whole.qf"
    run(source, whole)
    interrupted(source, output, 10)
    partial, journal = (Path(f"{output}.partial") / name for name in ("m.qf", "m.qf.journal"))
    data, lines = bytearray(partial.read_bytes()), journal.read_bytes()
    if what == "byte":
        data[len(data) // 2] ^= 1
        partial.write_bytes(data)
    elif what == "short":
        partial.write_bytes(data[: len(data) // 2])
    elif what == "padding":
        with ContainerReader(whole) as container:
            at = container.index.assets[0].segment.stop
        assert at % 64
        data[at] = 1
        partial.write_bytes(data)
    elif what == "journal digit":
        at = lines.index(b'"rmse": "') + 10
        journal.write_bytes(lines[:at] + (b"1" if lines[at : at + 1] == b"2" else b"2") + lines[at + 1 :])
    elif what == "journal cut":
        journal.write_bytes(lines[:-7])
    elif what == "journal garbage":
        journal.write_bytes(lines[: len(lines) // 2] + b"\0" * 100 + b"\n{}\n")
    else:
        journal.unlink()
    result = run(source, output, resume=True)
    assert result.resumed < 10 or what == "padding"
    assert (result.resumed > 0) == (what not in ("journal gone", "journal digit"))
    assert output.read_bytes() == whole.read_bytes()


def test_a_failed_conversion_can_be_resumed(source, tmp_path):
    output, whole = tmp_path / "m.qf", tmp_path / "whole.qf"
    run(source, whole)

    class Broken(SourceTensor):
        def __init__(self, tensor: Any) -> None:
            self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape

        def read(self, elements: slice) -> Any:
            raise SourceError("the network is gone")

    checkpoint = open_checkpoint(source)
    tensors = [Broken(tensor) if tensor.name.endswith(".7.weight") else tensor for tensor in checkpoint.tensors]
    broken = Checkpoint(tensors, checkpoint.assets, (), checkpoint.files)
    with pytest.raises(SourceError, match="network"):
        convert(broken, output, Recipe.parse("q4_0"), resume=True, jobs=1)
    assert run(source, output, resume=True).resumed >= 5
    assert output.read_bytes() == whole.read_bytes()


def _killed(command: list[str], seconds: float, begun: Path | None) -> bool:
    """Run a command, kill it after a time (of what follows after a file is there), and return whether it had not ended."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while begun and process.poll() is None and not begun.exists():
        time.sleep(0.001)
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    assert process.returncode == 0, err.decode()
    return False


@pytest.mark.usefixtures("marks")
@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_conversions_killed_at_random_resume_to_the_same_bytes(tmp_path, count):
    source = model(tmp_path / "model", layers(24, 512, 640, seed=9, name="layer.{:02}.weight"))
    whole, output = tmp_path / "whole.qf", tmp_path / "m.qf"
    command = [sys.executable, "-m", "qformat", "convert", str(source), str(output), "-t", "q4_0:search=exact", "-j1"]
    start = time.perf_counter()
    subprocess.run([*command[:5], str(whole), *command[6:]], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    delays, kills = random.Random(3), 0
    partial = Path(f"{output}.partial")
    for number in range(count):  # at any time, or while there is something half-written
        begun = partial if number % 2 else None
        kills += _killed([*command, "--resume"], delays.uniform(0, seconds / 2 if begun else seconds), begun)
        subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
        assert output.read_bytes() == whole.read_bytes()
        assert leftovers(output) == ["m.qf"]
        output.unlink()
    assert kills
    shutil.rmtree(source)
