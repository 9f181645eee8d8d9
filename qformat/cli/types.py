"""``qformat types``."""

from __future__ import annotations

import inspect
from dataclasses import Field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from qformat.cli.common import Command, echo_json, echo_table

_SHAPE = (4096, 4096)  # the bits per weight hardly depend on it


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the weight types and their parameters; the first value of each parameter is its default.

    A type is written as ID or ID:KEY=VALUE,KEY=VALUE. The bits per weight are those of a 4096 x 4096 matrix with the default
    parameters. For entropy-coded types they depend on the weights: quantize-stats measures them.
    """
    from qformat.codecs.base import Codec
    from qformat.codecs.registry import parameters, types_for_weights

    types: list[dict[str, Any]] = []
    for name, encoder in sorted(types_for_weights().items()):
        hints = get_type_hints(encoder)
        default = encoder()
        bpw = None
        if isinstance(default, Codec) and default.has_fixed_size:
            bpw = default.nbytes(_SHAPE) * 8 / (_SHAPE[0] * _SHAPE[1])
        about = (inspect.getdoc(encoder) or "").partition("\n")[0]
        params = {f.name: _values(f, hints[f.name]) for f in parameters(encoder)}
        types.append({"type": name, "bpw": bpw, "about": about, "params": params})
    if as_json:
        echo_json({"types": types})
        return
    rows = []
    for entry in types:
        shown = [entry["about"], *(f"{key}={'|'.join(map(_shown, v))}" for key, v in entry["params"].items())]
        rows.append((entry["type"], "varies" if entry["bpw"] is None else f"{entry['bpw']:.3f}", shown[0]))
        rows += [("", "", f"  {more}") for more in shown[1:]]
    echo_table(("type", "bits/weight", "about, parameters"), rows, left=3)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(field: Field[Any], kind: Any) -> list[Any]:
    """Return the values of a parameter, the default first; N stands for any number."""
    if get_origin(kind) is Literal:
        allowed: list[Any] = list(get_args(kind))
    elif kind is bool:
        allowed = [True, False]
    else:
        allowed = ["N", *(word for part in get_args(kind) for word in get_args(part))]
    return [field.default, *(value for value in allowed if value != field.default)]
