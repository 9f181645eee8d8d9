"""Save arrays of numpy and tensors of torch in a container file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qformat.container.index import check_asset_name
from qformat.converters.convert import convert
from qformat.converters.output import WriteOptions
from qformat.converters.prune import Pruning
from qformat.dtypes import Elements, from_array
from qformat.errors import FormatError, SourceError
from qformat.files import as_path
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, SourceTensor


class ArrayTensor(SourceTensor):
    """An array in memory as a source tensor."""

    def __init__(self, name: str, elements: Elements) -> None:
        self.name, self.dtype, self.shape = name, elements.dtype, elements.data.shape
        self.elements = elements

    def read(self, elements: slice) -> Elements:
        """Return a view of some elements."""
        return Elements(self.dtype, self.elements.data.reshape(-1)[elements])


def save_file(
    tensors: Mapping[str, Any],
    path: str | bytes | os.PathLike[str],
    types: str | Mapping[str, str] | None = None,
    *,
    prune: float | Mapping[str, float] = 0.0,
    metadata: Mapping[str, str] | None = None,
    assets: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_zeroed: bool = False,
    jobs: int | None = None,
) -> str:
    """Store arrays in one file.

    Parameters
    ----------
    tensors
        The arrays of numpy or tensors of torch by name: any shape and strides; floats (also bfloat16 and float8 of torch or
        ``ml_dtypes``), integers, bool.
    path
        The file to write.
    types
        A type string such as ``"q4_0"`` for floating arrays of two or more dimensions, or a mapping from shell patterns to type
        strings, of which the last match wins; None stores every array as it is.
    prune
        Share of the weights, the smallest ones, to set to zero first: in floating arrays of two or more dimensions other than
        embeddings and output heads (`qformat.converters.prune.NOT_PRUNED`); or a mapping from patterns to shares.
    metadata, assets
        Strings by key, and contents of files by relative name, to store along.
    overwrite
        Replace a file at `path`.
    allow_nonfinite
        Keep arrays with NaN or infinity as they are, whatever `types` says.
    allow_zeroed
        Accept blocks that become zero because their weights are too small for the type.
    jobs
        Threads; None is one for each processor. The bytes of the file do not depend on it.

    Returns
    -------
    str
        The root: SHA-256 of the file's index, in hexadecimal.

    Raises
    ------
    SourceError
        If an array cannot be stored (its dtype, NaN or infinity, values that the type cannot hold).
    TypeSpecError
        If a type string or a share is malformed, or a pattern matches no array.
    TargetError
        If the file cannot be written; nothing is left at `path` then.
    """
    recipe = Recipe.parse(types) if isinstance(types, str) or types is None else Recipe.parse(None, types)
    pruning = Pruning.parse(0.0, prune) if isinstance(prune, Mapping) else Pruning.parse(prune)
    checkpoint = pruning.apply(_checkpoint(tensors, assets or {}, metadata or {}))
    options = WriteOptions(overwrite=overwrite, jobs=jobs, allow_nonfinite=allow_nonfinite, allow_zeroed=allow_zeroed)
    result = convert(checkpoint, as_path(path), recipe, options)
    assert result.root is not None  # it was no dry run
    return result.root


def _elements(array: Any) -> Elements:
    """Return the elements of an array of numpy, or a tensor of torch; raise `TypeError` if it is neither, or cannot be stored."""
    torch = sys.modules.get("torch")  # where there is a tensor, it is imported
    if torch is not None and isinstance(array, torch.Tensor):
        from qformat.converters.torch_arrays import elements_of

        return elements_of(array)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array cannot be stored; fill it first, as with array.filled(0)")
    if not isinstance(array, np.ndarray | np.generic):
        raise TypeError(f"a {type(array).__name__} is no array; give numpy.asarray of it, or a torch tensor")
    return from_array(np.asarray(array))


def _checkpoint(tensors: Mapping[str, Any], assets: Mapping[str, bytes], metadata: Mapping[str, str]) -> Checkpoint:
    sources = []
    for name, array in tensors.items():
        if not isinstance(name, str):
            raise SourceError(f"names of tensors are strings, not {name!r} ({type(name).__name__})")
        try:
            sources.append(ArrayTensor(name, _elements(array)))
        except TypeError as error:
            raise SourceError(f"tensor {name!r}: {error}") from None
    for name in assets:
        try:
            check_asset_name(name)
        except FormatError as error:
            raise SourceError(error.cause) from None
    readers = {name: partial(bytes, memoryview(data)) for name, data in assets.items()}
    return Checkpoint(sources, readers, metadata=metadata)
