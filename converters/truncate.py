"""Drop layers from a container file without decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qformat.container.partial import PartialFile
from qformat.container.reader import ContainerReader
from qformat.container.workspace import Workspace
from qformat.container.writer import ContainerWriter
from qformat.converters.sources.container import decoders_of, files_of
from qformat.quality import Quality


@dataclass(frozen=True)
class Truncation:
    """The result of truncating a file.

    Attributes
    ----------
    before, after
        Length of the file, in bytes.
    bpw
        Bits for each weight of all tensors together.
    root
        SHA-256 of the new index.
    """

    before: int
    after: int
    bpw: float
    root: str


def truncate(
    source: Path, output: Path, quality: Quality, *, root: str | None = None, overwrite: bool = False
) -> Truncation:
    """Write a file whose layered tensors have no more layers than a quality needs; everything else is copied.

    The result is, byte for byte, what converting the same weights to the same layers gives.

    Parameters
    ----------
    source
        A container file.
    output
        The file to write.
    quality
        Which layers to keep.
    root
        The root that the source must have.
    overwrite
        Replace a file at `output`.

    Raises
    ------
    FormatError
        If the source is damaged.
    QualityError
        If it holds no layered tensors, or their layers do not reach the quality.
    TargetError
        If the file cannot be written; nothing is left at `output` then.
    """
    with ContainerReader(source, root=root) as container:
        decoders = [*decoders_of(container, quality)]
        index = container.index
        fingerprint = f"truncate {container.root} {quality}"
        with Workspace(output, overwrite=overwrite, sources=files_of(container)) as workspace:
            workspace.claim(fingerprint)
            with (
                PartialFile(workspace.folder / workspace.target.name, output) as file,
                ContainerWriter(file, metadata=index.metadata) as writer,
            ):
                for asset in index.assets:
                    writer.asset(asset.name, container.asset(asset.name))
                for decoder in decoders:
                    writer.copy(decoder.record, decoder.segments)
            workspace.commit(fingerprint=fingerprint)
        weights = sum(record.elements for record in writer.records)
        stored = sum(record.nbytes for record in writer.records)
        bpw = 8 * stored / weights if weights else 0.0
        return Truncation(container.total_size, writer.file_size, bpw, writer.root)
