"""The entries of a folder, on this machine or behind a URL, found with one call."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from qformat.files import is_remote, reading


class Entry(NamedTuple):
    """A name in a folder; kind and size are those of the end of a link, ``dangling`` if there is none."""

    path: Path
    kind: Literal["file", "folder", "dangling", "special"]
    size: int = 0
    is_link: bool = False

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.name


@dataclass(frozen=True)
class Folder:
    """A folder with its entries."""

    path: Path

    @cached_property
    def entries(self) -> list[Entry]:
        """All entries, sorted by name; raises `SourceError` if they cannot be listed."""
        with reading(self.path):
            found = _remote_entries(self.path) if is_remote(self.path) else _local_entries(self.path)
        return sorted(found, key=lambda entry: entry.name)

    @cached_property
    def names(self) -> set[str]:
        """The names of all entries."""
        return {entry.name for entry in self.entries}

    @property
    def files(self) -> list[Entry]:
        """Files, and links that lead nowhere; the hidden ones are not among them."""
        return [e for e in self.entries if e.kind in ("file", "dangling") and not e.name.startswith(".")]

    @property
    def folders(self) -> list[Entry]:
        """Folders, but hidden ones."""
        return [entry for entry in self.entries if entry.kind == "folder" and not entry.name.startswith(".")]


def _local_entries(folder: Path) -> list[Entry]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            try:
                status = entry.stat()
            except OSError:
                found.append(Entry(path, "dangling", 0, entry.is_symlink()))
                continue
            found.append(Entry(path, _kind(status.st_mode), status.st_size, entry.is_symlink()))
    return found


def _kind(mode: int) -> Literal["file", "folder", "special"]:
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "special"


def _remote_entries(folder: Path) -> list[Entry]:
    found = []
    for info in folder.fs.ls(folder.path, detail=True):  # type: ignore[attr-defined]
        name = info["name"].rstrip("/").rpartition("/")[2]
        if name and name != folder.name:
            found.append(Entry(folder / name, "folder" if info["type"] == "directory" else "file", info["size"] or 0))
    return found
