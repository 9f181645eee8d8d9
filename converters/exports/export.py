"""Export a container file to other formats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from qformat.codecs.base import ChunkEncoder
from qformat.codecs.registry import parse_type
from qformat.container.reader import ContainerReader
from qformat.container.workspace import Workspace
from qformat.converters.exports.gguf import export_gguf
from qformat.converters.exports.hf import export_hf, is_replaceable
from qformat.converters.exports.outputs import DEFAULT_SHARD, Export, Job
from qformat.converters.exports.safetensors import export_safetensors
from qformat.converters.sources.container import ContainerTensor, decoders_of, files_of
from qformat.errors import TypeSpecError
from qformat.parallel import default_jobs
from qformat.pipeline.encode import Progress
from qformat.quality import Quality

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class ExportFormat:
    """A format of other tools.

    Attributes
    ----------
    write
        Writes the output into the folder of the job.
    dtypes
        Types that tensors may be given.
    replaceable
        Of a format that is a directory: whether an export of a container writes a file of this name.
    """

    write: Callable[[Job, Path], Export]
    dtypes: Sequence[str] = _FLOATS
    replaceable: Callable[[ContainerReader, str], bool] | None = None


Format = Literal["gguf", "safetensors", "hf"]

FORMATS: Mapping[str, ExportFormat] = {
    "gguf": ExportFormat(export_gguf, (*_FLOATS, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")),
    "safetensors": ExportFormat(export_safetensors),
    "hf": ExportFormat(export_hf, replaceable=is_replaceable),
}


def export(
    source: Path,
    output: Path,
    to: Format,
    *,
    dtype: str | None = None,
    quality: Quality | float | str | None = None,
    root: str | None = None,
    shard_size: int = DEFAULT_SHARD,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write what a container file holds in another format.

    Parameters
    ----------
    source
        The container file.
    output
        The file to write; for ``hf`` the directory.
    to
        The format: ``gguf``, ``safetensors``, or ``hf`` for a Hugging Face directory.
    dtype
        Type of quantized tensors that the format cannot hold as they are: ``f32``, ``f16``, ``bf16``; for ``gguf`` also a block
        type such as ``q8_0``. None is the dtype that each tensor had in its source, for ``gguf`` ``f16``.
    quality
        How much to read of layered tensors.
    root
        The root that the container must have.
    shard_size
        Most bytes of tensors in one file of an ``hf`` directory; a larger tensor has a file for itself.
    overwrite
        Replace what stands at `output`; a directory only if it holds nothing but what would be written.
    jobs, progress
        Threads (None is one for each processor), and a callback that receives the number of elements just written.

    Raises
    ------
    FormatError, SourceError
        If the source is damaged, or does not hold what the format needs.
    QualityError, TypeSpecError
        If layers do not reach the quality, or the format has no such type.
    TargetError
        If the output cannot be written; nothing is left there then.
    """
    start = time.perf_counter()
    format_ = FORMATS[to]
    chosen = None if dtype is None else _parse_dtype(dtype, to, format_.dtypes)
    asked = Quality.parse(quality)
    with ContainerReader(source, root=root) as container:
        tensors = {decoder.record.name: ContainerTensor(decoder) for decoder in decoders_of(container, asked)}
        replaceable = partial(format_.replaceable, container) if format_.replaceable else None
        fingerprint = f"export {container.root} {to} {chosen} {asked} {shard_size}"
        sources = files_of(container)
        with Workspace(output, overwrite=overwrite, replaceable=replaceable, sources=sources) as workspace:
            workspace.claim(fingerprint)
            job = Job(container, tensors, workspace.folder, chosen, jobs or default_jobs(), progress, shard_size)
            done = format_.write(job, workspace.target)
            workspace.commit(fingerprint=fingerprint)
    return replace(done, output=output, seconds=time.perf_counter() - start)


def _parse_dtype(dtype: str, to: Format, allowed: Sequence[str]) -> ChunkEncoder:
    codec = parse_type(dtype)
    # entropy-coded blocks have the id of plain ones, and a parameter
    if not isinstance(codec, ChunkEncoder) or codec.id not in allowed or codec.params():
        raise TypeSpecError(f"type {dtype!r}: an export to {to} can hold {', '.join(allowed)}")
    return codec
