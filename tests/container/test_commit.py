"""A commit that is killed at any of its system calls: the target is absent, old or new, and the next run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "kill_commits.py"


SLOW = pytest.mark.slow
SCENARIOS = ["file", "file --force", "other shards --force", "shards --force", "hf --force"]
OTHERS = [(scenario, True) for scenario in ("shards", "hf")] + [
    (scenario, False) for scenario in (*SCENARIOS, "shards", "hf")
]


@pytest.mark.parametrize(
    ("scenario", "renameat2"),
    [*((scenario, True) for scenario in SCENARIOS), *(pytest.param(*case, marks=SLOW) for case in OTHERS)],
)
def test_a_commit_killed_at_any_system_call_leaves_the_old_or_new_target(
    tmp_path: Path, scenario: str, renameat2: bool
) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), scenario, str(int(renameat2))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 10
