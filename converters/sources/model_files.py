"""The files of a model beside its weights: those to take along, and the configuration that says how weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qformat.container.index import MAX_ASSET_BYTES, check_asset_name
from qformat.converters.quantized.recognize import recognize
from qformat.converters.quantized.statements import USUAL_FILES, may_state
from qformat.converters.sources.files import WEIGHTS, read_object
from qformat.converters.sources.options import SourceOptions
from qformat.errors import FormatError, SourceError
from qformat.files import is_remote
from qformat.pipeline.source import Checkpoint

# Configuration, tokenizer, templates, licence
_ASSETS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
_NOT_ASSETS = ("*.index.json",)


def with_assets(directory: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint together with the files of its directory that belong to the model."""
    found, warnings = _find_assets(directory)
    inner = sorted(path.relative_to(directory).as_posix() for path in directory.glob("*/*") if path.suffix in WEIGHTS)
    warnings += [f"{name} is not taken along: convert its directory separately" for name in inner]
    return replace(
        checkpoint,
        assets={**checkpoint.assets, **{name: path.read_bytes for name, path in found.items()}},
        warnings=[*checkpoint.warnings, *warnings],
        files=[*checkpoint.files, *found.values()],
    )


def _find_assets(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to take along, and warnings; of subdirectories (sentence-transformers has some), only config.json."""
    found: dict[str, Path] = {}
    warnings = []
    for pattern in (*_ASSETS, "[!.]*/config.json"):
        for path in sorted(directory.glob(pattern)):
            name = path.relative_to(directory).as_posix()
            if name.startswith(".") or not path.is_file() or any(fnmatchcase(path.name, no) for no in _NOT_ASSETS):
                continue
            try:
                check_asset_name(name)
                if path.stat().st_size > MAX_ASSET_BYTES:
                    raise FormatError(f"{name} is larger than the limit for files that are taken along")
            except FormatError as error:
                warnings.append(f"{error.cause}: left out")
            else:
                found[name] = path
    return found, warnings


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
    return replace(
        checkpoint,
        tensors=found.tensors,
        warnings=[*checkpoint.warnings, *found.warnings],
        quantized=checkpoint.quantized or found.layers or found.claimed,
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
