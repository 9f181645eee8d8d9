"""What a container says of its tensors and assets: the vocabulary that codecs, container, converters and readers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Params = Mapping[str, int | str | bool]
JsonObject = dict[str, Any]

# Smaller errors are written as zero, so that all take the same number of digits.
_SMALLEST_ERROR = 1e-99


@dataclass(frozen=True)
class Segment:
    """A run of bytes in the file."""

    name: str
    offset: int
    length: int
    sha256: str

    @property
    def stop(self) -> int:
        """Offset of the byte after the last."""
        return self.offset + self.length

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        return {"name": self.name, "offset": self.offset, "length": self.length, "sha256": self.sha256}


@dataclass(frozen=True)
class MeasuredError:
    """Difference between a source tensor and what its codes decode to, in the unit of the weights."""

    rmse: float
    maximum: float

    def to_json(self) -> JsonObject:
        """Return the record as it stands in the index."""
        return {"rmse": _decimal(self.rmse), "max": _decimal(self.maximum)}


@dataclass(frozen=True)
class TensorRecord:
    """What the index says of one tensor.

    ``refusal`` holds, for a record that may not be decoded because it uses an extension that this version does not know, the
    reason.
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

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"tensor {self.name!r}"

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


def type_string(id_: str, params: Params) -> str:
    """Return ``id:key=value,key=value``."""
    values = ",".join(f"{key}={str(value).lower()}" for key, value in sorted(params.items()))
    return f"{id_}:{values}" if values else id_


def _decimal(value: float) -> str:
    return f"{value if value >= _SMALLEST_ERROR else 0.0:.9e}"
