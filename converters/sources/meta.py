"""Directories in Meta's layout of Llama: params.json and consolidated.00.pth, .01.pth ..., one file for each GPU.

The parts of a matrix are joined when they are read; nothing else changes, not even the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qformat.converters.sources.files import Opener, read_object
from qformat.converters.sources.listing import Folder
from qformat.dtypes import Elements
from qformat.errors import SourceError
from qformat.pipeline.source import Checkpoint, SourceTensor

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated(?:\.([0-9]+))?\.pth")
_EMBEDDINGS = "tok_embeddings.weight"
_DROPPED = "rope.freqs"  # computed from params.json; the first Llama has it in every layer

# The dimension along which a matrix is divided among GPUs: its outputs or its inputs
_DIMS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


class Joined(SourceTensor):
    """Matrices of the same shape, concatenated along a dimension."""

    def __init__(self, parts: Sequence[SourceTensor], dim: int) -> None:
        self.name, self.dtype = parts[0].name, parts[0].dtype
        rows, cols = parts[0].shape
        self.shape = (rows * len(parts), cols) if dim == 0 else (rows, cols * len(parts))
        self.parts, self.dim = parts, dim

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        start, stop = elements.start, elements.stop
        if start >= stop:
            return self.parts[0].read(slice(0, 0))
        rows, cols = self.parts[0].shape
        if self.dim == 0:
            size = rows * cols
            found = [
                self.parts[i].read(slice(max(start - i * size, 0), min(stop - i * size, size))).data
                for i in range(start // size, (stop - 1) // size + 1)
            ]
            return Elements(self.dtype, found[0] if len(found) == 1 else np.concatenate(found))
        width = cols * len(self.parts)
        first, last = start // width, (stop - 1) // width + 1
        joined = np.empty((last - first, len(self.parts), cols), self.dtype.storage)
        for i, part in enumerate(self.parts):
            joined[:, i] = part.read(slice(first * cols, last * cols)).data.reshape(-1, cols)
        return Elements(self.dtype, joined.reshape(-1)[start - first * width : stop - first * width])


class Copies(SourceTensor):
    """A tensor that is the same in several files, which every read verifies."""

    def __init__(self, replicas: Sequence[SourceTensor], directory: Path) -> None:
        self.name, self.dtype, self.shape = replicas[0].name, replicas[0].dtype, replicas[0].shape
        self.replicas, self.directory = replicas, directory

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        first, *others = (copy.read(elements) for copy in self.replicas)
        if any(not np.array_equal(first.data.view(np.uint8), other.data.view(np.uint8)) for other in others):
            raise SourceError(
                f"{self.directory}: the copies of tensor {self.name!r} in the shards differ; download them again"
            )
        return first


def is_meta(folder: Folder) -> bool:
    """Return whether a directory holds weights under Meta's names: several files, or one beside params.json."""
    shards = _shards(folder)
    return len(shards) > 1 or (bool(shards) and PARAMS in folder.names)


def open_meta(folder: Folder, open_file: Opener) -> Checkpoint:
    """Return the checkpoint in a directory of Meta's layout.

    Raises `SourceError` if a shard is missing or damaged, shards do not belong together, or it is not known how to join a tensor.
    """
    directory, files = folder.path, _complete(folder)
    shards = [open_file(path) for path in files]
    tables = [
        {tensor.name: tensor for tensor in shard.tensors if not tensor.name.endswith(_DROPPED)} for shard in shards
    ]
    for path, table in zip(files, tables, strict=True):
        _check_same(files[0], tables[0], path, table)
    layout = _Layout(directory, len(files), _read_params(directory))
    tensors = [layout.merged([table[name] for table in tables]) for name in tables[0]]
    warnings = [warning for shard in shards for warning in shard.warnings]
    above = directory.absolute().parent / "tokenizer.model"
    if above.name not in folder.names and above.exists():
        warnings.append(f"{above.name} of the parent directory is not taken along; copy it beside {PARAMS} first")
    return Checkpoint(tensors, warnings=warnings, files=files)


def _shards(folder: Folder) -> dict[int, Path]:
    found = {entry.path: match for entry in folder.files if (match := _SHARD.fullmatch(entry.name))}
    return {int(match[1] or 0): path for path, match in found.items()}


def _complete(folder: Folder) -> list[Path]:
    shards = _shards(folder)
    for number in range(max(shards)):
        if number not in shards:
            raise SourceError(f"{folder.path}: shard consolidated.{number:02}.pth is missing; download it again")
    return [shards[number] for number in sorted(shards)]


