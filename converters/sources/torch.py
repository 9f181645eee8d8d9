"""Checkpoints that ``torch.save`` wrote: the state dict, and other small values of the checkpoint as JSON."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformat.converters.sources.rwkv import rwkv_version
from qformat.converters.sources.wrappers import plain_names
from qformat.converters.wording import and_more
from qformat.errors import SourceError, install_hint
from qformat.files import on_this_machine, open_regular
from qformat.pipeline.source import Checkpoint

if TYPE_CHECKING:
    from qformat.converters.sources.state_dict import StateDict
    from qformat.converters.sources.torch_tensors import TorchTensor

#: the asset with the other values of a checkpoint, as far as JSON can hold them
EXTRAS = "checkpoint.json"
_MAX_EXTRAS = 1 << 20

_ZIP = b"PK"
_LEGACY = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins files in the old format of torch.save, after the pickle's version
)
_SHOWN = 5


def is_torch(start: bytes) -> bool:
    """Return whether a file that begins so is a zip archive, or a torch checkpoint in the old format."""
    return start[8:9] != b"{" and (start.startswith(_ZIP) or start[2:].startswith(_LEGACY))


def open_torch(path: Path, state_dict_key: str | None = None) -> Checkpoint:
    """Return the state dict in a file that ``torch.save`` wrote, as a zip archive (which is mapped) or in the old format.

    Raises `SourceError` if it is damaged or something else, holds objects that only running its code could read, or tensors that
    cannot be stored; `state_dict_key` is as in `qformat.converters.sources.options.SourceOptions`.
    """
    found, tensors = _read(path, state_dict_key)
    extras, left_out = _as_json(found.extras)
    warnings = _left_out(path, found, left_out)
    text = json.dumps(extras, sort_keys=True, indent=1).encode() + b"\n"
    names = plain_names([tensor.name for tensor in tensors])
    version = rwkv_version({names[tensor.name]: tensor.shape for tensor in tensors})
    return Checkpoint(
        tensors,
        {EXTRAS: partial(bytes, text)} if extras else {},
        warnings,
        [path],
        {"rwkv_version": version} if version else {},
    )


def open_torch_shard(path: Path, state_dict_key: str | None = None) -> Checkpoint:
    """Return the tensors in one of several files as `open_torch` does, without other values."""
    found, tensors = _read(path, state_dict_key)
    return Checkpoint(tensors, warnings=_left_out(path, found, list(found.extras)), files=[path])


def _read(path: Path, key: str | None) -> tuple[StateDict, list[TorchTensor]]:
    """Return the state dict of a file, and its tensors."""
    try:
        from qformat.converters.sources.state_dict import find_state_dict
        from qformat.converters.sources.torch_tensors import check_amount, load, source_tensor
    except ImportError:
        raise SourceError(f"{path}: torch is needed to read it; {install_hint('torch')}") from None
    try:
        with on_this_machine(path) as here:
            found = find_state_dict(load(here, zipped=_is_archive(here)), key)
        tensors = [source_tensor(name, tensor) for name, tensor in found.tensors.items()]
        check_amount(path, tensors)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    return found, tensors


def _is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, which must be of torch's kind and uncompressed, so that it can be mapped."""
    with open_regular(path) as file:
        if file.read(2) != _ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise SourceError("is cut short or damaged: not a whole zip archive; download it again") from None
    names = {record.filename for record in records}
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch("[^/]+/data.pkl", name)]
    if len(folders) != 1:
        some = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
        raise SourceError(
            f"is a zip archive that torch.save did not write: it holds {some or 'nothing'}, and no data.pkl"
        )
    if f"{folders[0]}constants.pkl" in names:
        raise SourceError(
            "is a TorchScript archive, which contains a program; save the module's state_dict() with torch.save"
        )
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SourceError(
            f"was compressed after torch.save ({packed[0][:80]!r}); unpack it and zip it without compression (zip -0)"
        )
    return True


def _as_json(extras: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that JSON can hold and that are not too large, and the keys of the others."""
    known: dict[str, Any] = {}
    left_out = []
    budget = _MAX_EXTRAS
    for key, value in extras.items():
        try:
            text = _bounded_json(value, budget)
        except (TypeError, ValueError, RecursionError):
            left_out.append(key)
        else:
            known[key] = json.loads(text)
            budget -= len(text)
    return known, left_out


def _bounded_json(value: object, budget: int) -> str:
    """Return a value as JSON; raise `ValueError` if it is too long, since a small pickle may describe endless text."""
    parts = []
    for part in json.JSONEncoder(sort_keys=True, allow_nan=False).iterencode(value):
        budget -= len(part)
        if budget < 0:
            raise ValueError("too long")
        parts.append(part)
    return "".join(parts)


def _left_out(path: Path, found: StateDict, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    taken = f"the state dict {found.key!r} is taken, and " if found.key != "." else ""
    return [f"{path.name}: {taken}{', '.join(map(repr, keys[:_SHOWN]))}{and_more(keys, _SHOWN)} left out"]
