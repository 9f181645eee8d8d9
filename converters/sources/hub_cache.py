"""Folders of the hub's cache: ``models--org--name`` with ``blobs``, ``refs`` and ``snapshots/REVISION``, which holds links."""

from __future__ import annotations

from pathlib import Path

from qformat.converters.sources.listing import Folder
from qformat.errors import SourceError
from qformat.files import is_remote, reading

_SHOWN = 5


def snapshot_in(path: Path) -> Path:
    """Return the snapshot of a model's folder in the cache: that of its main branch, or the only one; other folders as they are.

    Raises `SourceError` if there is none, or no way to choose.
    """
    if (
        is_remote(path)
        or not (path / "snapshots").is_dir()
        or not ((path / "blobs").is_dir() or (path / "refs").is_dir())
    ):
        return path
    found = {entry.name: entry.path for entry in Folder(path / "snapshots").folders}
    main = path / "refs" / "main"
    if main.is_file():
        with reading(main), main.open("rb") as file:
            revision = file.read(200).decode("utf-8", "replace").strip()
        if revision in found:
            return found[revision]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise SourceError(f"{path}: is a folder of the hub's cache without a snapshot; download the model again")
    some = ", ".join(str(each) for each in list(found.values())[:_SHOWN])
    raise SourceError(f"{path}: is a folder of the hub's cache with {len(found)} snapshots; give one of them: {some}")


def blobs_of(folder: Path) -> Path | None:
    """Return the folder with the files to which the links of a snapshot lead."""
    absolute = folder.absolute()
    blobs = absolute.parent.parent / "blobs"
    return blobs.resolve() if absolute.parent.name == "snapshots" and blobs.is_dir() else None
