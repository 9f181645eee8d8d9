"""Commands on layered tensors: what is converted, cut, shown and measured."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qformat
from qformat.quality import Quality
from tests.helpers.checkpoints import model
from tests.helpers.cli import error_line, invoke, run_cli, valid
from tests.helpers.files import Draft, sha256

# files that are converted from are left to the garbage collector: see test_a_converted_qf_file_is_closed
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)

LADDER = (*(2 + number / 4 for number in range(17)), 7.0, 8.0)
ASSETS = {"config.json": b'{"model_type": "test"}', "vocab.txt": b"a\nb\nc\n" * 50}
METADATA = {"made by": "a test", "licence": "none"}


def refused(*args: object, code: int = 1) -> str:
    """Return the one line with which a command fails."""
    result = invoke(*args, code=code)
    assert result.stdout == ""
    return error_line(result.stderr)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layers.2.weight": (rng.standard_normal((120, 90)) * 0.02).astype(np.float32),
        "layers.10.weight": rng.laplace(0, 0.1, (100, 130)).astype(np.float16),
        "layers.10.bias": rng.standard_normal(100).astype(np.float32),
        "empty.weight": np.zeros((0, 4), np.float32),
        "ids": np.arange(12).reshape(3, 4),
    }


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with weights and files."""
    path = model(tmp_path_factory.mktemp("source") / "model", weights())
    for name, data in ASSETS.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def layered(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layered") / "all.qf"
    invoke("convert", source, path, "-t", "scm")
    return path


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with metadata and assets."""
    path = tmp_path_factory.mktemp("noted") / "noted.qf"
    types = {"layers.*.weight": "scm"}
    qformat.save_file(weights(), path, types, metadata=METADATA, assets=ASSETS)
    return path


def arrays_of(path: Path, quality: Any = None) -> dict[str, np.ndarray]:
    with qformat.safe_open(path, quality=quality) as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


# ---- convert


def test_a_lossless_conversion_to_scm_keeps_tensors_and_assets(source, layered):
    valid(layered)
    same(arrays_of(layered), weights())
    with qformat.safe_open(layered) as f:
        assert [f.info(name).codec for name in f.keys()] == ["scm", "i64", "f32", "scm", "scm"]  # noqa: SIM118
        assert {name: f.get_asset(name) for name in f.assets()} == ASSETS


@pytest.mark.parametrize("type_", ["scm", "scm:bpw=3", "scm:max_rmse=0.01", "scm:lossless=true"])
def test_a_dry_run_predicts_the_exact_size_of_layered_files(source, type_, tmp_path):
    target = tmp_path / "x.qf"
    dry = json.loads(invoke("convert", source, target, "-t", type_, "--dry-run", "--json").stdout)
    assert not list(tmp_path.iterdir())
    done = json.loads(invoke("convert", source, target, "-t", type_, "--json").stdout)
    assert dry["bytes"] == done["bytes"] == target.stat().st_size
    assert dry["bpw"] == done["bpw"]
    assert (dry["root_sha256"], dry["dry_run"], done["dry_run"]) == (None, True, False)
    assert re.fullmatch("[0-9a-f]{64}", done["root_sha256"])


def test_verbose_conversion_names_the_requested_type(source, tmp_path):
    lines = invoke("convert", source, tmp_path / "x.qf", "-t", "scm:bpw=3", "-v").stdout
    assert re.search(r"layers\.2\.weight +120x90 +f32 -> scm:bpw=3 +43\.2 kB +[34]\.\d kB +\d\.\d{3}e-03", lines)
    assert re.search(r"ids +3x4 +i64 -> i64 ", lines)


def test_layered_types_are_chosen_by_tensor_name(source, tmp_path):
    args = ("-t", "q8_0", "--tensor-type", "layers.2.*=scm:bpw=4", "--tensor-type", "*.bias=scm")
    invoke("convert", source, tmp_path / "x.qf", *args)
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert [f.info(name).codec for name in f.keys()] == ["q8_0", "i64", "scm", "q8_0", "scm"]  # noqa: SIM118
        assert f.get_tensor("layers.10.bias").tobytes() == weights()["layers.10.bias"].tobytes()


@pytest.mark.parametrize(
    ("type_", "message"),
    [
        ("scm:bpw=9", "bpw may be a number from 1.5 to 8, not '9'"),
        ("scm:bpw=3,max_abs=0.1", "give one of bpw, max_rmse, max_abs, mean_abs and lossless"),
        ("scm:layers=4", "scm has no parameter 'layers'"),
        ("scm:quality=3", "scm has no parameter 'quality'"),
    ],
)
def test_malformed_layered_types_exit_with_status_2(source, type_, message, tmp_path):
    for args in (("convert", source, tmp_path / "x.qf", "-t", type_), ("quantize-stats", source, "-t", type_)):
        assert message in refused(*args, code=2)
    assert not list(tmp_path.iterdir())


def test_layered_types_refuse_nan_and_infinity(tmp_path):
    x = np.full((4, 5), 0.5, np.float32)
    x[1, 1] = np.nan
    save_file({"w": x, "v": x[2:]}, tmp_path / "x.safetensors")
    args = ("convert", tmp_path / "x.safetensors", tmp_path / "x.qf", "-t", "scm")
    assert "tensor 'w' holds NaN or infinity" in refused(*args)
    assert not (tmp_path / "x.qf").exists()
    stderr = invoke(*args, "--allow-nonfinite").stderr
    assert "tensor 'w' holds NaN or infinity and is kept as f32, not scm" in stderr
    assert "'v' holds" not in stderr


# ---- convert from .qf files


def test_a_qf_file_is_converted_like_other_sources(layered, tmp_path):
    target = tmp_path / "x.qf"
    result = invoke("convert", layered, target, "-t", "scm")
    assert result.stderr == ""  # nothing is lost
    assert target.read_bytes() == layered.read_bytes()
    invoke("convert", layered, target, "-t", "q8_0", "--force")
    valid(target)
    with qformat.safe_open(target) as f:
        assert f.info("layers.2.weight").codec == "q8_0"
        assert {name: f.get_asset(name) for name in f.assets()} == ASSETS


def test_a_qf_file_is_converted_at_a_quality(layered, source, tmp_path):
    for quality in ("3", "max_rmse=0.01", "lossless"):
        target = tmp_path / "x.qf"
        result = invoke("convert", layered, target, "-q", quality, "-t", "f32", "--force")
        values = arrays_of(layered, quality)
        for name, found in arrays_of(target).items():
            assert found.tobytes() == values[name].astype(found.dtype).tobytes()
        warned = [line for line in result.stderr.splitlines() if line.startswith("Warning: tensor ")]
        if quality == "lossless":
            assert not [line for line in warned if "lossy already" in line]
            continue
        (line,) = [line for line in warned if "lossy already" in line]
        tensors = r"tensor '(empty|layers\.10)\.weight' and [12] more"
        assert re.fullmatch(
            rf"Warning: {tensors}: lossy already, of type scm; errors are against the decoded values", line
        )


def test_recorded_errors_are_against_the_values_at_the_quality(layered, tmp_path):
    target = tmp_path / "x.qf"
    invoke("convert", layered, target, "-q", "3", "-t", "q8_0")
    values, found = arrays_of(layered, 3), arrays_of(target)
    with qformat.safe_open(target) as f:
        for name in ("layers.2.weight", "layers.10.weight"):
            error = f.info(name).error
            assert error is not None
            difference = found[name].astype(np.float64) - values[name]
            assert error.rmse == pytest.approx(math.sqrt(np.mean(difference**2)), rel=1e-5)
            assert error.maximum == pytest.approx(np.abs(difference).max(), rel=1e-5)
            assert f.info(name).dtype == "f32"


def test_converting_a_quantized_qf_file_gives_a_warning(tmp_path):
    qformat.save_file({"w": weights()["layers.2.weight"], "b": np.ones(3, np.float32)}, tmp_path / "q.qf", "q4_0")
    result = invoke("convert", tmp_path / "q.qf", tmp_path / "x.qf", "-t", "scm")
    assert "Warning: tensor 'w': lossy already, of type q4_0; errors are against the decoded values" in result.stderr
    same(arrays_of(tmp_path / "x.qf"), arrays_of(tmp_path / "q.qf"))


def test_metadata_and_assets_of_a_qf_file_are_kept(noted, tmp_path):
    for number, args in enumerate((("-t", "q4_0"), ("-q", "3", "-t", "scm:bpw=2.5"), ("-t", "scm"))):
        target = tmp_path / f"{number}.qf"
        invoke("convert", noted, target, *args)
        valid(target)
        with qformat.safe_open(target) as f:
            assert f.metadata == METADATA
            assert {name: f.get_asset(name) for name in f.assets()} == ASSETS
            assert f.get_tensor("ids").tolist() == weights()["ids"].tolist()
            assert f.get_tensor("layers.10.bias").tobytes() == weights()["layers.10.bias"].tobytes()


def test_a_quality_of_other_sources_is_refused_with_a_hint(source, tmp_path):
    target = tmp_path / "x.qf"
    for given in (source, source / "model.safetensors"):
        message = refused("convert", given, target, "-q", "3")
        assert message.startswith(f"{given}: is not a .qf file")
        assert message.endswith("give it with the type, as in -t scm:bpw=3")
        assert refused("quantize-stats", given, "-q", "3") == message
    assert not target.exists()


def test_a_quality_of_files_without_layers_is_refused(tmp_path):
    qformat.save_file({"w": weights()["layers.2.weight"]}, tmp_path / "q.qf", "q4_0")
    for command in (("convert", tmp_path / "q.qf", tmp_path / "x.qf"), ("quantize-stats", tmp_path / "q.qf")):
        for quality in ("3", "lossless", "max_abs=0.1"):
            message = refused(*command, "-q", quality)
            assert message.startswith(f"{tmp_path / 'q.qf'}: holds no layered tensors (type scm)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.qf"]


def test_a_quality_that_is_not_reached_is_refused(layered, tmp_path):
    invoke("truncate", layered, tmp_path / "cut.qf", "-q", "3")
    for quality, message in (
        ("lossless", "tensor 'layers.10.weight': the file does not hold it losslessly"),
        ("max_abs=1e-5", "tensor 'layers.10.weight': no layer reaches max_abs=1e-05; the file holds it at"),
    ):
        for command in ("convert", "truncate"):
            assert message in refused(command, tmp_path / "cut.qf", tmp_path / "x.qf", "-q", quality)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.qf"]
        assert message in refused("quantize-stats", tmp_path / "cut.qf", "-q", quality)


def test_a_qf_file_is_refused_as_its_own_target(layered, tmp_path):
    copy = tmp_path / "copy.qf"
    shutil.copy(layered, copy)
    for command in (("convert", copy, copy, "-f"), ("truncate", copy, copy, "-q", "3", "-f")):
        assert "give another name" in refused(*command)
    assert copy.read_bytes() == layered.read_bytes()


def test_converting_a_damaged_qf_file_is_refused(layered, tmp_path):
    with qformat.safe_open(layered) as f:
        segment = f.info("layers.2.weight").segments[2]
    data = bytearray(layered.read_bytes())
    data[segment.offset] ^= 1
    (tmp_path / "bad.qf").write_bytes(data)
    for command in ("convert", "truncate"):
        message = refused(command, tmp_path / "bad.qf", tmp_path / "x.qf", "-q", "4")
        assert "tensor 'layers.2.weight', segment 'layer.2' is damaged: its SHA-256 does not match" in message
        assert not (tmp_path / "x.qf").exists()
    invoke("convert", tmp_path / "bad.qf", tmp_path / "x.qf", "-q", "2")  # it is not read
    (tmp_path / "cut.qf").write_bytes(layered.read_bytes()[:-5])
    for command in ("convert", "truncate"):
        assert "cut.qf" in refused(command, tmp_path / "cut.qf", tmp_path / "y.qf", "-q", "4")
    assert not (tmp_path / "y.qf").exists()


def test_a_converted_qf_file_is_closed(layered, tmp_path):
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        invoke("convert", layered, tmp_path / "x.qf", "-q", "3")
        invoke("quantize-stats", layered, "-q", "3")
        gc.collect()
    assert not [str(warning.message) for warning in caught if warning.category is ResourceWarning]


def test_a_qf_file_is_pruned_like_its_values(layered, tmp_path):
    invoke("convert", layered, tmp_path / "x.qf", "-t", "scm", "--prune", "0.5")
    found = arrays_of(tmp_path / "x.qf")
    for name in ("layers.2.weight", "layers.10.weight"):
        assert (found[name] == 0).mean() >= 0.5
        kept = found[name] != 0
        np.testing.assert_array_equal(found[name][kept], weights()[name][kept])
    for quality in (2, 4):  # what is pruned stays so
        assert not arrays_of(tmp_path / "x.qf", quality)["layers.2.weight"][found["layers.2.weight"] == 0].any()


# ---- truncate


@pytest.mark.parametrize("bits", [2, 3.25, 6, 8])
def test_truncate_writes_the_file_that_convert_writes_at_that_rate(bits, layered, source, tmp_path):
    invoke("truncate", layered, tmp_path / "cut.qf", "-q", bits)
    invoke("convert", source, tmp_path / "made.qf", "-t", f"scm:bpw={bits}", "--tensor-type", "empty.weight=f32")
    valid(tmp_path / "cut.qf")
    same(arrays_of(tmp_path / "cut.qf"), arrays_of(layered, bits))
    with qformat.safe_open(tmp_path / "cut.qf") as cut, qformat.safe_open(tmp_path / "made.qf") as made:
        for name in ("layers.2.weight", "layers.10.weight"):
            one, other = cut.info(name), made.info(name)
            assert [s.sha256 for s in one.segments] == [s.sha256 for s in other.segments]
            assert (one.params, one.error, one.range) == (other.params, other.error, other.range)
            assert one.nbytes * 8 / one.elements <= bits


def test_truncate_reports_the_written_file(layered, tmp_path):
    target = tmp_path / "x.qf"
    lines = invoke("truncate", layered, target, "-q", "max_rmse=0.02").stdout.splitlines()
    size = target.stat().st_size
    assert len(lines) == 2
    assert re.fullmatch(
        rf"{re.escape(str(target))} is [\d.]+ kB \({size} bytes\) of [\d.]+ kB[,;] \d\.\d{{3}} bits/weight", lines[0]
    )
    root = lines[1].removeprefix("root sha256 ")
    inspected = json.loads(invoke("inspect", target, "--json").stdout)
    assert root == inspected["root_sha256"]
    assert f"{inspected['total']['bpw']:.3f} bits/weight" in lines[0]
    found = json.loads(invoke("truncate", layered, target, "-q", "max_rmse=0.02", "-f", "--json").stdout)
    assert found == {
        "output": str(target),
        "bytes": size,
        "source_bytes": layered.stat().st_size,
        "bpw": inspected["total"]["bpw"],
        "root_sha256": root,
    }


def test_truncate_requires_a_quality_and_a_free_target(layered, tmp_path):
    target = tmp_path / "x.qf"
    assert "Missing option '-q' / '--quality'" in refused("truncate", layered, target, code=2)
    for quality in ("best", "0", "-3", "max_rmse", "nan", ""):
        message = refused("truncate", layered, target, "-q", quality, code=2)
        assert f"quality {quality!r}: give bits per weight such as 3.5" in message
        refused("convert", layered, target, "-q", quality, code=2)
        refused("quantize-stats", layered, "-q", quality, code=2)
    invoke("truncate", layered, code=2)
    target.write_bytes(b"precious")
    assert "exists" in refused("truncate", layered, target, "-q", "3")
    assert target.read_bytes() == b"precious"
    invoke("truncate", layered, target, "-q", "3", "--force")
    valid(target)
    assert "No such file" in refused("truncate", tmp_path / "missing.qf", tmp_path / "y.qf", "-q", "3")
    (tmp_path / "text.qf").write_text("this is no container" * 30)
    assert "text.qf" in refused("truncate", tmp_path / "text.qf", tmp_path / "y.qf", "-q", "3")
    assert not (tmp_path / "y.qf").exists()


def test_truncate_refuses_other_sources(source, tmp_path):
    for given in (source, source / "model.safetensors"):
        assert str(given) in refused("truncate", given, tmp_path / "x.qf", "-q", "3")
    assert not list(tmp_path.iterdir())


def test_truncate_runs_with_numpy_kernels_and_keeps_metadata(layered, noted, tmp_path):
    """With numpy kernels; nothing is decoded."""
    result = run_cli("truncate", noted, tmp_path / "x.qf", "-q", "4", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["bytes"] == (tmp_path / "x.qf").stat().st_size
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert f.metadata == METADATA
        assert {name: f.get_asset(name) for name in f.assets()} == ASSETS


# ---- inspect


def test_inspect_json_has_layers_and_the_ladder(layered):
    found = json.loads(invoke("inspect", layered, "--json").stdout)
    assert [t["name"] for t in found["tensors"]] == [
        *("empty.weight", "ids", "layers.2.weight", "layers.10.bias", "layers.10.weight")
    ]
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert "layers" not in by_name["layers.10.bias"]
    assert "range" not in by_name["ids"]
    with qformat.safe_open(layered) as f:
        for name in ("layers.2.weight", "layers.10.weight"):
            tensor, info, x = by_name[name], f.info(name), weights()[name].astype(np.float64)
            assert tensor["type"] == f"scm:layers={info.params['layers']},lossless=true"
            assert tensor["range"] == pytest.approx(x.max() - x.min(), rel=1e-9)
            assert tensor["encoder"] == {}
            assert (tensor["rmse"], tensor["maxerr"]) == (0, 0)
            assert len(tensor["layers"]) == len(info.layers) == len(LADDER) + 1
            assert tensor["layers"][-1] == {
                "bytes": tensor["bytes"],
                "bpw": tensor["bpw"],
                "rmse": 0.0,
                "maxerr": 0.0,
                "mean_abs": 0.0,
            }
            for shown, layer in zip(tensor["layers"], info.layers, strict=True):
                assert shown == {
                    "bytes": layer.nbytes,
                    "bpw": layer.bpw,
                    "rmse": layer.error.rmse,
                    "maxerr": layer.error.maximum,
                    "mean_abs": layer.error.mean,
                }


def test_errors_in_the_ladder_are_those_of_values_read_at_each_quality(layered):
    found = json.loads(invoke("inspect", layered, "--json").stdout)
    ladder = found["ladder"]
    assert [step["quality"] for step in ladder] == [*(f"{bits:g}" for bits in LADDER), "lossless"]
    names = ("layers.2.weight", "layers.10.weight")
    with qformat.safe_open(layered) as f:
        infos = {name: f.info(name) for name in f.keys()}  # noqa: SIM118
    for step in ladder:
        reached = {name: Quality.parse(step["quality"]).of(info) for name, info in infos.items()}
        assert step["bytes"] == sum(info.nbytes for info in reached.values())
        count = {name: weights()[name].size for name in names}
        assert step["bpw"] == pytest.approx(8 * sum(reached[name].nbytes for name in names) / sum(count.values()))
        relative = {}
        values = arrays_of(layered, step["quality"])
        for name in names:
            x = weights()[name].astype(np.float64)
            errors = np.abs(values[name] - x) / (x.max() - x.min())
            relative[name] = math.sqrt(np.mean(errors**2)), errors.mean(), errors.max()
        for key, place in (("rmse", 0), ("mean_abs", 1)):
            average = sum(count[name] * relative[name][place] for name in names) / sum(count.values())
            assert step[key] == pytest.approx(average, rel=1e-5, abs=1e-12)
        assert step["maxerr"] == pytest.approx(max(one[2] for one in relative.values()), rel=1e-5, abs=1e-12)
    assert ladder[-1]["bytes"] == found["total"]["bytes"]
    assert [step["bytes"] for step in ladder] == sorted(step["bytes"] for step in ladder)


def test_inspect_prints_the_ladder(layered):
    output = invoke("inspect", layered).stdout
    assert re.search(
        r"layers\.2\.weight +120x90 +f32 +scm:layers=19,lossless=true +[\d.]+ kB +\d+\.\d{3} +0 +0", output
    )
    found = json.loads(invoke("inspect", layered, "--json").stdout)["ladder"]
    lines = output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("quality "))
    assert lines[head].split() == ["quality", "bits/weight", "to", "read", "rmse", "mean_abs", "maxerr"]
    assert "errors are relative to the range of each tensor" in lines[head - 1]
    assert len(lines) == head + 1 + len(found)
    for line, step in zip(lines[head + 1 :], found, strict=True):
        cells = line.split()
        assert cells[:2] == [step["quality"], f"{step['bpw']:.3f}"]
        assert cells[4:] == [f"{step[key]:.3e}" if step[key] else "0" for key in ("rmse", "mean_abs", "maxerr")]


def test_the_ladder_of_a_truncated_file_ends_at_its_quality(layered, tmp_path):
    invoke("truncate", layered, tmp_path / "x.qf", "-q", "3")
    ladder = json.loads(invoke("inspect", tmp_path / "x.qf", "--json").stdout)["ladder"]
    assert [step["quality"] for step in ladder] == ["2", "2.25", "2.5", "2.75", "3"]
    whole = json.loads(invoke("inspect", layered, "--json").stdout)["ladder"]
    for one, other in zip(ladder, whole, strict=False):
        assert {k: v for k, v in one.items() if k != "bytes"} == {k: v for k, v in other.items() if k != "bytes"}
    shown = json.loads(invoke("inspect", tmp_path / "x.qf", "--json", "--tensor", "layers.2.weight").stdout)
    assert shown["tensors"][0]["type"] == "scm:layers=5,lossless=false"
    assert shown["tensors"][0]["rmse"] == shown["tensors"][0]["layers"][-1]["rmse"] > 0


def test_files_without_layers_have_no_ladder(layered, tmp_path):
    qformat.save_file({"w": weights()["layers.2.weight"]}, tmp_path / "q.qf", "q4_0")
    assert json.loads(invoke("inspect", tmp_path / "q.qf", "--json").stdout)["ladder"] == []
    assert "quality" not in invoke("inspect", tmp_path / "q.qf").stdout
    assert "quality" not in invoke("inspect", layered, "--tensor", "*.bias").stdout
    qformat.save_file({"w": np.zeros((0, 5), np.float32)}, tmp_path / "e.qf", {"w": "scm"})
    assert json.loads(invoke("inspect", tmp_path / "e.qf", "--json").stdout)["ladder"] == []


# ---- quantize-stats


@pytest.mark.parametrize("type_", ["scm:bpw=4", "scm:max_abs=0.02", "scm"])
def test_quantize_stats_finds_what_convert_records(source, type_, tmp_path):
    found = json.loads(invoke("quantize-stats", source, "-t", type_, "--json", "-").stdout)
    invoke("convert", source, tmp_path / "x.qf", "-t", type_)
    arrays = arrays_of(tmp_path / "x.qf")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        names = [result["tensor"] for result in found["results"]]
        assert names == ["empty.weight", "layers.2.weight", "layers.10.weight"]
        for result in found["results"]:
            info, x = f.info(result["tensor"]), weights()[result["tensor"]]
            assert result["type"] == type_
            assert result["bpw"] == (8 * info.nbytes / x.size if x.size else 0)
            error = info.error
            assert result["rmse"] == pytest.approx(error.rmse if error else 0, rel=1e-5)
            assert result["maxerr"] == pytest.approx(error.maximum if error else 0, rel=1e-6)
            assert result["histogram"] is None
            if x.size:
                assert result["entropy"] > 0.9 * result["bpw"]
                errors = np.abs(arrays[result["tensor"]].astype(np.float64) - x)
                assert result["rel_rmse"] == pytest.approx(result["rmse"] / x.std(dtype=np.float64), rel=1e-6)
                for key, share in (("p95", 0.95), ("median", 0.5)):
                    exact = np.quantile(errors, share, method="inverted_cdf")
                    assert exact * (1 - 1e-6) <= result[key] <= exact * (1 + 1 / 1000)
        (total,) = found["totals"]
        every = [f.info(name) for name in names]
        assert total["bpw"] == pytest.approx(
            8 * sum(info.nbytes for info in every) / sum(info.elements for info in every)
        )


@pytest.mark.parametrize("type_", ["scm", "scm:max_abs=0.02", "scm:bpw=4"])
def test_the_measured_entropy_is_at_most_the_stored_size(source, type_):
    found = json.loads(invoke("quantize-stats", source, "-t", type_, "--json", "-").stdout)
    for result in (*found["results"], *found["totals"]):
        assert result["entropy"] <= result["bpw"]


def test_quantize_stats_of_layers_does_not_depend_on_jobs(source):
    args = ("quantize-stats", source, "-t", "scm:bpw=3", "-t", "q4_0", "--json", "-", "-j")
    assert invoke(*args, 1).stdout == invoke(*args, 3).stdout


def test_quantize_stats_prints_a_line_for_scm(source):
    lines = invoke("quantize-stats", source, "-t", "scm:bpw=4", "--per-layer", "--histogram").stdout.splitlines()
    assert re.fullmatch(
        r"scm:bpw=4::layers\.2\.weight : rmse 0\.\d{8}, maxerr 0\.\d{8}, 95pct<0\.\d{4}, median<0\.\d{4}, "
        r"(3\.9\d{3}|4\.0000) bits/weight, entropy \d\.\d{4}",
        next(line for line in lines if "layers.2.weight" in line),
    )
    assert "hist: not counted for scm:bpw=4" in lines


def test_quantize_stats_measures_at_a_quality(layered, tmp_path):
    result = invoke("quantize-stats", layered, "-q", "3", "-t", "q8_0", "-t", "scm", "--json", "-")
    assert "lossy already, of type scm; errors are against the decoded values" in result.stderr
    found = json.loads(result.stdout)
    invoke("convert", layered, tmp_path / "x.qf", "-q", "3", "-t", "q8_0")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        for one in found["results"]:
            if one["type"] == "scm":
                assert (one["rmse"], one["maxerr"]) == (0, 0)
                continue
            error = f.info(one["tensor"]).error
            assert error is not None
            assert one["rmse"] == pytest.approx(error.rmse, rel=1e-6)
            assert one["maxerr"] == pytest.approx(error.maximum, rel=1e-6)


# ---- other commands


def test_types_lists_only_the_parameters_of_scm_that_can_be_given():
    (scm,) = [t for t in json.loads(invoke("types", "--json").stdout)["types"] if t["type"] == "scm"]
    assert scm["bpw"] is None
    assert set(scm["params"]) == {"bpw", "max_rmse", "max_abs", "mean_abs", "lossless"}
    assert scm["params"]["bpw"] == ["any", "N"]
    assert scm["params"]["lossless"] == [False, True]
    assert "layers" in scm["about"]
    table = invoke("types").stdout
    assert re.search(r"^scm +varies +Significance coding in layers", table, re.MULTILINE)
    assert "layers=" not in table


def test_help_explains_qualities():
    for command in ("convert", "truncate", "quantize-stats"):
        text = " ".join(invoke(command, "--help").stdout.split())
        assert "-q, --quality QUALITY" in text
        for word in ("3.5", "max_rmse=0.01", "max_abs=0.05", "mean_abs=0.01", "lossless"):
            assert word in text
    assert "truncate" in invoke("--help").stdout


def test_verify_names_the_layer_that_is_damaged(layered, tmp_path):
    assert invoke("verify", layered).stdout == f"{layered}: OK\n"
    with qformat.safe_open(layered) as f:
        segment = f.info("layers.10.weight").segments[4]
    data = bytearray(layered.read_bytes())
    data[segment.offset + 9] ^= 0x40
    (tmp_path / "bad.qf").write_bytes(data)
    output = invoke("verify", tmp_path / "bad.qf", code=1).stdout
    assert "tensor 'layers.10.weight', segment 'layer.4': SHA-256 does not match" in output
    assert sha256(bytes(data)) in invoke("checksum", tmp_path / "bad.qf").stdout


def test_inspect_reads_only_the_index(layered, tmp_path):
    draft = Draft.of(layered.read_bytes())
    draft.body = bytes(len(draft.body))  # all segments are gone
    (tmp_path / "x.qf").write_bytes(draft.pack())
    damaged = json.loads(invoke("inspect", tmp_path / "x.qf", "--json").stdout)
    assert damaged["ladder"] == json.loads(invoke("inspect", layered, "--json").stdout)["ladder"]


def test_truncated_minilm_layers_equal_those_converted_at_that_rate(minilm, tmp_path):
    arrays = load_file(minilm / "model.safetensors")
    chosen = {name: x for name, x in arrays.items() if "layer.0." in name}
    save_file(chosen, tmp_path / "x.safetensors")
    invoke("convert", tmp_path / "x.safetensors", tmp_path / "all.qf", "-t", "scm")
    invoke("truncate", tmp_path / "all.qf", tmp_path / "cut.qf", "-q", "3.5")
    invoke("convert", tmp_path / "x.safetensors", tmp_path / "made.qf", "-t", "scm:bpw=3.5")
    assert (tmp_path / "cut.qf").read_bytes() == (tmp_path / "made.qf").read_bytes()
    same(arrays_of(tmp_path / "all.qf"), chosen)
    args = ("-t", "scm:bpw=3.5", "-t", "levels:n=15,bpw=3.5", "--json", "-")
    scm, levels = json.loads(invoke("quantize-stats", tmp_path / "x.safetensors", *args).stdout)["totals"]
    assert 3.45 < scm["bpw"] <= 3.5
    assert scm["rel_rmse"] < 1.1 * levels["rel_rmse"]
