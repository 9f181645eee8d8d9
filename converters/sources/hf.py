"""Model directories in Hugging Face's layout: weights in one file or in shards, and the files that belong to them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from qformat.converters.sources.files import WEIGHTS, Opener
from qformat.converters.sources.model_files import with_assets
from qformat.converters.sources.shards import numbered, open_indexed, open_unlisted
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.pipeline.source import Checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Names of a single file, in order of preference; a sharded one has NAME.index.json instead.
_NAMES = (
    SINGLE,
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "consolidated.safetensors",  # Mistral's own
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# State of a training run
_NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "random_states*")
_SHOWN = 8


def is_hf(directory: Path) -> bool:
    """Return whether the weights in a directory have usual names, or are numbered shards."""
    return bool(_find(directory))


def open_hf(directory: Path, open_file: Opener) -> Checkpoint:
    """Return the checkpoint in a directory. Nothing is written there, and no file outside it is read.

    Raises `SourceError` if a file is missing or damaged, or an index does not match the files.
    """
    files = _find(directory)
    if files[0].name in _NAMES:
        checkpoint = open_file(files[0], shard=False)
    elif files[0].name.endswith(".index.json"):
        checkpoint = open_indexed(files[0], open_file)
    else:
        checkpoint = open_unlisted(files, open_file)
    return with_assets(directory, checkpoint)


def _find(directory: Path) -> list[Path]:
    """Return the file of weights, the index of the shards, or the shards in order."""
    for name in _NAMES:
        for path in (directory / name, directory / f"{name}.index.json"):
            if path.exists():
                return [path]
    files = [path for path in _weights_in(directory) if path.suffix != ".gguf"]
    return numbered([path for path in files if path.suffix == ".safetensors"]) or numbered(files)


def only_weights(directory: Path) -> Path:
    """Return the only file with weights in a directory, whatever its name; adapters count if there is nothing else.

    Raises `SourceError` if there are none or several.
    """
    files = [path for path in _weights_in(directory) if path.name not in _ADAPTERS]
    files = files or [directory / name for name in _ADAPTERS if (directory / name).exists()][:1]
    if not files:
        raise SourceError(
            f"{directory}: holds no weights: neither {SINGLE}, {INDEX} nor any {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} "
            "file; give a directory with weights, or a file"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:_SHOWN])
        raise SourceError(
            f"{directory}: holds several files with weights, and none has a usual name: {names}{and_more(files, _SHOWN)}; give one "
            "of them"
        )
    return files[0]


def _weights_in(directory: Path) -> list[Path]:
    """Return the files whose names are those of weights."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix in WEIGHTS
        and not path.name.startswith(".")
        and path.is_file()
        and not any(fnmatchcase(path.name, no) for no in _NOT_WEIGHTS)
    )
