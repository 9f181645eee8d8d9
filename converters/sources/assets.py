"""The files of a directory that are taken along with its weights: every small file that is not one of weights.

Hidden files are left alone. Of everything else that is not taken, the name is in a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qformat.container.index import check_asset_name
from qformat.converters.sources.files import WEIGHTS
from qformat.converters.sources.hub_cache import blobs_of
from qformat.converters.sources.listing import Entry, Folder
from qformat.converters.sources.parallel_parts import whole_of_piece
from qformat.converters.sources.weight_files import weight_name
from qformat.converters.wording import and_more
from qformat.errors import FormatError, SourceError
from qformat.files import is_remote, open_regular, reading
from qformat.pipeline.source import Checkpoint

#: whether a file that begins so holds weights
IsWeights = Callable[[bytes], bool]

#: limits for one file, for all of them, and for their number
MAX_BYTES = 64 << 20
MAX_TOTAL = 256 << 20
MAX_FILES = 1000

_DEEPEST = 8
_MOST_ENTRIES = 20_000
_SHOWN = 20
# Weights and programs of other frameworks, archives, and whatever else is no small text
_OTHERS = (
    *WEIGHTS, ".qf", ".distcp", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".npz",
    ".pkl", ".pickle", ".joblib", ".nemo", ".engine", ".plan", ".pb", ".pdparams", ".pdopt", ".pdiparams", ".llamafile",
    ".incomplete", ".lock",
)  # fmt: skip
_SKIPPED = ("__pycache__",)
_OUTPUT = ".partial"  # a conversion's own folder
# The list of folders of sentence-transformers, whose configurations are needed though they may have weights
_MODULES = "modules.json"


@dataclass
class _Found:
    """What was found in a directory: files to take along by name, and names of others, by the reason."""

    taken: dict[str, Entry] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    beside: int = 0  # small files in folders of other weights
    leading_out: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    large: list[str] = field(default_factory=list)
    badly_named: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Return a line for each reason."""
        found = []
        if self.weights:
            others = f"; nor the other files in their folders ({self.beside})" if self.beside else ""
            found.append(f"not taken along: {_listed(self.weights)}{others}")
        limits = f"more than {MAX_BYTES >> 20} MiB, or {MAX_TOTAL >> 20} MiB and {MAX_FILES} files together"
        reasons = (
            ("links to files that are not there", self.dangling, "; download them again"),
            ("links that lead out of the directory", self.leading_out, "; copy the files themselves there"),
            ("no regular files", self.special, ""),
            (f"too large ({limits})", self.large, ""),
        )
        found += [f"left out, {reason}: {_listed(names)}{advice}" for reason, names, advice in reasons if names]
        return [*found, *(f"{cause}: left out" for cause in self.badly_named)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + and_more(names, _SHOWN)


def with_assets(folder: Folder, checkpoint: Checkpoint, is_weights: IsWeights) -> Checkpoint:
    """Return a checkpoint together with the files of its directory that belong to the model.

    A link is followed inside the directory, or to where the files of the checkpoint are: in the hub's cache, all files are links
    to one folder.
    """
    search = _Search(folder, checkpoint, is_weights)
    search.visit(folder, "", 0)
    taken = search.found.taken
    return replace(
        checkpoint,
        assets={**checkpoint.assets, **{name: partial(_read, entry.path) for name, entry in taken.items()}},
        warnings=[*checkpoint.warnings, *search.found.warnings()],
        files=[*checkpoint.files, *(entry.path for entry in taken.values())],
    )


class _Search:
    def __init__(self, folder: Folder, checkpoint: Checkpoint, is_weights: IsWeights) -> None:
        self.found = _Found()
        self._is_weights = is_weights
        self._given = checkpoint.assets
        self._used = {str(path) for path in checkpoint.files}
        self._size = self._seen = 0
        self._modules = _modules(folder)
        self._root, self._stores = folder.path, set[Path]()
        if not is_remote(folder.path):
            self._root, self._stores = folder.path.resolve(), _stores(folder.path, checkpoint.files)

    def visit(self, folder: Folder, prefix: str, depth: int) -> None:
        """Sort the entries of a folder, and of those in it."""
        for entry in folder.entries:
            name = prefix + entry.name
            if not entry.name.startswith(".") and str(entry.path) not in self._used and entry.kind != "folder":
                self._sort(name, entry)
        for entry in folder.folders:
            name = f"{prefix}{entry.name}"
            if entry.name in _SKIPPED or entry.name.endswith(_OUTPUT):
                continue
            if entry.is_link or depth == _DEEPEST:
                self.found.leading_out.append(name)
                continue
            inner = Folder(entry.path)
            if self._is_too_much(inner):
                self.found.large.append(name)
            elif depth or name in self._modules or not (weights := list(self._weights_below(inner, f"{name}/"))):
                self.visit(inner, f"{name}/", depth + 1)
            else:
                self.found.weights += weights

    def _is_too_much(self, folder: Folder) -> bool:
        self._seen += len(folder.entries)
        return self._seen > _MOST_ENTRIES or len(self.found.taken) == MAX_FILES

    def _weights_below(self, folder: Folder, prefix: str, depth: int = 0) -> Iterable[str]:
        """Yield the names of the files of weights in a folder and those in it, and count the others if there are any."""
        found = [prefix + entry.name for entry in folder.files if self._holds_weights(entry)]
        for entry in folder.folders if depth < _DEEPEST and self._seen < _MOST_ENTRIES else ():
            self._seen += 1
            found += self._weights_below(Folder(entry.path), f"{prefix}{entry.name}/", depth + 1)
        if found:
            self.found.beside += sum(not self._holds_weights(entry) for entry in folder.files)
        return found

    def _holds_weights(self, entry: Entry) -> bool:
        name = weight_name(entry.name)
        if entry.path.suffix in _OTHERS or (name and name.is_index) or whole_of_piece(entry.name):
            return True
        if is_remote(entry.path) or entry.kind != "file" or self._leads_out(entry):
            return False
        try:
            with open_regular(entry.path) as file:
                start = file.read(32)
        except OSError:
            return False
        return b"\0" in start and self._is_weights(start)

    def _sort(self, name: str, entry: Entry) -> None:
        if entry.kind == "dangling":
            self.found.dangling.append(name)
        elif entry.kind == "special":
            self.found.special.append(name)
        elif self._holds_weights(entry):
            self.found.weights.append(name)
        elif self._leads_out(entry):
            self.found.leading_out.append(name)
        elif entry.size > MAX_BYTES or self._size + entry.size > MAX_TOTAL or len(self.found.taken) == MAX_FILES:
            self.found.large.append(name)
        else:
            try:
                check_asset_name(name)
                if name in self._given:
                    raise FormatError(f"{name} has the name of what is stored of the weights")
            except FormatError as error:
                self.found.badly_named.append(error.cause)
                return
            self._size += entry.size
            self.found.taken[name] = entry

    def _leads_out(self, entry: Entry) -> bool:
        if not entry.is_link or is_remote(entry.path):
            return False
        end = entry.path.resolve()
        return not end.is_relative_to(self._root) and end.parent not in self._stores


def _stores(folder: Path, files: Iterable[Path]) -> set[Path]:
    """Return the folders outside a directory to which its links may lead: where those of weights lead, and the hub cache's."""
    linked = {path.resolve().parent for path in files if path.is_symlink()}
    blobs = blobs_of(folder)
    return linked | ({blobs} if blobs else set())


def _modules(folder: Folder) -> set[str]:
    """Return the folders of the parts of a sentence-transformers model."""
    if _MODULES not in folder.names:
        return set()
    try:
        with open_regular(folder.path / _MODULES) as file:
            modules = json.loads(file.read(MAX_BYTES))
        return {module["path"] for module in modules if isinstance(module.get("path"), str)}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return set()


def _read(path: Path) -> bytes:
    """Return a file; raise `SourceError` if it cannot be read, or has grown beyond the limit."""
    with reading(path), open_regular(path) as file:
        parts = []
        left = MAX_BYTES + 1
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise SourceError(f"{path}: has grown beyond {MAX_BYTES >> 20} MiB while it was read")
    return b"".join(parts)
