"""Model directories as Hugging Face lays them out: weights in one file or in shards, and the files that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from qformat.container.index import MAX_ASSET_BYTES, check_asset_name
from qformat.converters.sources.files import read_object
from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.shards import numbered, open_indexed, open_unlisted
from qformat.converters.sources.weights import open_weights
from qformat.errors import FormatError, SourceError
from qformat.files import is_remote
from qformat.pipeline.source import Checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Names of the weights in one file, the best first; in shards, there is NAME.index.json instead.
_NAMES = (
    SINGLE,
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "consolidated.safetensors",  # Mistral's own
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")

# What a model directory holds beside its weights, and a loader needs: configuration, tokenizer, templates, licence.
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

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
# What trainers leave beside them
_NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "random_states*")

_CONFIGS = ("config.json", "quantize_config.json", "quantization_config.json")


def open_hf(directory: Path, options: SourceOptions) -> Checkpoint | None:
    """Return the checkpoint in a directory, or None if its weights have none of the usual names.

    Nothing is written there, and no file outside it is read.

    Raises
    ------
    SourceError
        If a file is missing or damaged, or an index does not fit the files.
    """
    shard = partial(open_weights, options=options, shard=True)
    for name in _NAMES:
        if (directory / name).exists():
            return with_assets(directory, open_weights(directory / name, options))
        index = directory / f"{name}.index.json"
        if index.exists():
            return with_assets(directory, open_indexed(index, shard))
    files = [path for path in weights_in(directory) if path.suffix != ".gguf"]
    shards = numbered([path for path in files if path.suffix == ".safetensors"]) or numbered(files)
    return with_assets(directory, open_unlisted(shards, shard)) if shards else None


def only_weights(directory: Path) -> Path:
    """Return the one file with weights in a directory, whatever its name; adapters count if there is nothing else.

    Raises
    ------
    SourceError
        If there is none, or several.
    """
    files = [path for path in weights_in(directory) if path.name not in _ADAPTERS]
    files = files or [directory / name for name in _ADAPTERS if (directory / name).exists()][:1]
    if not files:
        raise SourceError(
            f"{directory}: holds no weights: neither {SINGLE}, {INDEX} nor any {', '.join(_WEIGHTS[:-1])} or {_WEIGHTS[-1]} "
            "file; give a directory with weights, or a file"
        )
    if len(files) > 1:
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        raise SourceError(
            f"{directory}: holds several files with weights, and none has a usual name: "
            f"{', '.join(path.name for path in files[:8])}{more}; give one of them"
        )
    return files[0]


def weights_in(directory: Path) -> list[Path]:
    """Return the files that should hold weights, going by their names."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix in _WEIGHTS
        and not path.name.startswith(".")
        and path.is_file()
        and not any(fnmatchcase(path.name, no) for no in _NOT_WEIGHTS)
    )


def with_assets(directory: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint together with the files of its directory that belong to the model."""
    found, warnings = _find_assets(directory)
    readers = {name: path.read_bytes for name, path in found.items()}
    return replace(
        checkpoint,
        assets=dict(checkpoint.assets) | readers,
        warnings=[*checkpoint.warnings, *warnings, *_left_out(directory)],
        files=[*checkpoint.files, *found.values()],
    )


def read_configs(directory: Path) -> tuple[dict[str, Mapping[str, Any]], list[Path]]:
    """Return what is configured for the weights in a directory, by file, and the files that are there but say nothing."""
    configs: dict[str, Mapping[str, Any]] = {}
    damaged = []
    for name in _CONFIGS:
        path = directory / name
        try:
            configs[name] = read_object(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            # servers that list nothing forbid what is not there
            if not (is_remote(path) and isinstance(error, OSError)):
                damaged.append(path)
    return configs, damaged


def _find_assets(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to take along, and warnings; of folders, as sentence-transformers has them, only their configuration."""
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
                    raise FormatError(f"{name} has more bytes than a file that is taken along may have")
            except FormatError as error:
                warnings.append(f"{error.cause}: left out")
            else:
                found[name] = path
    return found, warnings


def _left_out(directory: Path) -> list[str]:
    """Return a warning for weights in folders, which are no part of the checkpoint proper."""
    others = sorted(path.relative_to(directory).as_posix() for path in directory.glob("*/*") if path.suffix in _WEIGHTS)
    return [f"{name} is not taken along: convert its folder on its own" for name in others]
