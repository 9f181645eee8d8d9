"""``qformat inspect``."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from qformat.cli.common import (
    PATH,
    Command,
    echo_json,
    echo_table,
    human_bytes,
    human_count,
    natural_key,
    plural,
    warn,
)
from qformat.container.layout import MAJOR, MINOR
from qformat.container.reader import ContainerReader
from qformat.errors import printable
from qformat.quality import Metric, Quality, relative
from qformat.records import Layer, TensorRecord, type_string

_STEPS, _FINE = 4, 6  # the ladder has quarter-bit steps up to 6 bits, whole bits above


@click.command(cls=Command)
@click.argument("file", type=PATH)
@click.option(
    "--tensor", "patterns", multiple=True, metavar="GLOB", help="Show only tensors whose name matches; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, patterns: tuple[str, ...], as_json: bool) -> None:
    """Show the contents of FILE: format version, root digest, assets, and tensors with their types, sizes and errors.

    Reads only the index; qformat verify checks the bytes of the tensors.
    """
    with ContainerReader(file) as container:
        if container.outdated:
            warn(
                f"{file} was written as format 1.{container.trailer.minor}, now 1.{MINOR}: convert again for better results"
            )
        tensors = [tensor for tensor in container.tensors if _is_shown(tensor.name, patterns)]
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
        for pattern in patterns:
            if not any(fnmatchcase(tensor.name, pattern) for tensor in tensors):
                raise click.ClickException(f"{file}: holds no tensor that matches {pattern!r}")
        summary = _summary(container, tensors)
    if as_json:
        echo_json(summary)
    else:
        _echo(file, summary)


def _is_shown(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _summary(container: ContainerReader, tensors: list[TensorRecord]) -> dict[str, Any]:
    params = sum(tensor.elements for tensor in tensors)
    stored = sum(tensor.nbytes for tensor in tensors)
    return {
        "format": {"major": MAJOR, "minor": container.trailer.minor},
        "root_sha256": container.root,
        "file_bytes": container.total_size,
        "shards": {shard.name: shard.nbytes for shard in container.index.shards},
        "metadata": dict(container.index.metadata),
        "assets": {asset.name: asset.size for asset in container.index.assets},
        "tensors": [_tensor(tensor) for tensor in tensors],
        "total": {"params": params, "bytes": stored, "bpw": _bpw(stored, params)},
        "ladder": _ladder(tensors),
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
    } | ({"range": tensor.range, "layers": [_layer(layer) for layer in tensor.layers]} if tensor.layers else {})


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "bytes": layer.nbytes,
        "bpw": layer.bpw,
        "rmse": layer.error.rmse,
        "maxerr": layer.error.maximum,
        "mean_abs": layer.error.mean,
    }


def _ladder(tensors: list[TensorRecord]) -> list[dict[str, Any]]:
    """Return size and error of reading the file at each quality that makes a difference; sizes include unlayered tensors."""
    layered = [tensor for tensor in tensors if tensor.layers and tensor.elements]
    lossy = [layer.bpw for tensor in layered for layer in tensor.layers if layer.error.rmse]
    steps = sorted(
        {math.ceil(bpw * _STEPS) / _STEPS for bpw in lossy if bpw <= _FINE} | {math.ceil(bpw) for bpw in lossy}
    )
    ladder = [_step(f"{bits:g}", Quality(bits=bits), tensors, layered) for bits in steps]
    if layered and all(tensor.error is None for tensor in layered):
        ladder.append(_step("lossless", Quality(lossless=True), tensors, layered))
    return [step for step, before in zip(ladder, [None, *ladder], strict=False) if not _same(step, before)]


def _same(step: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return other is not None and step["bytes"] == other["bytes"]


def _step(name: str, quality: Quality, tensors: list[TensorRecord], layered: list[TensorRecord]) -> dict[str, Any]:
    reached = [quality.of(tensor) for tensor in layered]
    weights = sum(tensor.elements for tensor in layered)
    stored = sum(tensor.nbytes for tensor in reached)
    last = [(tensor.layers[-1], tensor) for tensor in reached if tensor.range]  # a range of 0 has no relative error
    compared = max(1, sum(tensor.elements for _, tensor in last))

    def average(metric: Metric) -> float:
        return sum(tensor.elements * relative(layer, tensor, metric) for layer, tensor in last) / compared

    return {
        "quality": name,
        "bytes": sum(quality.of(tensor).nbytes for tensor in tensors),
        "bpw": 8 * stored / weights,
        "rmse": average("max_rmse"),
        "mean_abs": average("mean_abs"),
        "maxerr": max((relative(layer, tensor, "max_abs") for layer, tensor in last), default=0.0),
    }


def _echo(file: Path, summary: dict[str, Any]) -> None:
    version = summary["format"]
    click.echo(
        f"{printable(str(file))}: qformat {version['major']}.{version['minor']}, {human_bytes(summary['file_bytes'])}"
    )
    click.echo(f"root sha256 {summary['root_sha256']}")
    for name, size in summary["shards"].items():
        click.echo(f"shard {printable(name)} ({human_bytes(size)})")
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
    click.echo(
        f"{plural(len(rows), 'tensor')}, {human_count(total['params'])} weights, {size}, {total['bpw']:.3f} bits/weight"
    )
    if summary["ladder"]:
        _echo_ladder(summary["ladder"])


def _echo_ladder(ladder: list[dict[str, Any]]) -> None:
    click.echo(
        "size and error by quality; errors are relative to the range of each tensor, averaged over all weights (maxerr: largest)"
    )
    rows = [
        (
            step["quality"],
            f"{step['bpw']:.3f}",
            human_bytes(step["bytes"]),
            *(f"{step[name]:.3e}" if step[name] else "0" for name in ("rmse", "mean_abs", "maxerr")),
        )
        for step in ladder
    ]
    echo_table(("quality", "bits/weight", "to read", "rmse", "mean_abs", "maxerr"), rows, left=1)
