"""Checkpoints in several files: a head that names its shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformat import safe_open
from qformat.container.reader import ContainerReader
from qformat.container.verify import verify
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.split import parse_size
from qformat.converters.truncate import truncate
from qformat.errors import FormatError, SourceError, TargetError
from qformat.pipeline.recipe import Recipe
from qformat.quality import Quality
from qformat.readers.torch import load_file
from tests.helpers.checkpoints import layers, model
from tests.helpers.cli import invoke
from tests.helpers.files import Draft
from tests.helpers.stopping import Stopped, stop_after

SIZE = 64 * 96 * 18 // 32  # bytes of a tensor as q4_0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "model", layers(9, 64, 96) | {"norm": np.ones(96, np.float32)})


def run(source: Path, output: Path, kind: str = "q4_0", size: int | None = 4 * SIZE, **options: Any) -> Any:
    return convert(open_checkpoint(source), output, Recipe.parse(kind), shard_size=size, **options)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def shards(folder: Path, count: int, stem: str = "m") -> list[str]:
    """Return the names of the shards of a head, which end in a digest of their content."""
    names = [path.name for path in folder.glob(f"{stem}-?????-of-{count:05}-*.qf")]
    assert len(names) == count
    return sorted(names)


def test_a_head_and_its_shards_hold_the_tensors_of_one_file(source, tmp_path):
    whole, output = tmp_path / "whole.qf", tmp_path / "m.qf"
    run(source, whole, size=None)
    result = run(source, output)
    names = shards(tmp_path, 3)
    assert [path.name for path in result.shards] == names
    for number, name in enumerate(names, 1):
        with ContainerReader(tmp_path / name) as shard:
            assert name == f"m-0000{number}-of-00003-{shard.root[:12]}.qf"
    assert files(tmp_path) == [*names, "m.qf", "whole.qf"]
    assert result.nbytes == sum((tmp_path / name).stat().st_size for name in (*names, "m.qf"))
    assert max((tmp_path / name).stat().st_size for name in names) < 4 * SIZE + 6000
    with safe_open(whole) as one, safe_open(output) as many:
        assert one.keys() == many.keys()
        assert many.get_asset("config.json") == one.get_asset("config.json")
        for name in one.keys():  # noqa: SIM118
            assert np.array_equal(one.get_tensor(name), many.get_tensor(name))
            assert one.info(name).error == many.info(name).error
        assert np.array_equal(many.get_rows("layer.7.weight", [3, 1]), one.get_tensor("layer.7.weight")[[3, 1]])
    loaded = load_file(output)
    assert list(loaded) == list(load_file(whole))
    with safe_open(tmp_path / names[1]) as shard:
        assert shard.keys() == [f"layer.{i}.weight" for i in (4, 5, 6, 7)]
        assert shard.assets() == []


@pytest.mark.parametrize("kind", ["q4_0", "lossless", "scm:bpw=3"])
def test_a_dry_run_predicts_the_sizes_of_all_shards(source, tmp_path, kind):
    expected = run(source, tmp_path / "m.qf", kind, dry_run=True)
    assert files(tmp_path) == []
    assert expected.nbytes == run(source, tmp_path / "m.qf", kind).nbytes


def test_a_checkpoint_below_the_shard_size_stays_in_one_file(source, tmp_path):
    run(source, tmp_path / "m.qf", size=10**9)
    assert files(tmp_path) == ["m.qf"]


def test_a_tensor_larger_than_the_shard_size_has_its_own_shard(source, tmp_path):
    assert len(run(source, tmp_path / "m.qf", size=1).shards) == 10


def test_bytes_of_shards_do_not_depend_on_jobs(source, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(source, tmp_path / name / "m.qf", jobs=1 if name == "a" else 3)
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_verify_checks_a_head_and_its_shards(source, tmp_path):
    output = tmp_path / "m.qf"
    run(source, output)
    reports = verify([str(output)])
    assert [Path(report.path).name for report in reports] == ["m.qf", *shards(tmp_path, 3)]
    assert all(report.ok for report in reports)
    second = tmp_path / shards(tmp_path, 3)[1]
    data = bytearray(second.read_bytes())
    data[2000] ^= 1
    second.write_bytes(data)
    bad = [report for report in verify([str(output)]) if not report.ok]
    assert [Path(report.path).name for report in bad] == [second.name]
    assert "SHA-256 does not match" in bad[0].errors[0].what
    second.unlink()
    (bad,) = [report for report in verify([str(output)]) if not report.ok]
    assert (Path(bad.path).name, bad.errors[0].what) == (second.name, "cannot be read: No such file or directory")


def test_another_file_in_the_place_of_a_shard_is_refused(source, tmp_path):
    output = tmp_path / "m.qf"
    run(source, output)
    other = tmp_path / "other"
    other.mkdir()
    run(source, other / "m.qf", "q8_0", size=8 * SIZE)
    name = shards(tmp_path, 3)[1]
    (tmp_path / name).write_bytes((other / shards(other, 3)[1]).read_bytes())
    with pytest.raises(FormatError, match=f"{name}: is not the shard that its head names"):
        safe_open(output)
    (report,) = [report for report in verify([str(output)]) if not report.ok]
    assert "is not the shard" in report.errors[0].what
    (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=f"shard {name} cannot be read: No such file"):
        safe_open(output)


def test_a_head_given_as_an_open_file_is_refused(source, tmp_path):
    run(source, tmp_path / "m.qf")
    with (
        (tmp_path / "m.qf").open("rb") as file,
        pytest.raises(FormatError, match="in 3 other files: open it by its path"),
    ):
        safe_open(file)


def test_a_stopped_conversion_to_shards_leaves_no_files(source, tmp_path):
    with pytest.raises(Stopped):
        run(source, tmp_path / "m.qf", jobs=1, progress=stop_after(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.usefixtures("marks")
def test_a_conversion_resumes_in_the_middle_of_a_shard(source, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run(source, whole / "m.qf")
    with pytest.raises(Stopped):
        run(source, tmp_path / "m.qf", jobs=1, resume=True, progress=stop_after(7))
    assert files(tmp_path) == []
    first = (tmp_path / "m.qf.partial" / "m-00001-of-00003.qf").stat().st_ino
    assert run(source, tmp_path / "m.qf", resume=True).resumed >= 6
    assert (tmp_path / shards(tmp_path, 3)[0]).stat().st_ino == first
    assert files(tmp_path) == files(whole)
    for name in files(whole):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert run(source, tmp_path / "m.qf", resume=True).resumed == 10


def test_resume_with_other_shards_of_the_same_number_starts_over(tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "m.qf"
    whole.mkdir()
    rng = np.random.default_rng(5)
    rows = (64, 64, 192, 64, 64, 64)
    tensors = {f"layer.{i}.weight": rng.normal(size=(n, 96)).astype(np.float32) for i, n in enumerate(rows)}
    folder = model(tmp_path / "model", tensors)
    run(folder, whole / "m.qf", size=4 * SIZE)  # 2, 2, 2 tensors
    with pytest.raises(Stopped):
        run(folder, output, size=3 * SIZE, jobs=1, resume=True, progress=stop_after(4))  # 2, 1, 3
    run(folder, output, size=4 * SIZE, resume=True)
    assert files(tmp_path) == files(whole)
    for name in files(whole):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("sizes", [(None, 4 * SIZE), (4 * SIZE, None), (4 * SIZE, 5 * SIZE)])
def test_resume_refuses_a_target_with_another_shard_size(source, tmp_path, sizes):
    run(source, tmp_path / "m.qf", size=sizes[0], resume=True)
    before = files(tmp_path)
    with pytest.raises(TargetError, match="exists already"):
        run(source, tmp_path / "m.qf", size=sizes[1], resume=True)
    assert files(tmp_path) == before


def test_a_head_that_cannot_be_written_leaves_no_shards(source, tmp_path):
    with pytest.raises(SourceError, match="metadata must be strings"):
        run(source, tmp_path / "m.qf", metadata={"a": "\ud800"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_stopped_conversion_leaves_the_existing_shards(source, tmp_path):
    output = tmp_path / "m.qf"
    run(source, output)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(Stopped):
        run(source, output, "q4_0:search=exact", overwrite=True, jobs=1, progress=stop_after(7))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert not (tmp_path / "m.qf.partial").exists()


def test_a_second_conversion_to_the_same_shards_is_refused_without_disturbing_the_first(source, tmp_path):
    output = tmp_path / "m.qf"

    def second(amount: int) -> None:
        with pytest.raises(TargetError, match="another process is writing it"):
            run(source, output)

    run(source, output, progress=second)
    assert all(report.ok for report in verify([str(output)]))


def test_a_folder_with_the_name_of_the_workspace_of_shards_is_kept(source, tmp_path):
    folder = tmp_path / "m.qf.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(TargetError, match="is not the workspace of an interrupted run"):
            run(source, tmp_path / "m.qf", resume=resume)
    assert (folder / "thesis.txt").read_text() == "mine"
    assert files(tmp_path) == []


def test_a_shard_of_the_source_is_refused_as_a_target(source, tmp_path):
    run(source, tmp_path / "m.qf", "scm", size=150_000)
    shard = tmp_path / shards(tmp_path, 2)[0]
    before = shard.read_bytes()
    with pytest.raises(TargetError, match="is a file of the checkpoint"):
        run(tmp_path / "m.qf", shard, overwrite=True)
    with pytest.raises(TargetError, match="or a part of it"):
        truncate(tmp_path / "m.qf", shard, Quality(bits=3), overwrite=True)
    assert shard.read_bytes() == before


def test_a_tensor_in_two_shards_is_refused_and_found_by_verify(source, tmp_path):
    output = tmp_path / "m.qf"
    run(source, output)
    first, second = shards(tmp_path, 3)[:2]
    shutil.copy(tmp_path / first, tmp_path / second)
    change(output, lambda index: index["shards"][1].update(index["shards"][0] | {"name": second}))
    with pytest.raises(FormatError, match="stands twice"):
        safe_open(output)
    (bad,) = [report for report in verify([str(output)]) if not report.ok]
    assert "its shards do not fit together" in bad.errors[0].what


def test_a_foreign_file_in_the_place_of_a_shard_is_kept_without_force(source, tmp_path):
    run(source, tmp_path / "m.qf")
    name = shards(tmp_path, 3)[2]
    for path in tmp_path.glob("*.qf"):
        path.unlink()
    (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "m-00002-of-00003.qf").write_bytes(b"mine, too")
    with pytest.raises(TargetError, match=f"{name}: exists already; move it away"):
        run(source, tmp_path / "m.qf")
    assert files(tmp_path) == ["m-00002-of-00003.qf", name]
    run(source, tmp_path / "m.qf", overwrite=True)
    assert all(report.ok for report in verify([str(tmp_path / "m.qf")]))
    assert (tmp_path / "m-00002-of-00003.qf").read_bytes() == b"mine, too"


def test_shards_whose_head_is_gone_are_taken_or_repaired(source, tmp_path):
    first = run(source, tmp_path / "m.qf")
    (tmp_path / "m.qf").unlink()
    with first.shards[1].open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert run(source, tmp_path / "m.qf").shards == first.shards
    assert all(report.ok for report in verify([str(tmp_path / "m.qf")]))


def test_shards_of_a_replaced_head_are_removed(source, tmp_path):
    old = run(source, tmp_path / "m.qf").shards
    result = run(source, tmp_path / "m.qf", size=6 * SIZE, overwrite=True)
    assert (result.removed_shards, result.orphaned_shards) == (old, [])
    assert files(tmp_path) == sorted(["m.qf", *shards(tmp_path, 2)])
    again = run(source, tmp_path / "m.qf", size=6 * SIZE, overwrite=True)
    assert (again.removed_shards, again.shards) == ([], result.shards)
    assert all(report.ok for report in verify([str(tmp_path / "m.qf")]))
    assert run(source, tmp_path / "m.qf", size=None, overwrite=True).removed_shards == result.shards
    assert files(tmp_path) == ["m.qf"]


def test_shards_of_a_replaced_head_stay_if_another_head_names_them(source, tmp_path):
    old = run(source, tmp_path / "m.qf").shards
    (tmp_path / "copy of the head").write_bytes((tmp_path / "m.qf").read_bytes())
    result = run(source, tmp_path / "m.qf", size=6 * SIZE, overwrite=True)
    assert (result.removed_shards, result.orphaned_shards) == ([], old)
    assert all(report.ok for report in verify([str(tmp_path / "copy of the head"), str(tmp_path / "m.qf")]))


def test_another_file_with_the_name_of_a_replaced_shard_stays(source, tmp_path):
    old = run(source, tmp_path / "m.qf").shards
    old[1].write_bytes(b"mine")
    result = run(source, tmp_path / "m.qf", size=None, overwrite=True)
    assert (result.removed_shards, result.orphaned_shards) == ([old[0], old[2]], [old[1]])
    assert old[1].read_bytes() == b"mine"


def test_a_head_that_names_another_file_as_its_shard_does_not_have_it_removed(source, tmp_path):
    run(source, tmp_path / "precious.qf", size=None)
    run(source, tmp_path / "m.qf", size=8 * SIZE)
    with ContainerReader(tmp_path / "precious.qf") as file:
        shard = {"name": "precious.qf", "bytes": file.file_size, "root_sha256": file.root}
    change(tmp_path / "m.qf", lambda index: index.update(shards=[shard]))
    result = run(source, tmp_path / "m.qf", size=None, overwrite=True)
    assert (result.removed_shards, result.orphaned_shards) == ([], [tmp_path / "precious.qf"])


@pytest.mark.parametrize("how", ["truncate", "export"])
def test_every_command_that_replaces_a_head_removes_its_shards(source, tmp_path, how):
    run(source, tmp_path / "whole.qf", "scm", size=None)
    run(source, tmp_path / "m.qf")
    if how == "truncate":
        truncate(tmp_path / "whole.qf", tmp_path / "m.qf", Quality(bits=3), overwrite=True)
    else:
        export(tmp_path / "whole.qf", tmp_path / "m.qf", "safetensors", overwrite=True)
    assert files(tmp_path) == ["m.qf", "whole.qf"]


def test_a_shard_that_is_converted_over_its_own_head_stays(source, tmp_path):
    first, second, third = run(source, tmp_path / "m.qf").shards
    result = run(second, tmp_path / "m.qf", size=None, overwrite=True)
    assert result.removed_shards == [first, third]
    assert all(report.ok for report in verify([str(second), str(tmp_path / "m.qf")]))


def test_the_longest_names_of_shards(source, tmp_path):
    longest = "x" * (255 - len("-00001-of-00003-0123456789ab.qf"))
    with pytest.raises(TargetError, match="the names of its shards are too long; give a name that is 1 bytes shorter"):
        run(source, tmp_path / f"{longest}x.qf")
    assert files(tmp_path) == []
    run(source, tmp_path / f"{longest}.qf")
    assert max(map(len, files(tmp_path))) == 255


def test_commands_write_and_read_shards(source, tmp_path):
    output = str(tmp_path / "m.qf")
    shown = invoke("convert", source, output, "--shard-size", "15kB").output
    names = shards(tmp_path, 3)
    assert f"in 3 shards, {names[0]} and so on, and their head m.qf" in shown
    found = json.loads(invoke("inspect", output, "--json").output)
    assert len(found["tensors"]) == 10
    assert list(found["shards"]) == names
    assert found["file_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("m*.qf"))
    assert f"shard {names[1]} (" in invoke("inspect", output).output
    invoke("convert", output, tmp_path / "again.qf", "-t", "f32")
    wrong = invoke("convert", source, output, "--shard-size", "many", code=2)
    assert "'many' is not a size such as 5GB or 500MiB" in wrong.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("7B", 7), ("2k", 2000), ("3tib", 3 << 40)],
)
def test_shard_sizes_are_parsed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "5XB", "1e9", "0.0001", "9" * 400])
def test_malformed_shard_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Write a head anew with another index."""
    draft = Draft.of(path.read_bytes())
    edit(draft.index)
    path.write_bytes(draft.pack())


