"""The index: what a file holds, as canonical JSON (spec/container.md, section 3)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qformat.container.layout import align
from qformat.errors import FormatError
from qformat.records import AssetRecord, JsonObject, MeasuredError, Params, Segment, ShardRecord, TensorRecord

MAX_INDEX_BYTES = 64 << 20
MAX_ASSET_BYTES = 256 << 20
MAX_ASSETS_BYTES = 4 << 30  # of all together
MAX_INTEGER = 2**53 - 1
MAX_DIMENSIONS = 16
_MAX_NAME_BYTES = 1024
_MAX_DEPTH = 32
# Objects take some 25 times their bytes of JSON in memory: counted before anything is parsed, strings included
_MAX_BRACKETS = 1 << 21
_MAX_COMMAS = 1 << 22
_MAX_FOLDERS = 16

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ERROR_VALUE = re.compile(r"[0-9]\.[0-9]{9}e[+-][0-9]{2}")  # and it has to print as itself
_CONTROL = re.compile("[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Index:
    """Everything that a file holds; or, if it is the head of several files, the shards that hold its tensors."""

    header_sha256: str
    tensors: tuple[TensorRecord, ...] = ()
    assets: tuple[AssetRecord, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[ShardRecord, ...] = ()

    def encode(self) -> bytes:
        """Return the index's bytes."""
        top: JsonObject = {
            "header_sha256": self.header_sha256,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "assets": [asset.to_json() for asset in self.assets],
            "metadata": dict(self.metadata),
        }
        if self.shards:
            top |= {"shards": [shard.to_json() for shard in self.shards], "must_understand": ["shards"]}
        return canonical_json(top)

    @classmethod
    def parse(cls, data: bytes) -> Index:
        """Parse an index and check every field that does not depend on a codec.

        Raises
        ------
        FormatError
            If it is not a valid index. The position in the file of the segments is checked by `check_segments`.
        """
        top = _parse_canonical(data)
        refusal = _refusal(top, {"header_sha256", "tensors", "assets", "metadata", "shards"}, "the file")
        if refusal:
            raise FormatError(refusal)
        metadata = _get(top, "metadata", dict, "the index")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise FormatError("the index: metadata values must be strings")
        index = cls(
            _digest(top, "header_sha256", "the index"),
            tuple(parse_tensor(record) for record in _get(top, "tensors", list, "the index")),
            tuple(parse_asset(record) for record in _get(top, "assets", list, "the index")),
            metadata,
            _shards(top),
        )
        check_sorted("tensor", (tensor.name for tensor in index.tensors))
        check_sorted("asset", (asset.name for asset in index.assets))
        check_folders(asset.name for asset in index.assets)
        if sum(asset.size for asset in index.assets) > MAX_ASSETS_BYTES:
            raise FormatError(f"the assets claim more than {MAX_ASSETS_BYTES} bytes together")
        return index

    def segments(self) -> list[tuple[TensorRecord | AssetRecord, Segment]]:
        """Return (owner, segment) for every segment, in the order of the file."""
        owned: list[tuple[TensorRecord | AssetRecord, Segment]] = [(asset, asset.segment) for asset in self.assets]
        owned += [(tensor, segment) for tensor in self.tensors for segment in tensor.segments]
        return sorted(owned, key=lambda item: (item[1].offset, item[1].length))

    def check_segments(self, header_size: int, index_offset: int) -> None:
        """Check that the segments follow each other without a gap or overlap, from the header to the index.

        Raises
        ------
        FormatError
            If they do not.
        """
        expected = header_size
        for owner, segment in self.segments():
            if segment.offset != expected:
                raise FormatError(
                    f"{owner.label}, segment {segment.name!r}: it should begin at byte {expected}",
                    offset=segment.offset,
                )
            expected = align(segment.stop)
            if segment.stop > index_offset:
                raise FormatError(
                    f"{owner.label}, segment {segment.name!r}: it runs into the index", offset=segment.offset
                )
        if expected != index_offset:
            raise FormatError(f"the index should begin at byte {expected}", offset=index_offset)


def check_index_size(data: bytes) -> None:
    """Raise `FormatError` if an index is too long, or holds too many values."""
    if len(data) > MAX_INDEX_BYTES:
        raise FormatError(f"the index would be {len(data)} bytes, more than an index may have")
    if data.count(b"{") + data.count(b"[") > _MAX_BRACKETS or data.count(b",") > _MAX_COMMAS:
        raise FormatError("the index holds more values than an index may have")


