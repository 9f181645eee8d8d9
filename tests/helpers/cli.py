"""Running the command line, in this process and in others, and judging what it says and leaves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import click.testing

from qformat.cli import cli
from qformat.container.verify import verify
from tests.helpers.reference import reference

# before click 8.2, stderr is mixed into stdout otherwise
_APART: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(click.testing.CliRunner).parameters else {}


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command."""

    code: int
    out: str
    err: str


def cli_environment(**more: str) -> dict[str, str]:
    # numpy kernels give the same bytes and start four times as fast
    fixed = {"QFORMAT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"}
    return os.environ | fixed | more


def cli_start(*args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qformat", *map(os.fspath, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=cli_environment(**(env or {})), **(pipes | options))


def cli_finish(process: subprocess.Popen[bytes]) -> Result:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    out, err = out or b"", err or b""
    return Result(process.returncode, out.decode("utf-8", "surrogateescape"), err.decode("utf-8", "surrogateescape"))


def run_cli(*args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> Result:
    return cli_finish(cli_start(*args, env=env, **options))


def run_all(*commands: Sequence[str | Path], **options: Any) -> list[Result]:
    """Run command lines at the same time."""
    return [cli_finish(process) for process in [cli_start(*command, **options) for command in commands]]


def invoke(*args: object, code: int = 0) -> click.testing.Result:
    """Run a command in this process, where it must end with an exit status."""
    result = click.testing.CliRunner(**_APART).invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_line(stderr: str) -> str:
    """Return the one line with which a command fails."""
    lines = [line for line in stderr.splitlines() if line and not line.startswith(("Usage: ", "Try ", "Warning: "))]
    (line,) = lines
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def one_line(result: Result, code: int = 1) -> str:
    """Assert that a command failed in an orderly way; return its message."""
    assert "Traceback" not in result.out + result.err
    assert result.code == code, result
    return error_line(result.err)


def nothing_at(target: Path) -> None:
    assert not os.path.lexists(target)
    assert not os.path.lexists(f"{target}.partial")


def valid(path: Path) -> None:
    """Assert that both readers accept a file."""
    (report,) = verify([str(path)], jobs=1)
    assert report.ok, report
    reference.read(path.read_bytes())