WRONG_HEADS: dict[str, Callable[[Any], object]] = {
    "no must_understand": lambda index: index.pop("must_understand"),
    "path of a shard": lambda index: index["shards"][0].update(name="../m.qf"),
    "no shard": lambda index: index.update(shards=[]),
    "unsorted": lambda index: index["shards"].reverse(),
    "itself": lambda index: index.update(shards=[{"name": "m.qf", "bytes": 1, "root_sha256": "0" * 64}]),
    "root": lambda index: index["shards"][0].update(root_sha256="x"),
}


def test_the_reference_reads_a_head_and_its_shards(source, tmp_path, reference):
    output = tmp_path / "m.qf"
    run(source, output)
    file = reference.read_path(output)
    with safe_open(output) as ours:
        assert list(file.tensors) == ours.keys()
        for name, tensor in file.tensors.items():
            assert np.array_equal(reference.decode(tensor), ours.get_tensor(name))
    first, second = shards(tmp_path, 3)[:2]
    shutil.copy(tmp_path / first, tmp_path / second)
    with pytest.raises(reference.SpecError):
        reference.read_path(output)


@pytest.mark.parametrize("edit", WRONG_HEADS)
def test_both_readers_refuse_impossible_heads(source, tmp_path, edit, reference):
    output = tmp_path / "m.qf"
    run(source, output)
    change(output, WRONG_HEADS[edit])
    with pytest.raises(FormatError):
        safe_open(output)
    with pytest.raises(reference.SpecError):
        reference.read_path(output)
