"""What an export says about quantization: nothing if all its tensors are plain numbers, else what the source said."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qformat.codecs.raw import Raw
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.meaning import needed_by_model
from qformat.converters.quantized.statements import HEADER, Statement, find, is_alone, may_state, without
from qformat.converters.quantized.unknown import Unknown
from qformat.converters.sources.container import ContainerTensor
from qformat.converters.wording import and_more
from qformat.errors import SourceError

_SHOWN = 3
# Tensors by which activations are multiplied because the weights after them were divided
_MULTIPLIED = ("*.act.scales", "act.scales")


@dataclass(frozen=True)
class Stated:
    """The files and the header of an export.

    Attributes
    ----------
    assets
        Content of each file by name.
    metadata
        The strings in the headers of files of weights.
    warnings
        Warnings for the user, one line each.
    """

    assets: Mapping[str, bytes]
    metadata: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)


def stated(
    path: Path, assets: Mapping[str, bytes], metadata: Mapping[str, str], tensors: Collection[ContainerTensor]
) -> Stated:
    """Return the files and the header that are true of a container's tensors, written as elements.

    Raises
    ------
    SourceError
        If neither the source's configuration would be true nor none.
    """
    configs = {name: content for name, data in assets.items() if may_state(name) and (content := _parsed(data))}
    statements = find(configs, metadata)
    if not statements:
        return Stated(assets, metadata)
    claims = Claims(statements, metadata=metadata)
    unknown = Unknown([tensor for tensor in tensors if isinstance(tensor.codec, Raw)], claims)
    if unknown:
        decoded = [tensor for tensor in tensors if _is_copied(tensor)]
        kept = next(iter(unknown.formats))
        if decoded:
            raise SourceError(
                f"{path}: layer {kept!r} is quantized in a way that is not known and kept as it is, and tensor {decoded[0].name!r}"
                f"{and_more(decoded)} would be plain numbers: no configuration describes both; use --to safetensors"
            )
        places = " and ".join(sorted({statement.file for statement in statements}))
        return Stated(
            assets,
            metadata,
            [f"layer {kept!r}{and_more(list(unknown.formats))} is kept as it is, and so is what {places} says"],
        )
    _check_complete(path, claims, tensors)
    return _without(assets, metadata, statements, configs)


def true_header(metadata: Mapping[str, str], tensors: Collection[ContainerTensor]) -> Stated:
    """Return the header of a file of weights without what it says about tensors that are plain numbers now."""
    statements = find({}, metadata)
    unknown = Unknown(
        [tensor for tensor in tensors if isinstance(tensor.codec, Raw)], Claims(statements, metadata=metadata)
    )
    plain = {tensor.name for tensor in tensors if _is_copied(tensor)}
    false = [statement for statement in statements if not unknown or statement.path[0] in plain]
    return _without({}, metadata, false, {})


def _without(
    assets: Mapping[str, bytes],
    metadata: Mapping[str, str],
    statements: list[Statement],
    configs: Mapping[str, Mapping[str, Any]],
) -> Stated:
    """Return files and header without what they say about quantization."""
    rest, header, warnings = dict(assets), dict(metadata), []
    for name in dict.fromkeys(statement.file for statement in statements):
        own = [statement for statement in statements if statement.file == name]
        named = list(dict.fromkeys(statement.path[-1] for statement in own if statement.path))
        keys = f"{', '.join(named[:_SHOWN])}{and_more(named, _SHOWN)}"
        if name == HEADER:
            header = {
                key: value for key, value in header.items() if (key,) not in [statement.path for statement in own]
            }
        elif is_alone(name):
            del rest[name]
        else:
            text = json.dumps(without(configs[name], own), indent=2, ensure_ascii=False)
            rest[name] = text.encode() + b"\n"
        what = f"{keys} is left out of {name}" if keys else f"{name} is left out"
        warnings.append(f"{what}, since the weights are plain numbers now")
    return Stated(rest, header, warnings)


def _check_complete(path: Path, claims: Claims, tensors: Collection[ContainerTensor]) -> None:
    """Raise `SourceError` if the model computes something else without its quantization configuration."""
    needed = needed_by_model(claims)
    if needed:
        raise SourceError(
            f"{path}: {needed}, which a model of plain numbers does not know, and without which it is another model; use "
            "--to safetensors for the tensors alone"
        )
    for tensor in tensors:
        if any(fnmatchcase(tensor.name, pattern) for pattern in _MULTIPLIED):
            raise SourceError(
                f"{path}: tensor {tensor.name!r} multiplies the inputs of a quantized layer, which a model of plain numbers does "
                "not do, and without which it is another model; use --to safetensors for the tensors alone"
            )


def _is_copied(tensor: ContainerTensor) -> bool:
    """Return whether a tensor holds codes that were copied from a quantized layer."""
    error = tensor.record.error
    return not isinstance(tensor.codec, Raw) and error is not None and error.rmse == 0 and len(tensor.shape) > 1


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
