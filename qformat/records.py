"""What a container says of its tensors and assets: the vocabulary that codecs, container, converters and readers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Params = Mapping[str, int | str | bool]
JsonObject = dict[str, Any]

# Smaller errors are written as zero, so that all take the same number of digits.
_SMALLEST_ERROR = 1e-99


@dataclass(frozen=True)
class MeasuredError:
    """Difference between a source tensor and what its codes decode to, in the unit of the weights; layers have a mean, too."""

    rmse: float
    maximum: float
    mean: float | None = None

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        mean = {} if self.mean is None else {"mean": decimal(self.mean)}
        return {"rmse": decimal(self.rmse), "max": decimal(self.maximum)} | mean


@dataclass(frozen=True)
class Segment:
    """A run of bytes in the file; one that is a layer has the error of the tensor up to it."""

    name: str
    offset: int
    length: int
    sha256: str
    error: MeasuredError | None = None

    @property
    def stop(self) -> int:
        """Offset of the byte after the last."""
        return self.offset + self.length

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        record: JsonObject = {"name": self.name, "offset": self.offset, "length": self.length, "sha256": self.sha256}
        return record if self.error is None else record | {"error": self.error.to_json()}


@dataclass(frozen=True)
class Layer:
    """What a tensor is with one layer and all before it.

    Attributes
    ----------
    nbytes
        Bytes of its segments up to this layer.
    bpw
        Bits of these for each weight.
    error
        Against the source; zeros for the layer that makes it lossless.
    """

    nbytes: int
    bpw: float
    error: MeasuredError


@dataclass(frozen=True)
class TensorRecord:
    """What the index says of one tensor.

    ``refusal`` holds, for a record that may not be decoded because it uses an extension that this version does not know, the
    reason. ``range`` is the largest element less the smallest one, which only layered tensors tell.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    params: Params
    segments: tuple[Segment, ...]
    encoder: Params = field(default_factory=dict)
    error: MeasuredError | None = None
    refusal: str | None = None
    range: float | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"tensor {self.name!r}"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, of which a reader may leave out the last ones; empty if the tensor has none."""
        if self.range is None:
            return ()
        found, nbytes = [], 0
        for number, segment in enumerate(self.segments):
            nbytes += segment.length
            if number:
                error = segment.error or MeasuredError(0.0, 0.0, 0.0)
                found.append(Layer(nbytes, 8 * nbytes / self.elements if self.elements else 0.0, error))
        return tuple(found)

    def up_to(self, count: int) -> TensorRecord:
        """Return the record with its first layers only, which describes a tensor, too; `count` is from 1 to all of them."""
        if count >= len(self.segments) - 1:
            return self
        segments = self.segments[: count + 1]
        last = segments[-1].error
        error = None if last is None else replace(last, mean=None)
        return replace(self, segments=segments, error=error, params={**self.params, "layers": count, "lossless": False})

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, without padding."""
        return sum(segment.length for segment in self.segments)

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        record: JsonObject = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "codec": self.codec,
            "params": dict(self.params),
            "segments": [segment.to_json() for segment in self.segments],
        }
        if self.encoder:
            record["encoder"] = dict(self.encoder)
        if self.error is not None:
            record["error"] = self.error.to_json()
        if self.range is not None:
            record["range"] = decimal(self.range)
        return record


@dataclass(frozen=True)
class AssetRecord:
    """What the index says of one asset, a file that belongs to the model. Its one segment has its name."""

    encoding: str
    segment: Segment
    size: int
    content_sha256: str
    refusal: str | None = None

    @property
    def name(self) -> str:
        """Its relative path."""
        return self.segment.name

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"asset {self.name!r}"

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        own = {"encoding": self.encoding, "size": self.size, "content_sha256": self.content_sha256}
        return self.segment.to_json() | own


@dataclass(frozen=True)
class ShardRecord:
    """What the head of several files says of one of them: its name, its length, and the SHA-256 of its index."""

    name: str
    nbytes: int
    root: str

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        return {"name": self.name, "bytes": self.nbytes, "root_sha256": self.root}


def type_string(id_: str, params: Params) -> str:
    """Return ``id:key=value,key=value``."""
    values = ",".join(f"{key}={str(value).lower()}" for key, value in sorted(params.items()))
    return f"{id_}:{values}" if values else id_


def decimal(value: float) -> str:
    """Return an error as the index has it: all take the same number of digits."""
    return f"{value if value >= _SMALLEST_ERROR else 0.0:.9e}"
