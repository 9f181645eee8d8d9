"""``qformat truncate``."""

from __future__ import annotations

from pathlib import Path

import click

from qformat.cli.common import OUTPUT, PATH, Command, echo_json, human_bytes, quality_option, root_option
from qformat.quality import Quality


@click.command(cls=Command)
@click.argument("src", type=PATH)
@click.argument("dst", type=OUTPUT)
@quality_option("Quality that DST keeps", required=True)
@root_option
@click.option("-f", "--force", is_flag=True, help="Replace DST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(src: Path, dst: Path, quality: Quality, root: str | None, force: bool, as_json: bool) -> None:
    """Copy the .qf file SRC to DST with fewer layers of its layered tensors (type scm).

    Nothing is decoded or encoded again: DST is byte for byte the file that converting the original weights to these layers gives.
    qformat inspect shows the layers of a file.
    """
    from qformat.converters.truncate import truncate

    result = truncate(src, dst, quality, root=root, overwrite=force)
    if as_json:
        echo_json(
            {
                "output": str(dst),
                "bytes": result.after,
                "source_bytes": result.before,
                "bpw": result.bpw,
                "root_sha256": result.root,
            }
        )
        return
    click.echo(
        f"{dst} is {human_bytes(result.after)} ({result.after} bytes) of {human_bytes(result.before)}; "
        f"{result.bpw:.3f} bits/weight"
    )
    click.echo(f"root sha256 {result.root}")
