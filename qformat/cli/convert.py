"""``qformat convert``."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat.cli.common import (
    OUTPUT,
    SOURCE,
    Command,
    echo_json,
    echo_table,
    human_bytes,
    human_count,
    jobs_option,
    natural_key,
    parse_size,
    plural,
    progress_bar,
    warn,
)
from qformat.cli.source import source_options
from qformat.converters import DEFAULT_TYPE
from qformat.converters.sources.options import SourceOptions
from qformat.converters.wording import and_more
from qformat.errors import printable

if TYPE_CHECKING:
    from qformat.converters.convert import Conversion
    from qformat.converters.prune import Pruned


@click.command(cls=Command)
@click.argument("src", type=SOURCE)
@click.argument("dst", type=OUTPUT)
@click.option(
    "-t",
    "--type",
    "type_",
    default=None,
    metavar="TYPE",
    help="Type of floating-point tensors of two or more dimensions.  "
    f"[default: {DEFAULT_TYPE}; a quantized checkpoint keeps its codes]",
)
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="GLOB=TYPE",
    help="Type of floating-point tensors of any shape whose name matches; may be repeated, the last match wins.",
)
@source_options("Quality at which layered tensors of a .qf file SRC are read")
@click.option(
    "--prune",
    type=float,
    default=0.0,
    metavar="SPARSITY",
    help="First set this share of the weights, the smallest ones, of each tensor of two or more dimensions to zero.",
)
@click.option(
    "--prune-tensor",
    "prune_overrides",
    multiple=True,
    metavar="GLOB=SPARSITY",
    help="The same for tensors whose name matches; 0 prunes nothing. May be repeated, the last match wins.",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    callback=parse_size,
    help="Split tensors that exceed this size, such as 5GB, into several files; DST becomes the head that lists them.",
)
@click.option(
    "--engine",
    type=click.Choice(["threads", "dask"]),
    default="threads",
    show_default=True,
    help="Threads, or processes of a Dask cluster: --jobs local ones, or those of --scheduler.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a Dask cluster, tcp://HOST:PORT. Its workers need SRC and the directory of DST at the same paths.",
)
@click.option(
    "--allow-nonfinite", is_flag=True, help="Store tensors with NaN or infinity unquantized instead of refusing them."
)
@click.option(
    "--allow-zeroed", is_flag=True, help="Accept that blocks too small for the scale of their type become zero."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted run of the same command, and keep finished tensors if this run fails.",
)
@click.option("-f", "--force", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Write nothing; print what would be written and its exact size. Values are read only with --allow-nonfinite and for "
    "entropy-coded types, whose size depends on them.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@jobs_option
def command(src: Path, dst: Path, *, verbose: bool, as_json: bool, **settings: Any) -> None:
    """Convert the checkpoint SRC to the file DST.

    SRC is a Hugging Face directory (safetensors or pytorch_model.bin, sharded or not), a Meta directory (params.json and
    consolidated.*.pth, which are joined under Meta's names), or one file: safetensors, torch (.pth, .pt, .bin, .ckpt),
    CTranslate2, GGUF or .qf, recognized by its content, or the index of shards. It may be a URL. From a directory, the other files
    are stored in DST as well, up to 64 MiB each; weights that are not taken, large files, and links that lead out of it are named.
    DST appears only when it is complete.

    From a torch checkpoint, the state dict with the most weights is read; --state-dict-key selects another one. Small values
    beside it are stored in DST as checkpoint.json where JSON can represent them. Code in a pickle is never run.

    TYPE is a type such as bf16, q4_0, nlm, scm or lossless, with parameters as in q4_0:search=exact; qformat types lists them all.
    One-dimensional tensors are stored unchanged unless --tensor-type matches them, integers always.

    --prune 0.5 sets the half of each tensor that is nearest to zero to zero, ties included. It skips embeddings and output heads,
    recognized by names such as *embed*, *wte.weight, *lm_head*, head.weight and *classifier*; --prune-tensor '*lm_head*=0.3'
    prunes them all the same. Errors are then measured against the pruned weights. q4_1, q5_1, nlm and some codebooks of lut have
    no level at zero and decode pruned weights to small values.
    """
    from qformat.converters.prune import Pruned

    result = _convert(src, dst, **settings)
    pruned = {plan.source.name: plan.source for plan in result.plans if isinstance(plan.source, Pruned)}
    for plan in result.plans:
        if plan.note:
            warn(plan.note)
    _tell_of_kept(result)
    if result.nonfinite:
        names = result.nonfinite
        warn(
            f"copied codes that decode to NaN or infinity: tensor {names[0]!r}{and_more(names)}; make sure that it is not damaged"
        )
    _warn_of_nothing_left(pruned.values())
    if result.orphaned_shards:
        warn(
            f"{plural(len(result.orphaned_shards), 'shard')} of the replaced {dst} left in place: "
            f"{result.orphaned_shards[0]}{and_more(result.orphaned_shards)}; another head needs them, or they were changed"
        )
    if as_json:
        more = {"dry_run": result.is_dry_run, "pruned_tensors": len(pruned), "pruned_weights": _zeros(pruned.values())}
        echo_json(result.to_json() | more)
        return
    if verbose:
        _echo_tensors(result, pruned)
    _warn_of_growth(result)
    _echo_summary(result, pruned.values())


def _convert(
    src: Path,
    dst: Path,
    type_: str | None,
    overrides: tuple[str, ...],
    options: SourceOptions,
    prune: float,
    prune_overrides: tuple[str, ...],
    shard_size: int | None,
    engine: str,
    scheduler: str | None,
    allow_nonfinite: bool,
    allow_zeroed: bool,
    resume: bool,
    force: bool,
    dry_run: bool,
    jobs: int | None,
) -> Conversion:
    from qformat.converters.convert import convert
    from qformat.converters.output import WriteOptions
    from qformat.converters.request import Request
    from qformat.converters.runners import DaskRunner, ThreadRunner
    from qformat.files import is_remote

    if scheduler and engine != "dask":
        raise click.UsageError("--scheduler is for --engine dask")
    source = str(src if is_remote(src) else src.absolute())
    request = Request(source, options, type_, overrides, prune, prune_overrides, allow_nonfinite)
    checkpoint, recipe = request.open()
    for warning in checkpoint.warnings:
        warn(warning)
    total = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors)
    with progress_bar(f"converting {src.name}", 0 if dry_run else total) as advance:
        how = WriteOptions(force, resume, dry_run, shard_size, jobs, allow_nonfinite, allow_zeroed, advance)
        runner = DaskRunner(request, scheduler, jobs) if engine == "dask" else ThreadRunner()
        return convert(checkpoint, dst, recipe, how, runner=runner)


def _zeros(pruned: Collection[Pruned]) -> int | None:
    """Return the number of zeros; None in a dry run, and if an earlier run finished a tensor: then they are unknown."""
    if any(tensor.zeros is None for tensor in pruned):
        return None
    return sum(tensor.zeros or 0 for tensor in pruned)


def _echo_summary(result: Conversion, pruned: Collection[Pruned]) -> None:
    dst, dry_run = result.output, result.is_dry_run
    click.echo(f"{dst} {'would be' if dry_run else 'is'} {human_bytes(result.nbytes)} ({result.nbytes} bytes)")
    click.echo(
        f"{plural(len(result.plans), 'tensor')}, {human_count(result.params)} weights, {human_bytes(result.source_bytes)} -> "
        f"{result.bpw:.3f} bits/weight; {plural(len(result.assets), 'other file')}"
        + ("" if dry_run else f"; in {result.seconds:.1f} s")
    )
    if result.removed_shards:
        click.echo(f"{plural(len(result.removed_shards), 'shard')} of the replaced {dst} removed")
    if result.shards:
        click.echo(f"in {len(result.shards)} shards, {result.shards[0].name} and so on, and their head {dst.name}")
    if result.resumed:
        click.echo(f"{result.resumed} of {len(result.plans)} tensors were finished by an earlier run")
    if pruned:
        total = sum(tensor.elements for tensor in pruned)
        zeros = _zeros(pruned)
        count = f"at least {human_count(sum(t.rank for t in pruned))}" if zeros is None else human_count(zeros)
        click.echo(
            f"{count} of {human_count(total)} weights in {len(pruned)} tensors {'would be' if dry_run else 'are'} pruned"
        )
    if result.root:
        click.echo(f"root sha256 {result.root}")


def _tell_of_kept(result: Conversion) -> None:
    """Say which tensors stay as they are though there is a type for all: in one line, with the first of each reason."""
    kept: dict[str, list[str]] = {}
    for plan in result.plans:
        if plan.kept_because:
            kept.setdefault(plan.kept_because, []).append(plan.source.name)
    if kept:
        texts = [f"{names[0]!r}{and_more(names)} ({because})" for because, names in kept.items()]
        warn(f"kept as in the source, unless --tensor-type names it: tensor {', '.join(texts)}")


def _warn_of_growth(result: Conversion) -> None:
    grown = [
        plan.source.name
        for plan, record in zip(result.plans, result.records, strict=True)
        if record.nbytes > plan.source.nbytes
    ]
    if grown:
        warn(f"larger than in the source: tensor {grown[0]!r}{and_more(grown)}")


def _warn_of_nothing_left(pruned: Iterable[Pruned]) -> None:
    empty = [tensor.name for tensor in pruned if tensor.zeros == tensor.elements]
    if empty:
        keep = shlex.quote(f"{glob.escape(empty[0])}=0")
        warn(
            f"all weights pruned, because they are equal: tensor {empty[0]!r}{and_more(empty)}; keep it with --prune-tensor {keep}"
        )


def _echo_tensors(result: Conversion, pruned: Mapping[str, Pruned]) -> None:
    records = {record.name: record for record in result.records}
    rows = []
    for plan in sorted(result.plans, key=lambda plan: natural_key(plan.source.name)):
        record = records[plan.source.name]
        rows.append(
            (
                plan.source.name,
                "x".join(map(str, plan.source.shape)) or "scalar",
                f"{plan.source.dtype.name} -> {plan.encoder}",
                human_bytes(plan.source.nbytes),
                human_bytes(record.nbytes),
                f"{record.error.rmse:.3e}" if record.error else "",
                *([_share(pruned.get(plan.source.name))] if pruned else []),
            )
        )
    head = ("tensor", "shape", "type", "before", "after", "rmse", *(["pruned"] if pruned else []))
    echo_table(head, rows, left=3)
    for name, size in result.assets.items():
        click.echo(f"file {printable(name)} ({human_bytes(size)})")


def _share(tensor: Pruned | None) -> str:
    """Return the share of zeros; as long as the values have not been read, the requested share."""
    if tensor is None:
        return ""
    return f"{(tensor.rank if tensor.zeros is None else tensor.zeros) / tensor.elements:.1%}"
