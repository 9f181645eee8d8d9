"""A container file as a source: its tensors at a quality, and its assets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from qformat.readers.decoding import SegmentChecker, TensorDecoder

from qformat.container.reader import ContainerReader
from qformat.dtypes import DType, Elements
from qformat.errors import FormatError, QualityError, SourceError, TargetError
from qformat.files import on_this_machine
from qformat.quality import Quality
from qformat.source import Checkpoint


@dataclass(frozen=True)
class ContainerTensor:
    """A tensor of a container, decoded piece by piece."""

    decoder: TensorDecoder
    checker: SegmentChecker

    @property
    def name(self) -> str:
        """Its name."""
        return self.decoder.record.name

    @property
    def dtype(self) -> DType:
        """What it decodes to: float32 if it is quantized."""
        return self.decoder.decoded

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.decoder.record.shape

    def read(self, elements: slice) -> Elements:
        """Return some elements, decoding the pieces that hold them."""
        try:
            self.checker.check(self.decoder)
            parts = []
            for piece in self.decoder.pieces():
                there = piece.elements(self.decoder.matrix)
                start, stop = max(there.start, elements.start), min(there.stop, elements.stop)
                if start < stop:
                    flat = self.decoder.decode(piece).data.reshape(-1)
                    parts.append(flat[start - there.start : stop - there.start])
        except FormatError as error:
            raise SourceError(str(error)) from None
        empty = np.empty(0, self.dtype.storage)
        return Elements(self.dtype, parts[0] if len(parts) == 1 else np.concatenate(parts or [empty]))


def open_container(path: Path, quality: Quality) -> Checkpoint:
    """Return the checkpoint in a container file.

    Raises
    ------
    SourceError
        If it is damaged, or a tensor cannot be decoded.
    QualityError
        If a quality is asked for and there are no layered tensors, or their layers do not reach it.
    """
    try:
        with on_this_machine(path) as here:
            container = ContainerReader(here)
    except FormatError as error:
        raise SourceError(str(error)) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    checker = SegmentChecker(enabled=True)
    try:
        tensors = [ContainerTensor(TensorDecoder(container, record, quality), checker) for record in container.tensors]
        check_layers(container, quality)
    except FormatError as error:
        container.close()
        raise SourceError(str(error)) from None
    except QualityError:
        container.close()
        raise
    assets: dict[str, Callable[[], bytes]] = {
        asset.name: partial(_asset, container, asset.name) for asset in container.index.assets
    }
    lossy = [tensor for tensor in tensors if tensor.decoder.record.error and tensor.decoder.record.elements]
    warnings = []
    if lossy:
        more = f" and {len(lossy) - 1} more" if len(lossy) > 1 else ""
        kind = lossy[0].decoder.record.codec
        warnings.append(
            f"tensor {lossy[0].name!r}{more} of {path.name} is not as it once was, but of type {kind}; errors are against what it "
            "decodes to"
        )
    files = [path, *(shard.path for shard in container.shards)]
    return Checkpoint(tensors, assets, warnings, files, container.index.metadata, str(quality))


def check_not_source(container: ContainerReader, output: Path) -> None:
    """Raise `TargetError` if a file is the container, or one of its shards."""
    if output.exists() and any(output.samefile(home.path) for home in (container, *container.shards)):
        raise TargetError(f"{output}: is the file that is to be read, or a part of it; give another name")


def check_layers(container: ContainerReader, quality: Quality) -> None:
    """Raise `QualityError` if a quality is asked for and no tensor is layered."""
    if quality != Quality() and not any(record.layers for record in container.tensors):
        raise QualityError(f"{container.path}: holds no layered tensors (type scm), so there is no quality to choose")


def _asset(container: ContainerReader, name: str) -> bytes:
    try:
        return container.asset(name)
    except FormatError as error:
        raise SourceError(str(error)) from None
