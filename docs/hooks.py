"""Fills in the parts of the pages that the program itself knows best: usage texts and the table of types."""

from __future__ import annotations

import re
from typing import Any

from click.testing import CliRunner

from qformat.cli import cli

_MARK = re.compile(r"<!-- qformat (.+?) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each ``<!-- qformat ARGUMENTS -->`` by the output of that command line."""
    return _MARK.sub(lambda match: f"```text\n{_output(match[1].split())}\n```", markdown)


def _output(args: list[str]) -> str:
    result = CliRunner().invoke(cli, args, prog_name="qformat", terminal_width=80)
    if result.exit_code:
        raise RuntimeError(f"qformat {' '.join(args)}: {result.output}")
    return result.stdout.rstrip()
