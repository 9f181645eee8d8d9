"""The names of files of weights: each library looks for its own.

The name in the source is kept in the metadata of a container, unless it is the usual one, and comes back in an export to a Hugging
Face directory. Exports are safetensors files, so that other suffixes are replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from qformat.converters.sources.files import WEIGHTS
from qformat.pipeline.source import Checkpoint

#: the key of the metadata
KEY = "qformat.weights_name"
SUFFIX = ".safetensors"

_USUAL = "model.safetensors"
_NUMBERS = re.compile(r"(-[0-9]+-of-[0-9]+)(?=\.)|(?<=^consolidated)\.[0-9]+(?=\.pth$)")
# What a library calls the files of torch and of safetensors
_OF_TORCH = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}
# Weights with other names are not looked for in shards
_SHARDED = ("model", "diffusion_pytorch_model")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.safetensors")

# The names that belong to files beside the weights, for containers without a name in the metadata
_BY_ASSETS = {
    "adapter_config.json": "adapter_model.safetensors",
    "open_clip_config.json": "open_clip_model.safetensors",
    "config.json": _USUAL,
    "params.json": "consolidated.safetensors",
}
_CONFIG, _DIFFUSERS = "config.json", "_diffusers_version"


def named(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint of a directory with the name of its weights in the metadata, if it is not the usual one."""
    files = [path.name for path in checkpoint.files if path.suffix in WEIGHTS and path.suffix != ".gguf"]
    if not files:
        return checkpoint
    stem, *parts = _NUMBERS.sub("", files[0]).removesuffix(PurePath(files[0]).suffix).split(".")
    name = ".".join((_OF_TORCH.get(stem, stem), *parts)) + SUFFIX
    if name == _USUAL or not _NAME.fullmatch(name):
        return checkpoint
    return replace(checkpoint, metadata={**checkpoint.metadata, KEY: name})


def name_for(metadata: Mapping[str, str], assets: Collection[str], read: Callable[[str], bytes]) -> WeightsName:
    """Return the name of the weights of a container, by its metadata, else by the files beside them."""
    recorded = metadata.get(KEY, "")
    if _NAME.fullmatch(recorded) and recorded not in assets:
        return WeightsName(recorded)
    name = next((name for asset, name in _BY_ASSETS.items() if asset in assets), _USUAL)
    if _CONFIG in assets and name == _USUAL and _is_of_diffusers(read(_CONFIG)):
        name = "diffusion_pytorch_model.safetensors"
    return WeightsName(name)


def _is_of_diffusers(config: bytes) -> bool:
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and _DIFFUSERS in values


@dataclass(frozen=True)
class WeightsName:
    """The name of a file of weights, and of the shards and the index in its place.

    Attributes
    ----------
    single
        The name of the file.
    """

    single: str

    @property
    def is_usual(self) -> bool:
        """Whether transformers looks for it."""
        return self._parts[0] == "model"

    @property
    def may_be_sharded(self) -> bool:
        """Whether shards are looked for in place of the file."""
        return self._parts[0] in _SHARDED and len(self._parts) <= 2

    @property
    def index(self) -> str:
        """The name of the index of shards."""
        stem, *variant = self._parts
        return ".".join((f"{stem}{SUFFIX}.index", *variant, "json"))

    def shards(self, count: int) -> list[str]:
        """Return the names of shards."""
        stem = self.single.removesuffix(SUFFIX)
        return [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]

    def is_own(self, name: str) -> bool:
        """Return whether a file of this name is the file, a shard or the index."""
        return name in (self.single, self.index) or _NUMBERS.sub("", name) == self.single

    @property
    def _parts(self) -> list[str]:
        return self.single.removesuffix(SUFFIX).split(".")
