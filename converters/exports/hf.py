"""Export to a Hugging Face directory: safetensors weights, and the assets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat.container.partial import PartialFile, writing_failed
from qformat.container.reader import ContainerReader
from qformat.converters.exports.outputs import Export, Job, Output, as_floats
from qformat.converters.exports.quantization import stated
from qformat.converters.exports.roles import is_activation_scale
from qformat.converters.exports.safetensors import write_safetensors
from qformat.converters.sources.container import ContainerTensor
from qformat.converters.sources.gguf import REST
from qformat.converters.split import split
from qformat.converters.weights_name import KEY, SUFFIX, WeightsName, name_for
from qformat.converters.wording import and_more
from qformat.errors import SourceError

_CONFIG = "config.json"
_USUAL = "model.safetensors"
# Keys of config.json that name the dtype of weights, and its names there
_DTYPES = ("dtype", "torch_dtype")
_DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def export_hf(job: Job, output: Path) -> Export:
    """Write a directory that the library which made the source can load, if it could load that."""
    name = _name_of(job.container)
    assets, metadata, warnings = _assets(job, name)
    tensors, left_out = _without_activations(job, metadata, assets)
    outputs = [as_floats(tensor, job.dtype) for tensor in tensors]
    if job.dtype is not None and not all(output.copied for output in outputs):
        warnings += _set_dtype(assets, _DTYPE_NAMES[job.dtype.id])
    size = job.shard_size if name.may_be_sharded else sum(output.nbytes for output in outputs) or 1
    shards = list(split(outputs, lambda output: output.nbytes, size))
    names = [name.single]
    if len(shards) > 1:
        names = name.shards(len(shards))
        assets[name.index] = _index(names, shards)
    files = {}
    try:
        for file in (name.single, *assets):
            (job.folder / output.name / file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(output, error, kept=False) from None
    for asset, data in assets.items():
        path = job.folder / output.name / asset
        with PartialFile(path, output / asset) as file_:
            file_.write(data, 0)
        files[asset] = len(data)
    for file, shard in zip(names, shards, strict=True):
        files[file] = write_safetensors(job, f"{output.name}/{file}", shard, metadata, output / file)
    return Export(output, files, outputs, [*warnings, *left_out])


def _name_of(container: ContainerReader) -> WeightsName:
    return name_for(container.index.metadata, [asset.name for asset in container.index.assets], container.asset)


def _assets(job: Job, name: WeightsName) -> tuple[dict[str, bytes], dict[str, str], list[str]]:
    """Return the files to write beside the weights, the metadata of headers, and warnings."""
    path, index = job.container.path, job.container.index
    names = [asset.name for asset in index.assets]
    if REST in names:
        raise SourceError(
            f"{path}: was made from a GGUF file, so that its tensors have GGUF's names and there is no {_CONFIG}; use --to gguf, "
            "or --to safetensors for the tensors alone"
        )
    for asset in names:
        if asset.endswith(SUFFIX) or name.is_own(asset):
            raise SourceError(f"{path}: asset {asset!r} has the name of a file of weights; use --to safetensors")
    assets = {asset: job.container.asset(asset) for asset in names}
    header = {key: text for key, text in index.metadata.items() if key != KEY}
    true = stated(path, assets, header, job.tensors.values())
    warnings = list(true.warnings)
    if _CONFIG not in assets and name.is_usual:
        warnings.append(f"{path.name} holds no {_CONFIG}: transformers cannot load the directory without one")
    return dict(true.assets), dict(true.metadata), warnings


def _without_activations(
    job: Job, metadata: Mapping[str, str], assets: Mapping[str, bytes]
) -> tuple[list[ContainerTensor], list[str]]:
    """Return the tensors to write, and warnings: with the configuration of quantization go the scales of activations."""
    tensors = list(job.tensors.values())
    source = {asset.name: job.container.asset(asset.name) for asset in job.container.index.assets}
    if assets == source and len(metadata) == len(job.container.index.metadata) - (KEY in job.container.index.metadata):
        return tensors, []
    left = [tensor.name for tensor in tensors if is_activation_scale(tensor.name)]
    warnings = [f"tensor {left[0]!r}{and_more(left)} only scales activations: left out"] if left else []
    return [tensor for tensor in tensors if tensor.name not in left], warnings


def _set_dtype(assets: dict[str, bytes], name: str) -> list[str]:
    """Name the dtype that weights have now in config.json, since loaders convert to it; return a warning if it was another."""
    try:
        values = json.loads(assets.get(_CONFIG, b"{}"))
    except (ValueError, RecursionError):
        return []
    parts = [values, *values.values()] if isinstance(values, dict) else []
    changed = {key: part for part in parts if isinstance(part, dict) for key in _DTYPES if part.get(key, name) != name}
    if not changed:
        return []
    before = next(part[key] for key, part in changed.items())
    for part in parts:
        if isinstance(part, dict):
            part |= {key: name for key in _DTYPES if key in part}
    assets[_CONFIG] = json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
    return [f"{next(iter(changed))} of {_CONFIG} was {before!r} and is {name!r} now, as --dtype says"]


def _index(names: Sequence[str], shards: Sequence[Sequence[Output]]) -> bytes:
    total = sum(output.nbytes for shard in shards for output in shard)
    places = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def is_replaceable(container: ContainerReader, name: str) -> bool:
    """Return whether a file of a directory is one that an export of a container writes, so that it may be replaced."""
    ours = any(asset.name == name for asset in container.index.assets)
    return ours or _name_of(container).is_own(name) or WeightsName(_USUAL).is_own(name)