def canonical_json(value: JsonObject) -> bytes:
    """Encode `value` in the one form that an index may have."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_tensor_name(name: str) -> None:
    """Raise `FormatError` if a tensor must not have this name."""
    _check_name(name, "tensor")


def check_asset_name(name: str) -> None:
    """Raise `FormatError` if an asset must not have this name: it has to be a relative path that stays inside."""
    _check_name(name, "asset")
    parts = name.split("/")
    if "\\" in name or ":" in name or len(parts) > _MAX_FOLDERS or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"asset name {name[:80]!r} is not a plain relative path")


def check_shape(shape: Sequence[int], where: str) -> None:
    """Raise `FormatError` if a tensor must not have this shape; the message begins with `where`."""
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where}: it has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if math.prod(n for n in shape if n) > MAX_INTEGER:
        raise FormatError(f"{where}: its shape has too many elements")


def check_sorted(what: str, names: Iterable[str]) -> None:
    """Raise `FormatError` if names are not sorted, or one stands twice."""
    for before, after in pairwise(names):
        if before >= after:
            raise FormatError(f"{what} records are not sorted by name, or one stands twice: {after[:80]!r}")


def check_folders(names: Iterable[str]) -> None:
    """Raise `FormatError` if an asset's name is that of a folder of another one."""
    every = set(names)
    for name in every:
        parts = name.split("/")
        if any("/".join(parts[:i]) in every for i in range(1, len(parts))):
            raise FormatError(f"asset {name[:80]!r}: a part of its path is an asset itself")


