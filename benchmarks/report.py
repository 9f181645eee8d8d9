"""Rows of results, as a table for the terminal and for Markdown."""

from __future__ import annotations

import os
import platform
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HEAD = ("what", "measured", "against", "ratio", "target", "met")
_PACKAGES = ("numpy", "numba", "gguf", "safetensors", "torch", "zstandard")


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes
    ----------
    name
        What was measured.
    measured, peer
        The figure and the one it is compared with, with units.
    ratio
        The first over the second.
    target
        The target; empty if the row is for information.
    met
        Whether the target is met; None without a target.
    digits
        Digits of the ratio after the point.
    """

    name: str
    measured: str
    peer: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    digits: int = 2

    def cells(self) -> tuple[str, ...]:
        """Return the row as strings."""
        ratio = "" if self.ratio is None else f"{self.ratio:.{self.digits}f}"
        return (self.name, self.measured, self.peer, ratio, self.target, _YES_NO[self.met])


_YES_NO = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True)
class Section:
    """The results of one benchmark."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def figure(value: float, unit: str) -> str:
    """Return a number with three significant digits, and its unit."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{text} {unit}"


def at_least(name: str, value: float, peer: float, unit: str, peer_name: str = "", target: float | None = None) -> Row:
    """Return a row of two rates; with a target, the ratio must reach it."""
    ratio = value / peer
    met = None if target is None else ratio >= target
    against = f"{peer_name} {figure(peer, unit)}".strip()
    return Row(name, figure(value, unit), against, ratio, "" if target is None else f">= {target:g} x", met)


def below(name: str, value: float, limit: float, unit: str) -> Row:
    """Return a row of one figure that must stay below a limit."""
    return Row(name, figure(value, unit), target=f"< {limit:g} {unit}", met=value < limit)


def machine() -> list[str]:
    """Return the properties of the machine that the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [
        f"processor: {_processor()}, {cores} cores usable, {memory / 1e9:.0f} GB of memory",
        f"system: {platform.system()} {platform.machine()}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}",
        f"packages: {packages}, qformat {version('qformat')}",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def as_text(section: Section) -> str:
    """Return a section for the terminal."""
    table = [HEAD, *(row.cells() for row in section.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    rule = "  ".join("-" * width for width in widths)
    notes = [f"  {note}" for note in section.notes]
    return "\n".join([section.title, rule, lines[0], rule, *lines[1:], *notes, ""])


def as_markdown(section: Section) -> str:
    """Return a section for RESULTS.md."""
    table = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in section.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    notes = [line for note in section.notes for line in ("", note)]
    return "\n".join([f"## {section.title}", "", *lines, *notes, ""])


def summary(sections: Iterable[Section]) -> str:
    """Return how many targets were met, and which were not."""
    judged = [row for section in sections for row in section.rows if row.met is not None]
    missed = [row.name for row in judged if not row.met]
    text = f"{len(judged) - len(missed)} of {len(judged)} targets met"
    return text + ("; not met: " + "; ".join(missed) if missed else "") + "."
