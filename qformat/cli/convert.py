"""``qformat convert``."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.common import (
    PATH,
    SOURCE,
    echo_json,
    echo_table,
    human_bytes,
    human_count,
    jobs_option,
    natural_key,
    parse_size,
    plural,
    printable,
    progress_bar,
    warn,
)
from qformat.cli.source import source_options
from qformat.converters import DEFAULT_TYPE
from qformat.converters.sources.options import SourceOptions

if TYPE_CHECKING:
    from qformat.converters.convert import Conversion
    from qformat.converters.prune import Pruned


@click.command()
@click.argument("src", type=SOURCE)
@click.argument("dst", type=PATH)
@click.option(
    "-t",
    "--type",
    "type_",
    default=None,
    metavar="TYPE",
    help=f"For tensors of two or more dimensions: {DEFAULT_TYPE} unless given, or if the checkpoint is quantized already, as they "
    "are.",
)
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="GLOB=TYPE",
    help="For floating tensors of any shape whose name matches; may be repeated, the last match wins.",
)
@source_options("Of layered tensors of a .qf file SRC, read no more than this needs")
@click.option(
    "--prune",
    type=float,
    default=0.0,
    metavar="SPARSITY",
    help="First set this share of the weights of each tensor of two or more dimensions, the smallest ones, to zero.",
)
@click.option(
    "--prune-tensor",
    "prune_overrides",
    multiple=True,
    metavar="GLOB=SPARSITY",
    help="The same for tensors whose name matches, 0 for none; may be repeated, the last match wins.",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    callback=parse_size,
    help="If the tensors take more than this, 5GB say, put them into several files: DST becomes the head that names them.",
)
@click.option(
    "--engine",
    type=click.Choice(["threads", "dask"]),
    default="threads",
    show_default=True,
    help="Threads, or processes of a Dask cluster; --jobs of them are started here unless --scheduler is given.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Of a Dask cluster, tcp://HOST:PORT, whose workers see SRC and the folder of DST under the same paths.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Keep tensors that hold NaN or infinity raw.")
@click.option("--allow-zeroed", is_flag=True, help="Let blocks too small for the type's scale become zero.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where an earlier run of the same command was when it was killed, and leave what is done if this one fails.",
)
@click.option("-f", "--force", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Write nothing; say what would be written, and its exact size. Reads values only if --allow-nonfinite is given or a type "
    "is entropy-coded, so that its size depends on them.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@jobs_option
def command(
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
    verbose: bool,
    as_json: bool,
    jobs: int | None,
) -> None:
    """Turn the checkpoint SRC into the file DST.

    SRC is a directory as Hugging Face lays it out (safetensors or pytorch_model.bin, sharded or not) or Meta (params.json and
    consolidated.*.pth, joined under Meta's names), or one file: safetensors, torch (.pth, .pt, .bin, .ckpt), GGUF or .qf, by its
    content. Of a directory, the files that belong to the model (*.json, *.txt, *.model, *.jinja, *.py, licences, README.md,
    config.json of folders) go into DST too. Nothing stands at DST before it is complete.

    Of a torch checkpoint the state dict with the most weights is taken, and --state-dict-key chooses another; what is beside it
    goes into DST as checkpoint.json as far as it is small and JSON can hold it. Nothing that a pickle asks for is ever run.

    TYPE is f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, nlm, affine, lut, ternary, levels, scm or lossless, with parameters as in
    q4_0:search=exact; qformat types lists them. One-dimensional tensors stay as they are unless --tensor-type names them; integers
    always do.

    --prune 0.5 makes zeros of the half of each tensor that is nearest to zero, and of what is as large as the last of it. It leaves
    out embeddings and output heads, which it knows by names such as *embed*, *wte.weight, *lm_head*, head.weight and *classifier*;
    --prune-tensor '*lm_head*=0.3' does not. Errors are then measured and recorded against the pruned weights. q4_1, q5_1, nlm and
    some codebooks of lut have no level at zero, and give small weights back instead.
    """
    from qformat.converters.convert import convert
    from qformat.converters.output import WriteOptions
    from qformat.converters.prune import Pruned
    from qformat.converters.request import Request
    from qformat.converters.runners import DaskRunner, ThreadRunner
    from qformat.files import is_remote

    if scheduler and engine != "dask":
        raise click.UsageError("--scheduler is for --engine dask")
    request = Request(
        str(src if is_remote(src) else src.absolute()),
        options,
        type_,
        overrides,
        prune,
        prune_overrides,
        allow_nonfinite=allow_nonfinite,
    )
    checkpoint, recipe = request.open()
    for warning in checkpoint.warnings:
        warn(warning)
    total = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors)
    with progress_bar(f"converting {src.name}", 0 if dry_run else total) as advance:
        how = WriteOptions(force, resume, dry_run, shard_size, jobs, allow_nonfinite, allow_zeroed, advance)
        runner = DaskRunner(request, scheduler, jobs) if engine == "dask" else ThreadRunner()
        result = convert(checkpoint, dst, recipe, how, runner=runner)
    for plan in result.plans:
        if plan.note:
            warn(plan.note)
    pruned = {plan.source.name: plan.source for plan in result.plans if isinstance(plan.source, Pruned)}
    # those of a dry run are, and those that an earlier run has read
    unknown = any(tensor.zeros is None for tensor in pruned.values())
    zeros = None if unknown else sum(tensor.zeros or 0 for tensor in pruned.values())
    _warn_of_nothing_left(pruned.values())
    if result.orphaned_shards:
        warn(
            f"{plural(len(result.orphaned_shards), 'file')} that the replaced {dst} named are not its shards, and stay: "
            f"{result.orphaned_shards[0]} and so on"
        )
    if as_json:
        echo_json(result.to_json() | {"dry_run": dry_run, "pruned_tensors": len(pruned), "pruned_weights": zeros})
        return
    if verbose:
        _echo_tensors(result, pruned)
    _warn_of_growth(result)
    click.echo(f"{dst} {'would have' if dry_run else 'has'} {human_bytes(result.nbytes)} ({result.nbytes} bytes)")
    click.echo(
        f"{plural(len(result.plans), 'tensor')}, {human_count(result.params)} weights, {human_bytes(result.source_bytes)} -> "
        f"{result.bpw:.3f} bits/weight; {plural(len(result.assets), 'other file')}"
        + ("" if dry_run else f"; in {result.seconds:.1f} s")
    )
    if result.shards:
        click.echo(f"in {len(result.shards)} shards, {result.shards[0].name} and so on, and their head {dst.name}")
    if result.resumed:
        click.echo(f"{result.resumed} of {len(result.plans)} tensors were there already")
    if pruned:
        total = sum(tensor.elements for tensor in pruned.values())
        least = sum(tensor.rank for tensor in pruned.values())
        count = f"at least {human_count(least)}" if zeros is None else human_count(zeros)
        click.echo(
            f"{count} of {human_count(total)} weights in {len(pruned)} tensors {'would be' if dry_run else 'are'} pruned"
        )
    if result.root:
        click.echo(f"root sha256 {result.root}")


def _warn_of_growth(result: Conversion) -> None:
    grown = [
        plan.source.name
        for plan, record in zip(result.plans, result.records, strict=True)
        if record.nbytes > plan.source_bytes
    ]
    if grown:
        more = f" and {len(grown) - 1} more" if len(grown) > 1 else ""
        warn(f"tensor {grown[0]!r}{more} will be larger than before")


def _warn_of_nothing_left(pruned: Iterable[Pruned]) -> None:
    empty = [tensor.name for tensor in pruned if tensor.zeros == tensor.elements]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        keep = shlex.quote(f"{glob.escape(empty[0])}=0")
        warn(f"tensor {empty[0]!r}{more} is all zero now, as its weights tie; keep it with --prune-tensor {keep}")


def _echo_tensors(result: Conversion, pruned: Mapping[str, Pruned]) -> None:
    records = {record.name: record for record in result.records}
    rows = []
    for plan in sorted(result.plans, key=lambda plan: natural_key(plan.source.name)):
        record = records[plan.source.name]
        rows.append(
            (
                plan.source.name,
                "x".join(map(str, plan.source.shape)) or "scalar",
                f"{plan.source.dtype.name} -> {plan.codec}",
                human_bytes(plan.source_bytes),
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
    """Return the share of zeros, or that which was asked for as long as the values were not read."""
    if tensor is None:
        return ""
    return f"{(tensor.rank if tensor.zeros is None else tensor.zeros) / tensor.elements:.1%}"
