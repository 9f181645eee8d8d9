"""Export to a .safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from qformat.container.partial import PartialFile
from qformat.converters.exports.gguf_header import shapes_before_gguf
from qformat.converters.exports.outputs import Export, Job, Output, as_floats
from qformat.converters.exports.quantization import true_header
from qformat.converters.sources.safetensors import (
    DTYPE_NAMES,
    FORMAT,
    MAX_HEADER,
    METADATA,
    OPAQUE,
    OPAQUE_BITS,
    opaque_entries,
)
from qformat.converters.weights_name import KEY
from qformat.converters.wording import and_more
from qformat.errors import SourceError

_NAMES = {ours: theirs for theirs, ours in DTYPE_NAMES.items()}
_ALIGNMENT = 8


def export_safetensors(job: Job, output: Path) -> Export:
    """Write a file that holds every tensor as elements, with the container's metadata."""
    outputs = [as_floats(tensor, job.dtype) for tensor in job.tensors.values()]
    metadata = {key: text for key, text in job.container.index.metadata.items() if key != KEY}
    true = true_header(metadata, job.tensors.values())
    size = write_safetensors(job, output.name, outputs, true.metadata, output)
    assets = [asset.name for asset in job.container.index.assets]
    warnings = [f"left out, as a .safetensors file holds tensors only: {assets[0]}{and_more(assets)}"] if assets else []
    return Export(output, {output.name: size}, outputs, [*warnings, *true.warnings])


def write_safetensors(job: Job, name: str, outputs: Sequence[Output], metadata: Mapping[str, str], label: Path) -> int:
    """Write tensors into one file of the workspace, and return its length; `label` is its final path, for messages.

    They stand in the order in which the library writes them, large elements first, so that all are aligned.
    """
    texts = {key: text for key, text in metadata.items() if not key.startswith(OPAQUE)}
    opaque = opaque_entries(metadata)
    shapes = shapes_before_gguf(job)
    header: dict[str, object] = {METADATA: dict([FORMAT]) | texts}
    places: list[tuple[Output, int]] = []
    at = 0
    for output in sorted(outputs, key=lambda output: (-output.element_size, output.name)):
        if output.name in header:
            raise SourceError(
                f"{label}: tensor {output.name!r} cannot be in a .safetensors file, where it means metadata"
            )
        dtype, shape = opaque.get(output.name, ("", []))
        if output.codec.id != "u8" or not dtype or prod(shape) * OPAQUE_BITS[dtype] != 8 * output.nbytes:
            dtype, shape = _NAMES[output.codec.id], list(shapes.get(output.name, output.shape))
        header[output.name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at, at + output.nbytes],
        }
        places.append((output, at))
        at += output.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise SourceError(f"{label}: its header would be {len(text)} bytes, more than {MAX_HEADER}; use --to hf")
    start = 8 + len(text)
    with PartialFile(job.folder / name, label) as file:
        job.write(file, [(output, start + place) for output, place in places])
        file.write(len(text).to_bytes(8, "little") + text, 0)
    return start + at
