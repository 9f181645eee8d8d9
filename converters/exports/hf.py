"""Export to a Hugging Face directory: safetensors weights, and the assets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qformat.container.partial import PartialFile, writing_failed
from qformat.converters.exports.outputs import Export, Job, Output, as_floats
from qformat.converters.exports.safetensors import write_safetensors
from qformat.converters.sources.gguf import REST
from qformat.converters.split import split
from qformat.errors import SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CONFIG = "config.json"
_QUANTIZATIONS = ("quantize_config.json", "quantization_config.json")
_QUANTIZATION = "quantization_config"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def export_hf(job: Job, output: Path) -> Export:
    """Write a directory that transformers can load, if it could load the original."""
    assets, warnings = _assets(job)
    outputs = [as_floats(tensor, job.dtype) for tensor in job.tensors.values()]
    shards = list(split(outputs, lambda output: output.nbytes, job.shard_size))
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        assets[INDEX] = _index(names, shards)
    else:
        names = [SINGLE]
    files = {}
    try:
        for name in (SINGLE, *assets):
            (job.folder / output.name / name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(output, error, kept=False) from None
    for name, data in assets.items():
        path = job.folder / output.name / name
        with PartialFile(path, output / name) as file:
            file.write(data, 0)
        files[name] = len(data)
    metadata = job.container.index.metadata
    for name, shard in zip(names, shards, strict=True):
        files[name] = write_safetensors(job, f"{output.name}/{name}", shard, metadata, output / name)
    return Export(output, files, outputs, warnings)


def _assets(job: Job) -> tuple[dict[str, bytes], list[str]]:
    """Return the files to write beside the weights, and warnings."""
    path, index = job.container.path, job.container.index
    names = [asset.name for asset in index.assets]
    if REST in names:
        raise SourceError(
            f"{path}: was made from a GGUF file, so that its tensors have GGUF's names and there is no {_CONFIG}; use --to gguf, "
            "or --to safetensors for the tensors alone"
        )
    assets = {name: job.container.asset(name) for name in names if name not in _QUANTIZATIONS}
    left_out = [
        f"{name} is left out, since the weights are plain numbers now" for name in names if name in _QUANTIZATIONS
    ]
    for name in names:
        if name.endswith(".safetensors") or name == INDEX:
            raise SourceError(f"{path}: asset {name!r} has the name of a file of weights; use --to safetensors")
    if _CONFIG not in assets:
        return assets, [
            *left_out,
            f"{path.name} holds no {_CONFIG}: transformers cannot load the directory without one",
        ]
    plain = _without_quantization(assets[_CONFIG])
    if plain is None:
        return assets, left_out
    assets[_CONFIG] = plain
    return assets, [*left_out, f"{_QUANTIZATION} is left out of {_CONFIG}, since the weights are plain numbers now"]


def _without_quantization(config: bytes) -> bytes | None:
    """Return config.json without quantization, or None if there is nothing to remove."""
    try:
        values: Any = json.loads(config)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or _QUANTIZATION not in values:
        return None
    del values[_QUANTIZATION]
    return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"


def _index(names: Sequence[str], shards: Sequence[Sequence[Output]]) -> bytes:
    total = sum(output.nbytes for shard in shards for output in shard)
    places = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def is_replaceable(assets: Sequence[str], name: str) -> bool:
    """Return whether a file of a directory is one that an export with these assets writes, so that it may be replaced."""
    ours = name in assets and name not in _QUANTIZATIONS
    return ours or name in (SINGLE, INDEX) or bool(_SHARD.fullmatch(name))
