"""``qformat quantize-stats``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat.cli.common import (
    SOURCE,
    Command,
    echo_json,
    echo_table,
    jobs_option,
    natural_key,
    progress_bar,
    warn,
)
from qformat.cli.source import source_options
from qformat.converters.sources.options import SourceOptions
from qformat.errors import printable

if TYPE_CHECKING:
    from qformat.pipeline.measure import ErrorStats


def _regexes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(value) for value in values]
    except re.error as error:
        raise click.BadParameter(f"not a regular expression: {error}", ctx, param) from None


def _json_target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "-":
        if value.startswith("-"):
            raise click.BadParameter(f"needs a FILE, or - for stdout, before {value}", ctx, param)
        if not _is_stream(value):
            from qformat.container.workspace import finish_interrupted

            finish_interrupted(Path(value))
            if Path(value).is_file():
                raise click.BadParameter(f"{value} exists already; remove it first", ctx, param)
        if not Path(value).parent.is_dir():
            raise click.BadParameter(f"the directory {Path(value).parent} does not exist", ctx, param)
    return value


def _is_stream(file: str) -> bool:
    """Return whether a path names an open stream or a device: it is written to, whatever stands behind it."""
    parts = Path(os.path.normpath(file)).parts
    return Path(file).is_absolute() and parts[1] in ("dev", "proc") and parts[2:3] != ("shm",)  # a folder in memory


@click.command(cls=Command)
@click.argument("src", type=SOURCE)
@click.option(
    "-t",
    "--type",
    "types",
    multiple=True,
    default=["q4_0"],
    show_default=True,
    metavar="TYPE",
    help="Type to measure; may be repeated. qformat types lists them.",
)
@source_options("Quality at which layered tensors of a .qf file SRC are read; errors are relative to that")
@click.option(
    "--include",
    multiple=True,
    callback=_regexes,
    metavar="REGEX",
    help="Measure only tensors whose name contains a match of this regular expression; may be repeated.",
)
@click.option(
    "--exclude",
    multiple=True,
    callback=_regexes,
    metavar="REGEX",
    help="Skip tensors whose name contains a match.",
)
@click.option("--per-tensor", is_flag=True, help="Print a line for each tensor.")
@click.option("--per-layer", is_flag=True, hidden=True)  # the name up to 0.5
@click.option(
    "--histogram",
    is_flag=True,
    help="Print the share of each code, and for nlm of each mapping, the linear one first.",
)
@click.option(
    "--json",
    "json_file",
    callback=_json_target,
    metavar="FILE",
    help="Write JSON to a new FILE; - prints it instead of the lines.",
)
@jobs_option
def command(
    src: Path,
    types: tuple[str, ...],
    options: SourceOptions,
    include: list[re.Pattern[str]],
    exclude: list[re.Pattern[str]],
    per_tensor: bool,
    per_layer: bool,
    histogram: bool,
    json_file: str | None,
    jobs: int | None,
) -> None:
    """Measure size and error of the checkpoint SRC in each TYPE, without converting it.

    Floating-point tensors of two or more dimensions are measured. Errors are differences to the tensors of SRC: 95pct and median
    are bounds on 95 % and on half of the absolute errors; rel_rmse is the rmse divided by the standard deviation of the weights.
    For entropy-coded types, entropy is the size that an ideal entropy coder would reach in bits per weight, without the scales.
    """
    from qformat.codecs.registry import parse_type
    from qformat.converters.sources.container import lossy_warning
    from qformat.converters.sources.detect import open_checkpoint
    from qformat.pipeline.measure import collect, measure

    codecs = [parse_type(text) for text in dict.fromkeys(types)]
    checkpoint = open_checkpoint(src, options)
    for warning in (*checkpoint.warnings, *lossy_warning(checkpoint.tensors)):
        warn(warning)
    tensors = [
        tensor
        for tensor in sorted(checkpoint.tensors, key=lambda tensor: natural_key(tensor.name))
        if tensor.dtype.floating
        and not tensor.fixed_because
        and len(tensor.shape) >= 2
        and (not include or any(pattern.search(tensor.name) for pattern in include))
        and not any(pattern.search(tensor.name) for pattern in exclude)
    ]
    if not tensors:
        raise click.ClickException(f"{src}: no floating-point tensor of two or more dimensions is left to measure")
    work = sum(math.prod(tensor.shape) for tensor in tensors) * len(codecs)
    with progress_bar(f"measuring {src.name}", work) as advance:
        results, sums = collect(measure(tensors, codecs, jobs=jobs, progress=advance))
    if json_file is not None:
        _write_json(json_file, results, sums)
    for stats in results:
        if stats.zeroed:
            warn(
                f"{stats.tensor}: {stats.zeroed} blocks would become zero as {stats.type}; convert refuses that by default"
            )
    if json_file != "-":
        for stats in [*(results if per_tensor or per_layer else []), *sums]:
            click.echo(printable(stats.line()))
            if histogram:
                for line in _histograms(stats):
                    click.echo(line)
        if len(sums) > 1:
            _echo_sums(sums)


def _echo_sums(sums: list[ErrorStats]) -> None:
    coded = any(total.entropy_bpw is not None for total in sums)
    rows = [
        (
            total.type,
            f"{total.bpw:.3f}",
            *(["" if total.entropy_bpw is None else f"{total.entropy_bpw:.3f}"] if coded else []),
            f"{total.rel_rmse:.3e}",
            f"{total.rmse:.3e}",
            f"{total.largest:.3e}",
        )
        for total in sums
    ]
    echo_table(("type", "bits/weight", *(["entropy"] if coded else []), "rel_rmse", "rmse", "maxerr"), rows, left=1)


def _histograms(stats: ErrorStats) -> Iterator[str]:
    if not stats.histograms:
        yield f"hist: not counted for {stats.type}"
    for name, counts in stats.histograms.items():
        label = "hist" if name == "histogram" else name
        yield f"{label}: " + " ".join(f"{share:.3f}" for share in counts / max(1, counts.sum()))


def _write_json(file: str, results: list[ErrorStats], sums: list[ErrorStats]) -> None:
    def of_tensor(stats: ErrorStats) -> dict[str, Any]:
        return {"tensor": stats.tensor, "shape": list(stats.shape), "params": stats.params} | stats.to_json()

    value = {
        "results": [of_tensor(stats) for stats in results],
        "totals": [{"params": stats.params} | stats.to_json() for stats in sums],
    }
    if file == "-":
        echo_json(value)
    elif _is_stream(file) or Path(file).is_fifo():
        with Path(file).open("a") as stream:
            stream.write(json.dumps(value, indent=1) + "\n")
    else:
        from qformat.container.workspace import write_bytes

        write_bytes(Path(file), (json.dumps(value, indent=1) + "\n").encode())
