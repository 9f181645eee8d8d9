"""Checkpoints that ``torch.save`` wrote: the state dict, and other small values of the checkpoint as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qformat.converters.sources.files import SharedFile
from qformat.converters.sources.hqq_file import hqq_names
from qformat.converters.sources.pickles import StandIn
from qformat.converters.sources.rwkv import rwkv_version
from qformat.converters.sources.safetensors import OPAQUE
from qformat.converters.sources.state_dict import StateDict, find_state_dict, holds_tensors
from qformat.converters.sources.torch_extras import as_json
from qformat.converters.sources.torch_file import load
from qformat.converters.sources.torch_tensors import StridedFile, check_repeated, is_opaque, source_tensor
from qformat.converters.sources.wrappers import plain_names
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import reading
from qformat.pipeline.source import Checkpoint, SourceTensor

#: the asset with the other values of a checkpoint, as far as JSON can hold them
EXTRAS = "checkpoint.json"

# What safetensors calls dtypes whose numbers are not known here
_OPAQUE_NAMES = {"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64"}
_SHOWN = 10


def open_torch(path: Path, state_dict_key: str | None = None) -> Checkpoint:
    """Return the state dict in a file that ``torch.save`` wrote, as a zip archive or in the old format.

    Its pickle is read as data, and nothing in it is run. Objects that are neither tensors nor plain values are left out, with a
    warning.

    Raises `SourceError` if the file is damaged or something else, or holds tensors that cannot be stored; `state_dict_key` is as in
    `qformat.converters.sources.options.SourceOptions`.
    """
    found, tensors, warnings = _read(path, state_dict_key)
    text, left_out = as_json(found.extras)
    warnings += _left_out(path, found, left_out)
    names = plain_names([tensor.name for tensor in tensors])
    version = rwkv_version({names[tensor.name]: tensor.shape for tensor in tensors})
    return Checkpoint(
        tensors,
        {EXTRAS: partial(bytes, text)} if text else {},
        warnings,
        [path],
        ({"rwkv_version": version} if version else {}) | _opaque_entries(found),
    )


def open_torch_shard(path: Path, state_dict_key: str | None = None) -> Checkpoint:
    """Return the tensors in one of several files as `open_torch` does, without other values."""
    found, tensors, warnings = _read(path, state_dict_key)
    warnings += _left_out(path, found, list(found.extras))
    return Checkpoint(tensors, warnings=warnings, files=[path], metadata=_opaque_entries(found))


def _read(path: Path, key: str | None) -> tuple[StateDict, list[SourceTensor], list[str]]:
    """Return the state dict of a file, its tensors, and warnings."""
    file = StridedFile(SharedFile(path))
    try:
        with reading(path):
            found = find_state_dict(hqq_names(load(path)), key)
            size = path.stat().st_size
        _check_objects(found)
        tensors = [source_tensor(name, tensor, file) for name, tensor in found.tensors.items()]
        repeated = check_repeated(tensors, size)
    except SourceError as error:
        cause = str(error)
        raise SourceError(cause if cause.startswith(f"{path}:") else f"{path}: {cause}") from None
    warnings = []
    opaque = {name: tensor for name, tensor in found.tensors.items() if is_opaque(tensor)}
    if opaque:
        name, tensor = next(iter(opaque.items()))
        warnings.append(
            f"{path.name}: tensor {name!r}{and_more(opaque)}: of dtype {tensor.dtype}, whose numbers are not known here; stored "
            "as bytes"
        )
    if repeated:
        texts = ", ".join(repeated[:_SHOWN]) + and_more(repeated, _SHOWN)
        warnings.append(f"{path.name}: stored in full, though the file repeats a few elements of it (expand): {texts}")
    return found, tensors, warnings


def _opaque_entries(found: StateDict) -> dict[str, str]:
    """Return metadata with dtype and shape of the tensors of which only the bytes are stored."""
    entries = {}
    for name, tensor in found.tensors.items():
        if is_opaque(tensor):
            dtype = _OPAQUE_NAMES.get(tensor.dtype)
            key, word = (OPAQUE, dtype) if dtype else ("torch.dtype.", tensor.dtype)
            entries[key + name] = json.dumps([word, tensor.shape, *tensor.quantizer])
    return entries


def _check_objects(found: StateDict) -> None:
    """Raise `SourceError` if objects of unknown classes stand among the tensors of a state dict, and hold tensors."""
    inside = "" if found.key == "." else f"{found.key}."
    for key, value in found.extras.items():
        if isinstance(value, StandIn) and key.startswith(inside) and holds_tensors(value):
            raise SourceError(
                f"{key.removeprefix(inside)!r} is an object of the class {value.title} that holds tensors; load it where it was "
                "made, and save it as plain tensors"
            )


def _left_out(path: Path, found: StateDict, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    taken = f"the state dict {found.key!r} is taken, and " if found.key != "." else ""
    return [f"{path.name}: {taken}{', '.join(keys[:_SHOWN])}{and_more(keys, _SHOWN)} left out"]
