"""What the commands print, and the shapes of their JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qformat
from qformat.codecs.registry import parse_type, types_for_weights
from qformat.errors import DISTRIBUTION, install_hint
from tests.helpers.cli import invoke
from tests.helpers.reference import ROOT


@pytest.fixture(scope="module")
def real(minilm) -> dict[str, np.ndarray]:
    source = load_file(minilm / "model.safetensors")
    return {name: array for name, array in source.items() if array.ndim == 2 and array.dtype == np.float32}


def test_help_lists_all_commands():
    output = invoke("--help").stdout
    names = re.findall(r"^  ([a-z]+[a-z-]*)  ", output, re.MULTILINE)
    assert names == ["convert", "truncate", "export", "inspect", "quantize-stats", "types", "verify", "checksum"]
    for name in names:
        assert name in invoke(name, "--help").stdout


def test_convert_json_reports_the_written_file(minilm, tmp_path):
    target = tmp_path / "x.qf"
    dry = json.loads(invoke("convert", minilm, target, "--dry-run", "--json").stdout)
    done = json.loads(invoke("convert", minilm, target, "--json").stdout)
    assert done["output"] == str(target)
    assert done["tensors"] == 104
    assert done["params"] == 22_713_728
    assert done["bytes"] == target.stat().st_size == dry["bytes"]
    assert done["bpw"] == pytest.approx(4.539, abs=1e-3)
    assert re.fullmatch("[0-9a-f]{64}", done["root_sha256"])
    assert dry["root_sha256"] is None
    assert done["seconds"] > 0


def test_convert_prints_a_summary_and_with_verbose_each_tensor(minilm, tmp_path):
    short = invoke("convert", minilm, tmp_path / "x.qf").stdout.splitlines()
    assert len(short) == 3
    assert short[0].endswith("is 13.2 MB (13219630 bytes)")
    assert short[1].startswith("104 tensors, 22.7M weights, 90.9 MB -> 4.539 bits/weight; 11 other files; in ")
    long = invoke("convert", minilm, tmp_path / "y.qf", "-v").stdout.splitlines()
    assert len(long) == 1 + 104 + 11 + 3
    assert "file 1_Pooling/config.json (190 B)" in long
    assert any(
        re.search(r"layer\.5\.output\.dense\.weight +384x1536 +f32 -> q4_0 +2\.4 MB +331\.8 kB +\d\.\d{3}e-03", x)
        for x in long
    )


def test_inspect_prints_tensors_and_totals(minilm_qf):
    output = invoke("inspect", minilm_qf).stdout
    assert "qformat 1.5, 13.2 MB" in output
    assert re.search(
        r"embeddings\.word_embeddings\.weight +30522x384 +f32 +q4_0 +6\.6 MB +4\.500 +4\.\d{3}e-03", output
    )
    assert "104 tensors, 22.7M weights, 12.9 MB, 4.539 bits/weight" in output


def test_inspect_json_reports_tensors_assets_and_totals(minilm_qf, minilm):
    found = json.loads(invoke("inspect", minilm_qf, "--json").stdout)
    assert found["format"] == {"major": 1, "minor": 5}
    assert found["file_bytes"] == minilm_qf.stat().st_size
    assert found["assets"]["vocab.txt"] == (minilm / "vocab.txt").stat().st_size
    assert len(found["tensors"]) == 104
    tensor = next(t for t in found["tensors"] if t["name"] == "embeddings.word_embeddings.weight")
    assert tensor["shape"] == [30522, 384]
    assert (tensor["dtype"], tensor["type"], tensor["bytes"], tensor["bpw"]) == ("f32", "q4_0", 6592752, 4.5)
    assert found["total"]["params"] == 22_713_728
    assert found["total"]["bytes"] == sum(t["bytes"] for t in found["tensors"])


def test_inspect_lists_only_tensors_that_match_a_pattern(minilm_qf):
    found = json.loads(invoke("inspect", minilm_qf, "--json", "--tensor", "*.bias").stdout)
    assert {t["type"] for t in found["tensors"]} == {"f32"}
    assert "no tensor that matches 'zzz'" in invoke("inspect", minilm_qf, "--tensor", "zzz", code=1).stderr


def test_inspect_and_verify_suggest_to_convert_old_files_again(minilm_qf, monkeypatch):
    monkeypatch.setattr("qformat.container.reader.MINOR", 6)
    assert "convert again" in invoke("inspect", minilm_qf).stderr
    assert "convert again" in invoke("verify", minilm_qf).stderr


def gguf_errors(array: np.ndarray) -> np.ndarray:
    blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0)
    return (array - gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)).astype(np.float64)


NAIVE = "q4_0:search=naive"


def test_quantize_stats_measures_the_errors_of_gguf_blocks(minilm, real, tmp_path):
    output = invoke(
        "quantize-stats", minilm, "-t", NAIVE, "--per-tensor", "--json", tmp_path / "s.json"
    ).stdout.splitlines()
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(output) == len(real) + 1
    assert {r["tensor"] for r in found["results"]} == set(real)
    for line, result in zip(output, found["results"], strict=False):
        array = real[result["tensor"]]
        error = np.abs(gguf_errors(array))
        assert result["type"] == NAIVE
        assert result["shape"] == list(array.shape)
        assert result["bpw"] == 4.5
        assert result["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
        assert result["rel_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)) / array.std(dtype=np.float64), rel=1e-7)
        assert result["maxerr"] == error.max()
        for key, q in (("p95", 0.95), ("median", 0.5)):
            exact = np.quantile(error, q, method="inverted_cdf")
            assert exact <= result[key] <= exact * (1 + 1 / 2000)
        assert len(result["histogram"]) == 16
        assert sum(result["histogram"]) == array.size
        match = re.fullmatch(NAIVE + r"::(\S+) : rmse (\S+), maxerr (\S+), 95pct<(\S+), median<(\S+)", line)
        assert match is not None
        assert match[1] == result["tensor"]
        assert match[2] == f"{result['rmse']:.8f}"
        assert match[3] == f"{result['maxerr']:.8f}"
        assert result["p95"] < float(match[4]) <= result["p95"] + 1.01e-4
        assert result["median"] < float(match[5]) <= result["median"] + 1.01e-4
    squares = sum((gguf_errors(array) ** 2).sum() for array in real.values())
    params = sum(array.size for array in real.values())
    (total,) = found["totals"]
    assert total["rmse"] == pytest.approx(np.sqrt(squares / params), rel=1e-9)
    every = np.concatenate([array.ravel() for array in real.values()])
    assert total["rel_rmse"] == pytest.approx(total["rmse"] / every.std(dtype=np.float64), rel=1e-7)
    assert output[-1].startswith(f"{NAIVE}::total : ")


def test_quantize_stats_compares_types_and_selects_tensors(minilm):
    args = ("-t", "q4_0", "-t", "bf16", "-t", "f16", "--include", r"layer\.[01]\.", "--exclude", "attention")
    found = json.loads(invoke("quantize-stats", minilm, *args, "--json", "-").stdout)
    assert [t["type"] for t in found["totals"]] == ["q4_0", "bf16", "f16"]
    errors = [t["rel_rmse"] for t in found["totals"]]
    assert errors[0] > errors[1] > errors[2] > 0
    names = {r["tensor"] for r in found["results"]}
    assert len(names) == 4
    assert all(re.search(r"layer\.[01]\.(intermediate|output)\.dense\.weight", name) for name in names)
    assert found["totals"][1]["histogram"] is None
    assert "is left to measure" in invoke("quantize-stats", minilm, "--include", "zzz", code=1).stderr


def test_results_of_quantize_stats_do_not_depend_on_jobs(minilm):
    args = ("quantize-stats", minilm, "--include", "word", "--json", "-", "-j")
    assert invoke(*args, 1).stdout == invoke(*args, 3).stdout


def test_quantize_stats_prints_the_histogram_of_codes(tmp_path):
    save_file({"w": np.tile(np.arange(-8, 8, dtype=np.float32), (4, 4))}, tmp_path / "x.safetensors")
    output = invoke("quantize-stats", tmp_path / "x.safetensors", "--histogram").stdout.splitlines()
    assert output[0] == "q4_0::total : rmse 0.00000000, maxerr 0.00000000, 95pct<0.0001, median<0.0001"
    assert output[1] == "hist: " + " ".join(["0.062"] * 16)


def test_verify_accepts_the_list_that_checksum_prints(minilm_qf, tmp_path):
    lines = invoke("checksum", minilm_qf).stdout
    assert re.fullmatch(r"[0-9a-f]{64}  \S+\n", lines)
    (tmp_path / "SHA256SUMS").write_text(lines)
    assert invoke("verify", tmp_path / "SHA256SUMS").stdout == f"{minilm_qf}: OK\n"
    assert invoke("verify", minilm_qf, tmp_path / "SHA256SUMS", "--quick").stdout.count("OK") == 2


def imported(*args: object) -> tuple[set[str], int]:
    script = (
        "import sys\nfrom qformat.cli import cli\ntry:\n    cli(sys.argv[1:])\nexcept SystemExit as e:\n"
        "    print('\\nMODULES', *{name.partition('.')[0] for name in sys.modules})\n    sys.exit(e.code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, check=False)
    return set(done.stdout.rpartition("MODULES ")[2].split()), done.returncode


def test_commands_that_do_not_decode_import_no_heavy_packages(minilm_qf):
    for args in (["--help"], ["convert", "--help"], *([name, minilm_qf] for name in ("inspect", "verify", "checksum"))):
        modules, code = imported(*args)
        assert code == 0
        assert "qformat" in modules
        assert not modules & {"numba", "llvmlite", "torch", "numpy", "transformers", "rich", "safetensors"}


def test_the_base_install_works_without_the_packages_of_extras(minilm, tmp_path):
    """Everything but the torch reader works where the packages of the extras cannot be imported."""
    target = tmp_path / "x.qf"
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'gguf', 'ml_dtypes', 'scipy'): sys.modules[name] = None\n"
        "import qformat\nfrom qformat.cli import cli\n"
        f"for args in (['convert', {str(minilm)!r}, {str(target)!r}], ['verify', {str(target)!r}], "
        f"['inspect', {str(target)!r}], ['quantize-stats', {str(minilm)!r}], ['checksum', {str(target)!r}]):\n"
        "    try: cli(args)\n    except SystemExit as e: assert not e.code, args\n"
        f"with qformat.safe_open({str(target)!r}) as f: print(f.get_tensor(f.keys()[0]).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(384,)"


def test_install_hints_name_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == (DISTRIBUTION, qformat.__version__)
    assert install_hint("torch") == "pip install 'qformat-models[torch]'"
    assert "torch" in project["optional-dependencies"]


def test_the_qformat_command_is_installed(minilm_qf):
    program = Path(sys.executable).parent / "qformat"
    done = subprocess.run([program, "verify", minilm_qf], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{minilm_qf}: OK\n", "")
    assert (
        qformat.__version__ in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    )


def test_a_pipe_that_closes_early_gives_no_error(minilm_qf):
    command = f"{sys.executable} -m qformat inspect {minilm_qf} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def in_a_terminal(*args: object, **environment: str) -> str:
    """Run a command whose stderr is a terminal; return what it wrote there."""
    main, side = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    command = [sys.executable, "-m", "qformat", *map(str, args)]
    written = b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=side, env=env) as process:
        os.close(side)
        while True:
            try:
                part = os.read(main, 1 << 16)
            except OSError:  # what Linux gives when the other side is closed
                break
            if not part:
                break
            written += part
    os.close(main)
    assert process.returncode == 0
    return written.decode()


def test_terminals_show_progress_bars(minilm, minilm_qf, tmp_path):
    env = {"QFORMAT_CACHE_DIR": str(tmp_path / "cache")}
    first = in_a_terminal("convert", minilm, tmp_path / "x.qf", **env)
    assert "converting model" in first
    assert "100%" in first
    assert "compiling kernels, which happens once" in first
    assert re.search("\x1b\\[[0-9;]*m", first)
    second = in_a_terminal("convert", minilm, tmp_path / "x.qf", "--force", NO_COLOR="1", **env)
    assert "100%" in second
    assert "compiling" not in second
    assert not re.search("\x1b\\[3[0-9][0-9;]*m", second)
    assert "measuring model" in in_a_terminal("quantize-stats", minilm, "--include", "pooler", **env)
    assert "verifying" in in_a_terminal("verify", minilm_qf)


def test_stdout_holds_only_the_json_result(minilm, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qformat", "convert", minilm, tmp_path / "x.qf", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["tensors"] == 104
    assert done.stderr == ""


def test_commands_work_where_stdout_is_closed(minilm_qf):
    done = subprocess.run(
        f"{sys.executable} -m qformat verify {minilm_qf} >&-", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_refuse_pipes_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for args in ("convert pipe x.qf", "quantize-stats pipe", "inspect pipe", "verify pipe", "checksum pipe"):
        command = [sys.executable, "-m", "qformat", *args.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "not a regular file" in done.stdout + done.stderr


def test_verify_escapes_control_characters_in_names_of_a_list(tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  x\x1b]0;title\x07y\n")
    output = invoke("verify", tmp_path / "SHA256SUMS", code=1).stdout
    assert "x\\x1b]0;title\\x07y: FAILED" in output


def test_the_progress_bar_of_verify_counts_the_bytes_of_listed_files(minilm_qf, tmp_path):
    from qformat.container.verify import bytes_to_check

    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {minilm_qf}\n{'0' * 64}  missing\nnonsense\n")
    assert bytes_to_check([str(tmp_path / "SHA256SUMS"), str(minilm_qf), "missing"]) == 2 * minilm_qf.stat().st_size


def test_quantize_stats_of_tensors_without_elements_are_zero(tmp_path):
    save_file({"v": np.ones(4, np.float32), "w": np.zeros((0, 4), np.float32)}, tmp_path / "x.safetensors")
    found = json.loads(invoke("quantize-stats", tmp_path / "x.safetensors", "--json", "-").stdout)
    (total,) = found["totals"]
    assert (total["p95"], total["median"], total["rmse"], total["params"]) == (0.0, 0.0, 0.0, 0)


def test_types_lists_every_type_for_weights_with_its_parameters():
    found = json.loads(invoke("types", "--json").stdout)["types"]
    assert [t["type"] for t in found] == sorted(types_for_weights())
    assert not {"fp8", "ggml", "scaled", "bool", "u8", "f8_e4m3"} & set(types_for_weights())
    assert next(t for t in found if t["type"] == "q4_0")["params"] == {
        "coded": [False, True],
        "search": ["table", "naive", "exact"],
    }
    for entry in found:
        assert entry["about"]
        for key, values in entry["params"].items():
            for value in values:
                if value in ("N", 256, "row", "percentile", "gauss"):  # these need another parameter, or a number
                    continue
                shown = str(value).lower() if isinstance(value, bool) else value
                parse_type(f"{entry['type']}:{key}={shown}")
    table = invoke("types").stdout
    assert re.search(
        r"^q4_1 +5\.000 +Blocks of 32 four-bit codes with a scale and a minimum.*\n +coded=false\|true\n +search=als\|naive\|best$",
        table,
        re.MULTILINE,
    )
    assert re.search(r"^ternary +varies +", table, re.MULTILINE)
    assert "group=128|N|row" in table
    assert "sym=true|false" in table
