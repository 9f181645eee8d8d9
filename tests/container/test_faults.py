"""Commands that are killed, or whose disk fails, at any file-system call: the output is old or complete, and runs go on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
SAMPLE = "shards over as many; convert --resume; hf --force; json"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library that makes calls fail."""
    compiler = shutil.which("gcc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and gcc")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, HELPERS / "faults.c", "-ldl"], check=True)
    return path


def runs(library: Path, folder: Path, stride: int, scenarios: str = "", faults: str = "") -> int:
    """Make the runs of scenarios, of which none must be broken, and return how many there were."""
    command = [sys.executable, "-m", "tests.helpers.fault_campaign", str(folder), str(stride), scenarios, faults]
    fixed = {
        "LD_PRELOAD": str(library),
        "QFORMAT_KERNELS": "numpy",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=os.environ | fixed, cwd=HELPERS.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r": (\d+) runs, 0 broken", done.stdout)
    assert len(counts) == len(done.stdout.splitlines())
    return sum(map(int, counts))


def test_commands_hit_by_a_fault_leave_the_old_or_the_new_output(library: Path, tmp_path: Path) -> None:
    assert runs(library, tmp_path, 23, SAMPLE, "SIGKILL; EIO; ENOSPC from then on; short write") >= 40


@pytest.mark.slow
def test_every_command_hit_by_every_fault_leaves_the_old_or_the_new_output(library: Path, tmp_path: Path) -> None:
    assert runs(library, tmp_path, 13) >= 600
