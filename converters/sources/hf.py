"""Directories with weights in one file or in shards, in Hugging Face's layout or under other names.

Which files are taken is decided by their names: those that transformers looks for, in its order, but an index before a single file
that it does not list; then variants of them; then the only weights with another name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from qformat.converters.sources.files import WEIGHTS, Opener, missing
from qformat.converters.sources.listing import Folder
from qformat.converters.sources.shards import numbered, open_indexed, open_unlisted
from qformat.converters.sources.weight_files import WeightSet, variant_of, weight_name, weight_sets
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import is_remote
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
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Taken if there is nothing else
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_COMPANIONS = ("*mmproj*.gguf", "*imatrix*.gguf")
# Weights that only other frameworks read
_FRAMEWORKS = (".msgpack", ".h5", ".keras", ".onnx", ".ot", ".tflite", ".npz", ".pdparams", ".pkl", ".pb")
_SHOWN = 8


def is_hf(folder: Folder) -> bool:
    """Return whether the weights in a directory have a usual name, or one of a variant."""
    sets = _sets(folder)
    return any(name in sets for name in _NAMES) or any(variant_of(name, _NAMES) for name in sets)


def _sets(folder: Folder) -> dict[str, WeightSet]:
    """Return the sets of weights in a directory; folders with usual names count, since they stand in place of the files."""
    usual = [entry for entry in folder.folders if entry.name in (*_NAMES, *(f"{name}.index.json" for name in _NAMES))]
    return weight_sets([*folder.files, *usual])


def open_hf(folder: Folder, open_file: Opener) -> Checkpoint:
    """Return the checkpoint in a directory. Nothing is written there.

    Raises `SourceError` if it is not clear which weights to take, a file is missing or damaged, or an index does not match it.
    """
    chosen = select(folder)
    warnings = []
    if found := variant_of(chosen.name, _NAMES):
        warnings.append(f"the variant {found[1]!r} is taken, there is no other: {chosen.entry.name}")
    return with_warnings(open_set(chosen, open_file), warnings)


def open_set(chosen: WeightSet, open_file: Opener) -> Checkpoint:
    """Return the checkpoint in a set of files; raise `SourceError` if it is incomplete or damaged."""
    dangling = [path for path in chosen.paths if not is_remote(path) and path.is_symlink() and not path.exists()]
    if dangling and not (chosen.index and chosen.index not in dangling):
        raise missing(dangling[0])
    if chosen.index:
        return open_indexed(chosen.index, open_file, chosen.single)
    if chosen.single:
        return open_file(chosen.single, shard=False)
    files = numbered(chosen.shards)
    if chosen.suffix == ".gguf":  # the first part finds the others
        return open_file(files[0], shard=False)
    return open_unlisted(files, open_file)


def with_warnings(checkpoint: Checkpoint, warnings: Sequence[str]) -> Checkpoint:
    """Return a checkpoint with more warnings before its own."""
    return Checkpoint(**(vars(checkpoint) | {"warnings": [*warnings, *checkpoint.warnings]}))


def select(folder: Folder) -> WeightSet:
    """Return the weights that are taken from a directory.

    Raises `SourceError` if there are none, or none of several has a usual name.
    """
    sets = _sets(folder)
    for name in _NAMES:
        if name in sets:
            return sets[name]
    variants = {name: found for name in sets if (found := variant_of(name, _NAMES))}
    if variants:
        best = min(position for position, _ in variants.values())
        return _only(folder, [sets[name] for name, (position, _) in variants.items() if position == best], "variant")
    adapters = [sets.pop(name) for name in _ADAPTERS if name in sets]
    companions = [name for name in sets if any(fnmatchcase(name.lower(), pattern) for pattern in _COMPANIONS)]
    left = [sets[name] for name in sets if name not in companions] or list(sets.values())
    for suffixes in ((".safetensors",), tuple(WEIGHTS)):
        sharded = [own for own in left if own.suffix in suffixes and (own.index or own.shards)]
        if sharded:
            return _only(folder, sharded, "checkpoint")
    left = left or adapters[:1]
    if not left:
        raise SourceError(f"{folder.path}: {_nothing(folder)}")
    return _only(folder, _plainest(left), "file")


def _plainest(sets: Sequence[WeightSet]) -> Sequence[WeightSet]:
    """Return the weights of which all others are variants, or the same in another format, if there are such; else all."""
    by_suffix = sorted(sets, key=lambda own: WEIGHTS.index(own.suffix))
    for own in by_suffix:
        stem = own.name.removesuffix(own.suffix)
        if all(other.name.startswith(f"{stem}.") for other in sets) and own.suffix == by_suffix[0].suffix:
            return [own]
    return sets


def _only(folder: Folder, sets: Sequence[WeightSet], kind: str) -> WeightSet:
    if len(sets) == 1:
        return sets[0]
    if not all(own.index or own.single for own in sets):  # one shard is nothing to give
        names = sorted(path.name for own in sets for path in own.paths)
        some = ", ".join(names[:_SHOWN]) + and_more(names, _SHOWN)
        raise SourceError(
            f"{folder.path}: holds shards of several checkpoints, and no index: {some}; give a directory for each"
        )
    names = sorted(own.entry.name for own in sets)
    what = {
        "variant": "several variants of the weights, and none without one",
        "checkpoint": "several indexes of weights, and none has a usual name",
        "file": "several files with weights, and none has a usual name",
    }[kind]
    alike = len({re.sub("[0-9]+", "", name) for name in names}) < len(names)
    way = (
        "give one of them if each is a whole model, or join them to one file if they are parts"
        if alike
        else "give one of them"
    )
    raise SourceError(f"{folder.path}: holds {what}: {', '.join(names[:_SHOWN])}{and_more(names, _SHOWN)}; {way}")


def _nothing(folder: Folder) -> str:
    """Return what there is instead of weights."""
    inner = [entry.name for entry in folder.folders if weight_sets(Folder(entry.path).files)]
    if inner:
        names = ", ".join(inner[:_SHOWN]) + and_more(inner, _SHOWN)
        return f"holds no weights itself, but folders with weights: {names}; give one of them"
    models = [entry.name for entry in folder.folders if entry.name.startswith("models--")]
    if models:
        return (
            f"is the cache of the hub; give one of its models: {', '.join(models[:_SHOWN])}{and_more(models, _SHOWN)}"
        )
    containers = [entry.name for entry in folder.files if entry.path.suffix == ".qf"]
    if containers:
        return f"holds no checkpoint of another tool; give the .qf file itself: {containers[0]}{and_more(containers)}"
    others = [entry.name for entry in folder.files if entry.path.suffix in _FRAMEWORKS]
    if others:
        names = ", ".join(others[:_SHOWN]) + and_more(others, _SHOWN)
        return f"holds no weights that can be read, but {names}, of another framework; save the model with safetensors or torch"
    return (
        f"holds no weights: neither {SINGLE}, {INDEX} nor any {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} file; give a directory "
        "with weights, or a file"
    )


def advice_for(path: Path) -> str | None:
    """Return a warning if a file that is given alone is only a part of the model in its directory."""
    folder = Folder(path.parent)
    try:
        chosen, whole = select(folder), True
    except SourceError:
        chosen, whole = None, False
    own = next((each for each in weight_sets(folder.files).values() if path in each.paths), None)
    name = weight_name(path.name)
    if own and name and name.total > 1:
        if whole and own == chosen:
            way = "give its directory for the whole model"
        elif own.index:
            way = f"give {own.index.name} for the whole model"
        else:
            way = "move all of them to a directory of their own, and give that, for the whole model"
        return f"{path.name} is one shard of {name.total}: {way}"
    if "config.json" not in folder.names:
        return None
    if whole and own == chosen:
        return f"only the tensors of {path.name} are taken; give its directory to include config.json and tokenizer"
    return f"only the tensors of {path.name} are taken, without config.json and what else is beside it"
