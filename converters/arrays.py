"""Save numpy arrays in a container file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

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
    tensors: Mapping[str, NDArray[Any]],
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
        The arrays by name: any shape; float16/32/64, integers, bool, or ``ml_dtypes`` bfloat16 and float8.
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


def _checkpoint(
    tensors: Mapping[str, NDArray[Any]], assets: Mapping[str, bytes], metadata: Mapping[str, str]
) -> Checkpoint:
    sources = []
    for name, array in tensors.items():
        try:
            sources.append(ArrayTensor(name, from_array(array)))
        except (TypeError, AttributeError) as error:
            raise SourceError(f"tensor {name!r}: {error}") from None
    for name in assets:
        try:
            check_asset_name(name)
        except FormatError as error:
            raise SourceError(error.cause) from None
    readers = {name: partial(bytes, memoryview(data)) for name, data in assets.items()}
    return Checkpoint(sources, readers, metadata=metadata)
