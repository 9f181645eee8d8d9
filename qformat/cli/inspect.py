"""``qformat inspect``."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from qformat.cli.common import PATH, echo_json, echo_table, human_bytes, human_count, natural_key, printable, warn
from qformat.container.layout import MAJOR, MINOR
from qformat.container.reader import ContainerReader
from qformat.records import TensorRecord, type_string


@click.command()
@click.argument("file", type=PATH)
@click.option("--tensor", "pattern", default="*", metavar="GLOB", help="Only tensors whose name matches.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, pattern: str, as_json: bool) -> None:
    """Show what is inside FILE: version, digest, assets, tensors with their types, sizes and errors.

    Reads the index only: use verify to check the bytes of the tensors.
    """
    with ContainerReader(file) as container:
        if container.outdated:
            warn(
                f"{file} was made by an older writer (1.{container.trailer.minor}, now 1.{MINOR}): convert again for better types"
            )
        tensors = [tensor for tensor in container.index.tensors if fnmatchcase(tensor.name, pattern)]
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
        if not tensors and pattern != "*":
            raise click.ClickException(f"{file}: holds no tensor that matches {pattern!r}")
        summary = _summary(container, tensors)
    if as_json:
        echo_json(summary)
    else:
        _echo(file, summary)


def _summary(container: ContainerReader, tensors: list[TensorRecord]) -> dict[str, Any]:
    params = sum(tensor.elements for tensor in tensors)
    stored = sum(tensor.nbytes for tensor in tensors)
    return {
        "format": {"major": MAJOR, "minor": container.trailer.minor},
        "root_sha256": container.root,
        "file_bytes": container.file_size,
        "metadata": dict(container.index.metadata),
        "assets": {asset.name: asset.size for asset in container.index.assets},
        "tensors": [_tensor(tensor) for tensor in tensors],
        "total": {"params": params, "bytes": stored, "bpw": _bpw(stored, params)},
    }


def _bpw(stored: int, params: int) -> float:
    return stored * 8 / params if params else 0.0


def _tensor(tensor: TensorRecord) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "type": type_string(tensor.codec, tensor.params),
        "encoder": dict(tensor.encoder),
        "bytes": tensor.nbytes,
        "bpw": _bpw(tensor.nbytes, tensor.elements),
        "rmse": tensor.error.rmse if tensor.error else 0.0,
        "maxerr": tensor.error.maximum if tensor.error else 0.0,
    }


def _echo(file: Path, summary: dict[str, Any]) -> None:
    version = summary["format"]
    click.echo(f"{file}: qformat {version['major']}.{version['minor']}, {human_bytes(summary['file_bytes'])}")
    click.echo(f"root sha256 {summary['root_sha256']}")
    for key, value in summary["metadata"].items():
        click.echo(f"metadata {printable(key)}: {printable(value)}")
    if summary["assets"]:
        click.echo(
            "assets "
            + ", ".join(f"{printable(name)} ({human_bytes(size)})" for name, size in summary["assets"].items())
        )
    rows = [
        (
            tensor["name"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            tensor["dtype"],
            tensor["type"],
            human_bytes(tensor["bytes"]),
            f"{tensor['bpw']:.3f}",
            f"{tensor['rmse']:.3e}" if tensor["rmse"] else "0",
            f"{tensor['maxerr']:.3e}" if tensor["maxerr"] else "0",
            ",".join(f"{key}={value}" for key, value in sorted(tensor["encoder"].items())),
        )
        for tensor in summary["tensors"]
    ]
    echo_table(("tensor", "shape", "dtype", "type", "size", "bpw", "rmse", "maxerr", "encoder"), rows, left=4)
    total = summary["total"]
    size = human_bytes(total["bytes"])
    click.echo(f"{len(rows)} tensors, {human_count(total['params'])} weights, {size}, {total['bpw']:.3f} bits/weight")
