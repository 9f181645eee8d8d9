"""Shared by the commands: options, formatting of numbers and tables, progress bars."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qformat.errors import QualityError, printable
from qformat.quality import Quality

if TYPE_CHECKING:
    _PathType = click.ParamType[Path]
else:
    _PathType = click.ParamType  # takes no parameters before click 8.4

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: a path; the library checks it and reports the better messages
PATH = click.Path(path_type=Path)


class Command(click.Command):
    """A command that refuses an option given twice, where only one value can count."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param, count in Counter(given).items():
            if isinstance(param, click.Option) and count > 1 and not (param.multiple or param.is_flag):
                raise click.UsageError(f"{max(param.opts, key=len)} is given {count} times; give it once", ctx)
        return super().parse_args(ctx, args)


# File names of other formats, with what makes such a file
_OTHER_FORMATS = {
    ".gguf": "qformat export --to gguf",
    ".safetensors": "qformat export --to safetensors",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".zip"), ""),
}


class _Output(_PathType):
    """The path of a container file to write."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, which is not that of a stream, nor named like a file of another format."""
        path = Path(value)
        if os.fspath(value) == "-":
            self.fail("files cannot be written to stdout; give a name (./- for a file called -)", param, ctx)
        suffix = path.suffix.lower()
        if suffix in _OTHER_FORMATS:
            way = f"; {_OTHER_FORMATS[suffix]} makes {suffix} files of .qf files" if _OTHER_FORMATS[suffix] else ""
            self.fail(f"{path} would be a .qf file; name it {path.with_suffix('.qf').name}{way}", param, ctx)
        return path


OUTPUT = _Output()


class _Source(_PathType):
    """A checkpoint: a path or a URL supported by fsspec."""

    name = "path or URL"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        del param, ctx
        from qformat.files import source_path

        return source_path(value) if isinstance(value, str) else value


SOURCE = _Source()


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, which takes an s unless the count is 1."""
    return f"{count} {noun}{'s' * (count != 1)}"


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the number of bytes of an option such as 5GB."""
    from qformat.converters.split import parse_size as parse

    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


jobs_option = click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    help="Number of threads; the output does not depend on it.  [default: one per processor]",
)


root_option = click.option(
    "--root",
    metavar="SHA256",
    help="Refuse SRC unless it is the .qf file with this root, which inspect shows; that of a head covers its shards.",
)


def _parse_quality(ctx: click.Context, param: click.Parameter, value: str | None) -> Quality:
    try:
        return Quality.parse(value)
    except QualityError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def quality_option(purpose: str, *, required: bool = False) -> Callable[[_Command], _Command]:
    """Return the --quality option: how much of the layered tensors to read."""
    return click.option(
        "-q",
        "--quality",
        callback=_parse_quality,
        required=required,
        metavar="QUALITY",
        help=f"{purpose}: bits per weight such as 3.5; a bound on an error relative to the range of the tensor, such as "
        "max_rmse=0.01, max_abs=0.05 or mean_abs=0.01; or lossless.",
    )


def echo_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, allow_nan=False))


def warn(message: str) -> None:
    """Print a warning on stderr."""
    click.echo(f"Warning: {printable(message)}", err=True)


def human_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """Return a number with a suffix for thousands, millions and so on."""
    for suffix in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if suffix == "" else f"{count:.1f}{suffix}"
        count /= 1000
    return f"{count:.2f}B"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts ``layers.2`` before ``layers.10``."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"([0-9]+)", name)]


def echo_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Print a table: the first `left` columns aligned to the left, the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@contextmanager
def progress_bar(description: str, total: int, *, as_bytes: bool = False) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar on stderr if that is a terminal; the callback receives the amount just processed."""
    if not sys.stderr.isatty() or total == 0:
        with _notices(partial(click.echo, err=True), logging.WARNING):
            yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    size = [DownloadColumn()] if as_bytes else []
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *size,
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:  # noqa: SIM117  the bar comes first
        with _notices(partial(progress.console.print, markup=False, highlight=False, soft_wrap=True), logging.INFO):
            task = progress.add_task(description, total=total)
            yield lambda amount: progress.advance(task, amount)


@contextmanager
def _notices(show: Callable[[str], None], level: int) -> Iterator[None]:
    """Show log messages of the library of a level and above."""
    logger, handler = logging.getLogger("qformat"), _Notices(show, level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notices(logging.Handler):
    """Shows log messages, above the progress bar if there is one."""

    def __init__(self, show: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(("Warning: " if record.levelno >= logging.WARNING else "") + printable(self.format(record)))
