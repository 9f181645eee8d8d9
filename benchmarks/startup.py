"""Processor time and imports of the quick commands."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks.context import Context
from benchmarks.report import Row, Section, below
from benchmarks.timing import QFORMAT, interleaved, run_process

_HEAVY = ("numpy", "numba", "torch")


def _imported(arguments: list[str]) -> set[str]:
    """Return the packages that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "qformat", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\|\s*(\S+)$", result.stderr, re.MULTILINE)}


def run(context: Context) -> Section:
    """Measure processor seconds, user and system."""
    file = str(context.minilm_container)
    commands = {"--help": ["--help"], "inspect": ["inspect", file], "verify": ["verify", file]}
    seconds = interleaved(
        {
            name: lambda arguments=arguments: run_process([QFORMAT, *arguments]).cpu
            for name, arguments in commands.items()
        }
        | {"python": lambda: run_process([sys.executable, "-c", "pass"]).cpu},
        context.rounds(7),
    )
    rows = [below(f"qformat {name}: processor time", seconds[name], 0.3, "s") for name in commands]
    rows.append(Row("python -c pass: processor time", f"{seconds['python']:.3f} s"))
    for name, arguments in commands.items():
        heavy = sorted(_imported(arguments).intersection(_HEAVY))
        text = ", ".join(heavy) or "none of them"
        rows.append(Row(f"qformat {name}: imports", text, target=f"none of {', '.join(_HEAVY)}", met=not heavy))
    return Section("Start-up: MiniLM as q4_0", rows)
