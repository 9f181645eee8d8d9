"""Hugging Face checkpoint directories with safetensors weights, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path

from qformat.converters.safetensors import SafetensorsTensor, open_safetensors

from qformat.container.index import MAX_ASSET_BYTES, check_asset_name
from qformat.errors import FormatError, SourceError
from qformat.files import open_regular
from qformat.source import Checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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


def open_hf(directory: Path) -> Checkpoint:
    """Return the checkpoint in a directory.

    Nothing is written there, and no file outside it is read, whatever its index says (but symbolic links, which the hub's
    cache consists of, are followed).

    Raises
    ------
    SourceError
        If there are no safetensors weights, a shard is missing or damaged, or the index does not fit the shards.
    """
    warnings: list[str] = []
    if (directory / SINGLE).exists():
        tensors = open_safetensors(directory / SINGLE)
    elif (directory / INDEX).exists():
        tensors, warnings = _open_shards(directory)
    else:
        raise SourceError(f"{directory}: holds neither {SINGLE} nor {INDEX}; give a directory with safetensors weights")
    assets, more = _find_assets(directory)
    files = [directory / INDEX, *{tensor.file.path for tensor in tensors}, *assets.values()]
    readers = {name: path.read_bytes for name, path in assets.items()}
    return Checkpoint(tensors, readers, [*warnings, *more, *_left_out(directory)], files)


def _open_shards(directory: Path) -> tuple[list[SafetensorsTensor], list[str]]:
    weight_map = _read_index(directory / INDEX)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # The index is untrusted: a file name and nothing else
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise SourceError(
                f"{directory / INDEX}: names the file {shard!r}, which is not a plain file name; do not use it"
            )
        if not (directory / shard).exists():
            raise SourceError(f"{directory}: shard {shard} is missing, though {INDEX} names it; download it again")
    tensors: dict[str, SafetensorsTensor] = {}
    unlisted = []
    for shard in shards:
        for tensor in open_safetensors(directory / shard):
            home = weight_map.get(tensor.name, shard)
            if tensor.name not in weight_map:
                unlisted.append(tensor.name)
            if home == shard:
                if tensor.name in tensors:
                    raise SourceError(
                        f"{directory}: tensor {tensor.name!r} is in two shards and {INDEX} does not list it"
                    )
                tensors[tensor.name] = tensor
    for name, shard in sorted(weight_map.items()):
        if name not in tensors:
            raise SourceError(f"{directory}: {INDEX} says that {shard} holds tensor {name!r}, but it does not")
    warnings = []
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        warnings.append(f"{INDEX} does not list tensor {unlisted[0]!r}{more}; taken along")
    return list(tensors.values()), warnings


def _read_index(path: Path) -> dict[str, str]:
    try:
        with open_regular(path) as file:
            index = json.loads(file.readall())
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise TypeError
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{path}: is not an index of shards (no usable 'weight_map'); download it again") from None
    return weight_map  # type: ignore[no-any-return]


def _find_assets(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to take along, and warnings; of folders, as sentence-transformers has them, only their configuration."""
    found: dict[str, Path] = {}
    warnings = []
    for pattern in (*_ASSETS, "[!.]*/config.json"):
        for path in sorted(directory.glob(pattern)):
            name = path.relative_to(directory).as_posix()
            if name.startswith(".") or not path.is_file() or any(path.match(no) for no in _NOT_ASSETS):
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
    others = sorted(path.relative_to(directory).as_posix() for path in directory.glob("*/*.safetensors"))
    return [f"{name} is not taken along: convert its folder on its own" for name in others]