def _check_same(
    first: Path, expected: Mapping[str, SourceTensor], path: Path, table: Mapping[str, SourceTensor]
) -> None:
    """Raise `SourceError` unless two shards have the same tensors."""
    for name in sorted(expected.keys() ^ table.keys()):
        have, lacks = (first, path) if name in expected else (path, first)
        raise SourceError(
            f"{path.parent}: tensor {name!r} is in {have.name}, but not in {lacks.name}; download them again"
        )
    for name, tensor in table.items():
        one, other = expected[name], tensor
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise SourceError(
                f"{path.parent}: tensor {name!r} is {_described(one)} in {first.name}, but {_described(other)} in {path.name}"
            )


@dataclass(frozen=True)
class _Layout:
    """Joins the parts of tensors in several shards."""

    directory: Path
    shards: int
    params: Mapping[str, Any]

    def merged(self, parts: Sequence[SourceTensor]) -> SourceTensor:
        """Return the whole tensor, of which each shard has a part or a copy."""
        name, shape = parts[0].name, parts[0].shape
        *_, kind, _weight = ["", *name.split(".")]
        if name == _EMBEDDINGS and len(shape) == 2:
            return self._embeddings(parts)
        if self.shards == 1:
            return parts[0]
        if len(shape) == 1 and kind.endswith("norm"):
            return Copies(parts, self.directory)
        if len(shape) == 2 and kind in ("wk", "wv"):
            return self._keys_or_values(parts)
        if len(shape) == 2 and kind in _DIMS:
            return Joined(parts, _DIMS[kind])
        raise SourceError(
            f"{self.directory}: it is not known how to join the parts of tensor {name!r} in {self.shards} shards; convert the "
            "Hugging Face version of this model"
        )

    def _embeddings(self, parts: Sequence[SourceTensor]) -> SourceTensor:
        """Join embeddings, which Llama 1 and 2 split along the features, and later ones along the vocabulary."""
        rows, cols = parts[0].shape
        dim = self._number("dim", cols if self.shards == 1 else None)
        vocab = self.params.get("vocab_size")
        vocab = vocab if isinstance(vocab, int) and vocab > 0 else None  # Llama 2 says -1
        for axis, shape in ((0, (rows * self.shards, cols)), (1, (rows, cols * self.shards))):
            if shape[1] == dim and vocab in (None, shape[0]):
                return Joined(parts, axis) if self.shards > 1 else parts[0]
        raise self._misfit(parts, f"dim {dim}" + (f" and vocab_size {vocab}" if vocab else ""))

    def _keys_or_values(self, parts: Sequence[SourceTensor]) -> SourceTensor:
        """Join the heads of keys or values; with more shards than heads, several shards have the same heads."""
        rows, cols = parts[0].shape
        heads = self._number("n_heads")
        total = self._number("n_kv_heads", heads) * self._number("head_dim", self._number("dim") // heads)
        if rows * self.shards == total:
            return Joined(parts, 0)
        distinct = total // rows if rows else 0
        if distinct * rows == total and distinct and self.shards % distinct == 0:
            groups: dict[bytes, list[SourceTensor]] = {}
            for part in parts:
                groups.setdefault(part.read(slice(0, cols)).data.tobytes(), []).append(part)
            if len(groups) == distinct and len({len(group) for group in groups.values()}) == 1:
                return Joined([Copies(group, self.directory) for group in groups.values()], 0)
        raise self._misfit(parts, f"the {total} rows that follow from n_kv_heads, n_heads and dim")

    def _misfit(self, parts: Sequence[SourceTensor], expected: str) -> SourceError:
        return SourceError(
            f"{self.directory}: tensor {parts[0].name!r}, {_described(parts[0])} in each of {self.shards} shards, does not fit "
            f"{expected} in {PARAMS}; shards are missing, or belong to another model"
        )

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.params.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise SourceError(f"{self.directory / PARAMS}: {key!r} must be a positive integer; download it again")
        return value


def _described(tensor: SourceTensor) -> str:
    return f"{tensor.dtype.name} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _read_params(directory: Path) -> dict[str, Any]:
    path = directory / PARAMS
    try:
        return read_object(path)
    except FileNotFoundError:
        raise SourceError(f"{path}: is missing, which is needed to join the shards; download it") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise SourceError(f"{path}: is not a JSON object; download it again") from None