def _check_name(name: str, what: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise FormatError(f"{what} name {name!r} is not valid Unicode") from None
    if not size:
        raise FormatError(f"{what} name '' is empty")
    if size > _MAX_NAME_BYTES:
        raise FormatError(f"{what} name {name[:40]!r}... is {size} bytes, more than {_MAX_NAME_BYTES}")
    if _CONTROL.search(name):
        raise FormatError(f"{what} name {name[:80]!r} holds control characters")


def _parse_canonical(data: bytes) -> JsonObject:
    check_index_size(data)
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise FormatError("the index is not a JSON object")
        _check_values(value, 1)
        same = canonical_json(value) == data
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the index is not valid JSON: {str(error)[:200]}") from None
    if not same:
        raise FormatError("the index is not in canonical form")
    return value


def _check_values(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH and isinstance(value, (dict, list)):
        raise FormatError("the index is nested too deeply")
    if isinstance(value, dict):
        for item in value.values():
            _check_values(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, depth + 1)
    elif isinstance(value, (str, bool)):
        pass
    elif not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
        raise FormatError(
            f"the index holds {str(value)[:40]}: only integers from 0 to 2^53 - 1 are allowed, and no null"
        )


def _get(record: JsonObject, key: str, kind: type, where: str) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{where}: {key!r} is missing or not of type {kind.__name__}")
    return value


def _digest(record: JsonObject, key: str, where: str) -> str:
    value: str = _get(record, key, str, where)
    if not _SHA256.fullmatch(value):
        raise FormatError(f"{where}: {key!r} is not a SHA-256 in lower-case hexadecimal")
    return value


def _refusal(record: JsonObject, known: set[str], where: str) -> str | None:
    """Return why a record may not be used, if it names a key that must be understood and is not."""
    known = known | {"must_understand"}
    names = record.get("must_understand", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{where}: 'must_understand' is not a list of strings")
    unknown = [name for name in names if name not in known]
    if unknown:
        return f"{where} needs {unknown[0][:80]!r}, which this version does not know: use a newer one"
    return None


def _record(value: Any, what: str) -> tuple[JsonObject, str]:
    if not isinstance(value, dict):
        raise FormatError(f"the index holds {what} record that is not an object")
    return value, f"{what} {_get(value, 'name', str, what)[:80]!r}"


def _segment(value: Any, owner: str) -> tuple[Segment, str | None]:
    if not isinstance(value, dict):
        raise FormatError(f"{owner}: a segment record is not an object")
    where = f"{owner}, segment {_get(value, 'name', str, owner)[:80]!r}"
    _check_name(value["name"], "segment")
    segment = Segment(
        value["name"],
        _get(value, "offset", int, where),
        _get(value, "length", int, where),
        _digest(value, "sha256", where),
        _error(value, where, ("rmse", "max", "mean")) if "error" in value else None,
    )
    return segment, _refusal(value, {"name", "offset", "length", "sha256", "error"}, where)


def _params(record: JsonObject, key: str, where: str) -> Params:
    params: JsonObject = _get(record, key, dict, where)
    if not all(isinstance(value, (int, str, bool)) for value in params.values()):
        raise FormatError(f"{where}: {key!r} holds something other than integers, strings and booleans")
    return params


def _error(record: JsonObject, where: str, keys: Sequence[str] = ("rmse", "max")) -> MeasuredError:
    error: JsonObject = _get(record, "error", dict, where)
    return MeasuredError(*(_decimal(error, key, where) for key in keys))


def _decimal(record: JsonObject, key: str, where: str) -> float:
    value: str = _get(record, key, str, where)
    if not _ERROR_VALUE.fullmatch(value) or f"{float(value):.9e}" != value:
        raise FormatError(f"{where}: its {key} is not written as the format asks")
    return float(value)


_TENSOR_KEYS = {"name", "shape", "dtype", "codec", "params", "segments", "encoder", "error", "range"}
_ASSET_KEYS = {"name", "offset", "length", "sha256", "encoding", "size", "content_sha256"}


def parse_tensor(value: Any) -> TensorRecord:
    """Return a tensor's record; raise `FormatError` if it is malformed."""
    record, where = _record(value, "tensor")
    check_tensor_name(record["name"])
    shape: list[Any] = _get(record, "shape", list, where)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise FormatError(f"{where}: its shape is not a list of integers")
    check_shape(shape, where)
    segments = [_segment(item, where) for item in _get(record, "segments", list, where)]
    refusals = [_refusal(record, _TENSOR_KEYS, where), *(refusal for _, refusal in segments)]
    return TensorRecord(
        name=record["name"],
        shape=tuple(shape),
        dtype=_get(record, "dtype", str, where),
        codec=_get(record, "codec", str, where),
        params=_params(record, "params", where),
        segments=tuple(segment for segment, _ in segments),
        encoder=_params(record, "encoder", where) if "encoder" in record else {},
        error=_error(record, where) if "error" in record else None,
        refusal=next((refusal for refusal in refusals if refusal), None),
        range=_decimal(record, "range", where) if "range" in record else None,
    )


def parse_asset(value: Any) -> AssetRecord:
    """Return an asset's record; raise `FormatError` if it is malformed."""
    record, where = _record(value, "asset")
    check_asset_name(record["name"])
    segment, _ = _segment({key: record[key] for key in ("name", "offset", "length", "sha256") if key in record}, where)
    encoding: str = _get(record, "encoding", str, where)
    refusal = _refusal(record, _ASSET_KEYS, where)
    if encoding not in ("raw", "zstd"):
        refusal = f"{where}: unknown encoding {encoding[:40]!r}: use a newer qformat to read it"
    asset = AssetRecord(
        encoding=encoding,
        segment=segment,
        size=_get(record, "size", int, where),
        content_sha256=_digest(record, "content_sha256", where),
        refusal=refusal,
    )
    if asset.size > MAX_ASSET_BYTES:
        raise FormatError(f"{where}: {asset.size} bytes are more than an asset may have")
    if asset.encoding == "zstd" and segment.length >= asset.size:
        raise FormatError(f"{where}: it is compressed, but not to fewer bytes")
    if asset.encoding == "raw" and (asset.size, asset.content_sha256) != (segment.length, segment.sha256):
        raise FormatError(f"{where}: it is stored raw, but its size or digest is not that of the stored bytes")
    return asset


def _shards(top: JsonObject) -> tuple[ShardRecord, ...]:
    if ("shards" in top) != ("shards" in top.get("must_understand", [])):
        raise FormatError("the index: 'shards' is there, but need not be understood, or missing")
    if "shards" not in top:
        return ()
    shards: list[ShardRecord] = []
    for value in _get(top, "shards", list, "the index"):
        record, where = _record(value, "shard")
        check_asset_name(record["name"])
        if "/" in record["name"]:
            raise FormatError(f"{where}: its name is not a plain file name")
        refusal = _refusal(record, {"name", "bytes", "root_sha256"}, where)
        if refusal:
            raise FormatError(refusal)
        shards.append(
            ShardRecord(record["name"], _get(record, "bytes", int, where), _digest(record, "root_sha256", where))
        )
    check_sorted("shard", (shard.name for shard in shards))
    if not shards or top["tensors"]:
        raise FormatError("the index lists no shard, or tensors beside shards")
    return tuple(shards)
