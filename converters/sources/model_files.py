"""The configuration beside the weights of a model, which says how they are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qformat.converters.quantized.recognize import recognize
from qformat.converters.quantized.statements import USUAL_FILES, may_state
from qformat.converters.sources.files import read_object
from qformat.converters.sources.options import SourceOptions
from qformat.errors import SourceError
from qformat.files import is_remote
from qformat.pipeline.source import Checkpoint


def recognized(checkpoint: Checkpoint, directory: Path, options: SourceOptions) -> Checkpoint:
    """Join the tensors of layers that another tool has quantized; raise `SourceError` as `recognize` does.

    The configuration, if there is any, is in the directory.
    """
    configs, damaged = _read_configs(directory)
    found = recognize(checkpoint.tensors, configs, options, checkpoint.metadata)
    if found.layers and damaged:
        raise SourceError(
            f"{damaged[0]}: cannot be read as JSON, and may say how the weights beside it are quantized; download it again"
        )
    fixed = any(
        tensor.fixed_because for tensor in checkpoint.tensors
    )  # of a dtype that only quantized checkpoints have
    return replace(
        checkpoint,
        tensors=found.tensors,
        warnings=[*checkpoint.warnings, *found.warnings],
        quantized=checkpoint.quantized or found.layers or found.claimed or fixed,
    )


def _read_configs(directory: Path) -> tuple[dict[str, Mapping[str, Any]], list[Path]]:
    """Return the JSON objects in configuration files, by file name, and the paths of damaged files."""
    configs: dict[str, Mapping[str, Any]] = {}
    damaged = []
    others = (name for name in _names_in(directory) if may_state(name))
    for name in dict.fromkeys((*USUAL_FILES, *others)):
        path = directory / name
        try:
            configs[name] = read_object(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            # some servers answer "forbidden" for files that do not exist
            if name in USUAL_FILES and not (is_remote(path) and isinstance(error, OSError)):
                damaged.append(path)
    return configs, damaged


def _names_in(directory: Path) -> list[str]:
    """Return the names of the files in a directory; none if it cannot be listed, as on some servers."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except Exception:  # noqa: BLE001  each remote file system has exceptions of its own
        return []
