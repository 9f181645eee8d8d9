"""Checkpoints that ``torch.save`` wrote. Nothing that a pickle may ask for is run: only torch's restricted unpickler reads them."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.rwkv import rwkv_version
from qformat.converters.sources.state_dict import WHOLE, StateDict, find_state_dict
from qformat.dtypes import DTYPES, DType, Elements
from qformat.errors import SourceError
from qformat.files import on_this_machine, open_regular
from qformat.pipeline.source import Checkpoint, SourceTensor
from qformat.readers.torch import TORCH_DTYPES

#: holds what else a checkpoint says, as far as JSON can
BESIDE = "checkpoint.json"
_MOST_BESIDE = 1 << 20

_DTYPES = {theirs: DTYPES[name] for name, theirs in TORCH_DTYPES.items()}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What wrappers put before every name, and a model does not know
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# Views that repeat elements may ask for any amount of work; no model's repeat them so often
_MOST_REPEATED = 1024
_LISTED = 5


class TorchTensor(SourceTensor):
    """A tensor in memory, or in a mapped file; it may be any strided view."""

    def __init__(self, name: str, dtype: DType, array: NDArray[Any]) -> None:
        self.name, self.dtype, self.shape = name, dtype, array.shape
        self.array = array

    def read(self, elements: slice) -> Elements:
        """Return some elements, without a copy where they stand one after the other."""
        return Elements(self.dtype, _in_order(self.array, elements.start, elements.stop))


def _in_order(array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    """Return elements of a view in row-major order, of which no more is copied than that."""
    if array.flags.c_contiguous:
        return np.require(array.reshape(-1)[start:stop], requirements="A")
    if start == stop:
        return np.empty(0, array.dtype)
    if array.ndim == 1:
        return np.ascontiguousarray(array[start:stop])
    row = math.prod(array.shape[1:])
    first = start // row
    if first == (stop - 1) // row:
        return _in_order(array[first], start - first * row, stop - first * row)
    found = np.empty(stop - start, array.dtype)
    inner = slice(-(-start // row), stop // row)  # the rows of which all is asked for
    head, tail = inner.start * row - start, stop - inner.stop * row
    if head:
        found[:head] = _in_order(array[first], row - head, row)
    found[head : found.size - tail].reshape(-1, *array.shape[1:])[:] = array[inner]
    if tail:
        found[found.size - tail :] = _in_order(array[inner.stop], 0, tail)
    return found


def open_torch(path: Path, options: SourceOptions, *, shard: bool = False) -> Checkpoint:
    """Return the state dict in a file that ``torch.save`` wrote, as a zip archive (which is mapped) or in the older format.

    Parameters
    ----------
    path
        The file.
    options
        Which state dict to take.
    shard
        Whether this is one of several files; the names then stay as they are, and nothing but tensors is taken.

    Raises
    ------
    SourceError
        If it is damaged or something else, holds objects that only running its code could read, or tensors that cannot be stored.
    """
    try:
        with on_this_machine(path) as here:
            found = find_state_dict(_load(here), options.state_dict_key)
        prefix = "" if shard else _wrapping(found.tensors)
        tensors = [_source(name.removeprefix(prefix), tensor) for name, tensor in found.tensors.items()]
        _check_amount(path, tensors)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    known, left_out = ({}, list(found.beside)) if shard else _as_json(found.beside)
    notes = _left_out(found, left_out)
    if prefix:
        notes.append(f"every name begins with {prefix!r}, as a wrapper for training has added it; taken off")
    assets: dict[str, Callable[[], bytes]] = {}
    if known:
        assets[BESIDE] = partial(bytes, json.dumps(known, sort_keys=True, indent=1).encode() + b"\n")
    version = None if shard else rwkv_version({tensor.name: tensor.shape for tensor in tensors})
    return Checkpoint(
        tensors,
        assets,
        [f"{path.name}: {note}" for note in notes],
        [path],
        {"rwkv_version": version} if version else {},
    )


def _load(path: Path) -> object:
    """Return what was saved; of an archive, tensors are where the file is mapped."""
    with open_regular(path) as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        _check_archive(path)
    if path.suffix == ".safetensors":  # for which torch would take it
        raise SourceError("is a torch checkpoint, though its name ends in .safetensors; rename it to .pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise SourceError(_refusal(str(error))) from None
    except Exception as error:  # noqa: BLE001  the unpickler raises whatever damaged bytes make of it
        raise SourceError(f"is damaged, or no version of torch wrote it ({_brief(error)}); download it again") from None
    return root


def _check_archive(path: Path) -> None:
    """Refuse zip archives of another kind, and those that cannot be mapped."""
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
            f"is a zip archive that torch.save did not make: it holds {some or 'nothing'}, and no data.pkl"
        )
    if f"{folders[0]}constants.pkl" in names:
        raise SourceError(
            "is a TorchScript archive, which holds a program; save the module's state_dict() with torch.save"
        )
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SourceError(
            f"was compressed after torch.save ({packed[0][:80]!r}); unpack it and zip it with no compression (zip -0)"
        )


def _refusal(message: str) -> str:
    """Return what to say of a pickle that the restricted unpickler refuses."""
    named = re.search(r"GLOBAL (\S+)", message)
    advice = (
        "which is not done, as a pickle can run any code; if you trust it, load it where it was made and save the state dict "
        "alone: torch.save(model.state_dict(), ...)"
    )
    if named:
        return f"asks for {named[1][:200]!r} to be imported, {advice}"
    # what torch says before is how to do it all the same
    cause = message.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""]
    return f"asks for more than tensors ({_brief(cause[0])}), {advice}"


def _brief(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _source(name: str, tensor: torch.Tensor) -> TorchTensor:
    tensor = tensor.detach()
    dtype = _DTYPES.get(tensor.dtype)
    if tensor.layout is not torch.strided or tensor.is_nested:
        what = "sparse, or nested"
    elif dtype is None:
        what = f"of dtype {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.device.type != "cpu":
        what = f"on the device {tensor.device.type!r}, without values"
    elif tensor.is_neg():
        what = "a view that changes signs"
    else:
        return TorchTensor(name, dtype, tensor.view(_BITS[dtype.size]).numpy().view(dtype.storage))
    raise SourceError(f"tensor {name!r} is {what}, which cannot be stored; save the checkpoint without it")


def _check_amount(path: Path, tensors: Sequence[TorchTensor]) -> None:
    held = sum(tensor.array.nbytes for tensor in tensors)
    if held > _MOST_REPEATED * path.stat().st_size:
        raise SourceError(f"its tensors repeat what is in the file, up to {held} bytes; do not use it")


def _wrapping(names: Collection[str]) -> str:
    """Return what wrappers have put before every name."""
    prefix = ""
    while True:
        more = [word for word in _WRAPPERS if all(name.startswith(prefix + word) for name in names)]
        if not more:
            return prefix
        prefix += more[0]


def _as_json(beside: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the objects that are small and that JSON can hold, and the keys of the others."""
    known: dict[str, Any] = {}
    left_out = []
    room = _MOST_BESIDE
    for key, value in beside.items():
        try:
            text = _bounded_json(value, room)
        except (TypeError, ValueError, RecursionError):
            left_out.append(key)
        else:
            known[key] = json.loads(text)
            room -= len(text)
    return known, left_out


def _bounded_json(value: object, room: int) -> str:
    """Return a value as JSON; raise `ValueError` if it does not fit, as a small pickle may describe endless text."""
    parts = []
    for part in json.JSONEncoder(sort_keys=True, allow_nan=False).iterencode(value):
        room -= len(part)
        if room < 0:
            raise ValueError("too long")
        parts.append(part)
    return "".join(parts)


def _left_out(found: StateDict, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    taken = "" if found.key == WHOLE else f"the state dict {found.key!r} is taken, and "
    return [f"{taken}{', '.join(map(repr, keys[:_LISTED]))}{more} left out"]
