"""Directories of several models: pipelines of diffusers, of which each part is a model in a folder of its own."""

from __future__ import annotations

from qformat.converters.sources.listing import Folder
from qformat.converters.sources.weight_files import weight_sets
from qformat.errors import SourceError

_INDEXES = ("model_index.json", "modular_model_index.json")


def check_pipeline(folder: Folder) -> None:
    """Raise `SourceError` if a directory is a pipeline, of which one model would be a part."""
    index = next((name for name in _INDEXES if name in folder.names), None)
    if index is None:
        return
    inner = [entry.name for entry in folder.folders if weight_sets(Folder(entry.path).files)]
    own = sorted(each.entry.name for each in weight_sets(folder.files).values())
    if not inner:
        return
    beside = f"; {', '.join(own)} beside them can be given alone" if own else ""
    raise SourceError(
        f"{folder.path}: is a pipeline of several models ({index}): convert each of its folders: {', '.join(inner)}{beside}"
    )
