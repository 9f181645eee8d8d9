"""Export to a Hugging Face directory: safetensors weights, and the assets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat.container.partial import PartialFile, writing_failed
from qformat.converters.exports.outputs import Export, Job, Output, as_floats
from qformat.converters.exports.quantization import stated
from qformat.converters.exports.safetensors import write_safetensors
from qformat.converters.sources.gguf import REST
from qformat.converters.split import split
from qformat.errors import SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CONFIG = "config.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def export_hf(job: Job, output: Path) -> Export:
    """Write a directory that transformers can load, if it could load the original."""
    assets, metadata, warnings = _assets(job)
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


def _assets(job: Job) -> tuple[dict[str, bytes], Mapping[str, str], list[str]]:
    """Return the files to write beside the weights, the metadata of headers, and warnings."""
    path, index = job.container.path, job.container.index
    names = [asset.name for asset in index.assets]
    if REST in names:
        raise SourceError(
            f"{path}: was made from a GGUF file, so that its tensors have GGUF's names and there is no {_CONFIG}; use --to gguf, "
            "or --to safetensors for the tensors alone"
        )
    for name in names:
        if name.endswith(".safetensors") or name == INDEX:
            raise SourceError(f"{path}: asset {name!r} has the name of a file of weights; use --to safetensors")
    assets = {name: job.container.asset(name) for name in names}
    true = stated(path, assets, index.metadata, job.tensors.values())
    warnings = list(true.warnings)
    if _CONFIG not in assets:
        warnings.append(f"{path.name} holds no {_CONFIG}: transformers cannot load the directory without one")
    return dict(true.assets), true.metadata, warnings


def _index(names: Sequence[str], shards: Sequence[Sequence[Output]]) -> bytes:
    total = sum(output.nbytes for shard in shards for output in shard)
    places = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def is_replaceable(assets: Sequence[str], name: str) -> bool:
    """Return whether a file of a directory is one that an export with these assets writes, so that it may be replaced."""
    ours = name in assets
    return ours or name in (SINGLE, INDEX) or bool(_SHARD.fullmatch(name))
