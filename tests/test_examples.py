"""The examples run as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import qformat
from tests.helpers.reference import ROOT

EXAMPLES = ROOT / "examples"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "default"}
    return subprocess.run([str(arg) for arg in args], env=env, capture_output=True, text=True, check=False)


def test_the_example_convert_checkpoint_runs(minilm, tmp_path):
    done = run(sys.executable, EXAMPLES / "convert_checkpoint.py", minilm, tmp_path / "x.qf")
    assert done.returncode == 0, done.stderr
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert f.info("embeddings.word_embeddings.weight").codec == "bf16"
        assert f.info("encoder.layer.0.output.dense.weight").codec == "q4_0"
        assert f.root in done.stdout


def test_the_example_load_in_inference_runs(minilm_qf):
    done = run(sys.executable, EXAMPLES / "load_in_inference.py", minilm_qf)
    assert done.returncode == 0, done.stderr
    assert "104 tensors, 22713728 weights" in done.stdout
    assert "model type bert, first rows of embeddings.word_embeddings.weight: (3, 384) float32" in done.stdout


def test_the_example_load_in_inference_runs_on_a_file_without_configuration(tmp_path):
    qformat.save_file({"w": np.ones((4, 8), np.float32)}, tmp_path / "x.qf", "f32")
    done = run(sys.executable, EXAMPLES / "load_in_inference.py", tmp_path / "x.qf")
    assert done.returncode == 0, done.stderr
    assert "model type None, first rows of w: (3, 8) float32" in done.stdout


def test_the_example_verify_in_ci_takes_names_literally(tmp_path):
    qformat.save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.qf")
    sums = run(sys.executable, "-m", "qformat", "checksum", tmp_path / "model.qf").stdout.replace(f"{tmp_path}/", "")
    (tmp_path / "SHA256SUMS").write_text(sums)
    qformat.save_file({}, tmp_path / "mode..qf")
    done = run(EXAMPLES / "verify_in_ci.sh", tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "mode..qf: not listed in SHA256SUMS")


def test_the_example_verify_in_ci_finds_missing_and_changed_files(minilm_qf, tmp_path):
    shutil.copy(minilm_qf, tmp_path / "a.qf")
    sums = run(sys.executable, "-m", "qformat", "checksum", tmp_path / "a.qf").stdout.replace(f"{tmp_path}/", "")
    (tmp_path / "SHA256SUMS").write_text(sums)
    assert run(EXAMPLES / "verify_in_ci.sh", tmp_path).returncode == 0
    qformat.save_file({}, tmp_path / "b.qf")
    done = run(EXAMPLES / "verify_in_ci.sh", tmp_path)
    assert (done.returncode, "b.qf: not listed" in done.stdout) == (1, True)
    (tmp_path / "b.qf").unlink()
    qformat.save_file({}, tmp_path / "a.qf", overwrite=True)
    done = run(EXAMPLES / "verify_in_ci.sh", tmp_path)
    assert done.returncode == 1
    assert "a.qf: OK" in done.stdout
    assert "a.qf: FAILED" in done.stdout


def test_the_demo_runs():
    done = run(sys.executable, EXAMPLES / "demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo: everything held" in done.stdout
    assert "tensor 'embeddings.word_embeddings.weight', segment 'blocks': SHA-256 does not match" in done.stdout


def test_the_python_snippets_of_the_guide_to_reading_run(minilm_qf, tmp_path):
    shutil.copy(minilm_qf, tmp_path / "minilm.qf")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / "reading.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    layers = {"pooler.dense.weight": np.linspace(-1, 1, 6400, dtype=np.float32).reshape(80, 80)}
    qformat.save_file(layers, tmp_path / "layers.qf", "scm")
    for snippet in snippets:
        (tmp_path / "snippet.py").write_text(snippet)
        done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
