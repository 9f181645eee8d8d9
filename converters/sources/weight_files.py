"""Files of weights by their names: sets of shards, their indexes, and variants such as fp16.

A variant may stand in three places: ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors`` and
``model-00001-of-00002.fp16.safetensors``; and in two of an index, ``model.safetensors.index.fp16.json`` and
``model.safetensors.fp16.index.json``. All files of a set have the name of its single file in common, without numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from qformat.converters.sources.files import WEIGHTS
from qformat.converters.sources.listing import Entry

#: the number of a shard in its name, and how many there are
NUMBER = re.compile(r"[-_.]([0-9]+)[-_]of[-_]([0-9]+)(?=\.)")
# State of a training run
_STATE = (
    "training_args.bin",
    "*optim.*",
    "optim_*",
    "*optimizer*",
    "*_optim_states*",
    "scheduler*",
    "scaler*",
    "sampler*",
    "rng_state*",
    "random_states*",
    "extra_state*",
)


class WeightName(NamedTuple):
    """The name of a file of weights, or of an index, taken apart; a file that is not numbered is the first of one."""

    single: str  # the name that a single file would have
    number: int = 1
    total: int = 1
    is_index: bool = False


def weight_name(name: str) -> WeightName | None:
    """Return the parts of a name, or None if it is neither that of weights nor of an index."""
    stem, *parts = name.split(".")
    if parts[-1:] == ["json"] and "index" in parts:
        del parts[-1], parts[parts.index("index")]
        for at, part in enumerate(parts):
            if f".{part}" in WEIGHTS:
                return WeightName(".".join((stem, *parts[:at], *parts[at + 1 :], part)), is_index=True)
        return None
    if not parts or f".{parts[-1]}" not in WEIGHTS:
        return None
    numbers = list(NUMBER.finditer(name))
    if not numbers:
        return WeightName(name)
    found = numbers[-1]
    return WeightName(name[: found.start()] + name[found.end() :], int(found[1]), int(found[2]))


def is_training_state(name: str) -> bool:
    """Return whether a file has a usual name for the state of an optimizer, a scheduler or random numbers."""
    return not name.endswith(".safetensors") and any(fnmatchcase(name, pattern) for pattern in _STATE)


@dataclass
class WeightSet:
    """Files of one checkpoint by their names: a single one, shards, an index, or several of these."""

    name: str
    single: Path | None = None
    index: Path | None = None
    shards: list[Path] = field(default_factory=list)

    @property
    def suffix(self) -> str:
        """The suffix of the files with weights."""
        return Path(self.name).suffix

    @property
    def paths(self) -> list[Path]:
        """All its files."""
        return [*([self.index] if self.index else ()), *([self.single] if self.single else ()), *self.shards]

    @property
    def entry(self) -> Path:
        """The file to give for the whole set, if that is possible with one."""
        return self.paths[0]


def weight_sets(entries: Iterable[Entry]) -> dict[str, WeightSet]:
    """Return the sets of weights among the files of a folder, by name."""
    sets: dict[str, WeightSet] = {}
    for entry in entries:
        name = weight_name(entry.name)
        if name is None or is_training_state(entry.name):
            continue
        own = sets.setdefault(name.single, WeightSet(name.single))
        if name.is_index:
            own.index = own.index or entry.path
        elif entry.name == name.single:
            own.single = entry.path
        else:
            own.shards.append(entry.path)
    return sets


def variant_of(name: str, usual: Sequence[str]) -> tuple[int, str] | None:
    """Return which of some usual names a name is a variant of, by its position, and the variant."""
    for position, each in enumerate(usual):
        stem, dot, suffix = each.rpartition(".")
        if name.startswith(f"{stem}.") and name.endswith(dot + suffix) and len(name) > len(each) + 1:
            return position, name[len(stem) + 1 : -len(suffix) - 1]
    return None
