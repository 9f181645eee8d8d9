"""Reference reader of qformat 1.5 in plain numpy, written from `container.md` and `codecs.md` alone.

It reads the whole file, checks every rule of the two texts and prefers clarity to speed; `reference_codecs` decodes
tensors, `reference_layers` layered ones. "container 3.1" and "codecs 16" in comments and docstrings name the text and
the section of a rule.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

# This file may be loaded by its path, without its folder on the search path.
sys.path.append(str(Path(__file__).parent))

from reference_codecs import decode as decode_values
from reference_codecs import get, quantize_q4_0
from reference_layers import LAYERED, layers_of
from reference_layers import decode as decode_layers
from reference_streams import SpecError, fail

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Asset", "File", "SpecError", "Tensor", "decode", "decode_asset", "main", "quantize_q4_0", "read"]

T = TypeVar("T")
Record = dict[str, object]

ALIGNMENT = 64
TRAILER_SIZE = 128
MAX_INTEGER = 2**53 - 1
MAX_INDEX = 64 << 20
MAX_ASSET = 256 << 20
MAX_ASSETS = 4 << 30
MAX_BRACKETS, MAX_COMMAS = 1 << 21, 1 << 22
MAX_RECORDS = 16 << 20
MAX_COMPONENTS = 16
MAX_DEPTH = 32

# The keys that this reader knows, for `must_understand` (container 3.7).
TOP_KEYS = {"assets", "header_sha256", "metadata", "tensors", "shards", "must_understand"}
SHARD_KEYS = {"name", "bytes", "root_sha256", "must_understand"}
STORED_KEYS = {"name", "offset", "length", "sha256", "must_understand"}
SEGMENT_KEYS = STORED_KEYS | {"error"}
ASSET_KEYS = STORED_KEYS | {"encoding", "size", "content_sha256"}
TENSOR_KEYS = {"name", "shape", "dtype", "codec", "params", "encoder", "error", "range", "segments", "must_understand"}

# "%.9e" of a finite number that is not negative, with a two-digit exponent: only zero begins with 0 (container 3.3).
ERROR_VALUE = re.compile(r"0\.0{9}e\+00|[1-9]\.[0-9]{9}e(\+[0-9]{2}|-0[1-9]|-[1-9][0-9])")
HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not decoded yet: its record, and name and bytes of each segment.

    `refusal` is the reason why it must not be decoded (`must_understand`), or empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    record: Record
    segments: tuple[tuple[str, bytes], ...]
    refusal: str


@dataclass(frozen=True)
class Asset:
    """An asset that is not decoded yet: its record and the stored bytes; `refusal` as in `Tensor`."""

    name: str
    encoding: str
    size: int
    record: Record
    stored: bytes
    refusal: str


@dataclass(frozen=True)
class Shard:
    """The record of a shard in a head; `root` is in hexadecimal."""

    name: str
    size: int
    root: str


@dataclass(frozen=True)
class File:
    """A file whose structure, padding and digests have been checked; `root` is in hexadecimal."""

    minor: int
    root: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    assets: dict[str, Asset]
    shards: tuple[Shard, ...]


def read(data: bytes) -> File:
    """Check a file and return its tensors and assets.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    File
        Its content, for `decode` and `decode_asset`.

    Raises
    ------
    SpecError
        If the file is invalid. Reasons that make only one tensor or asset unreadable (an unknown codec, say) are
        raised when that one is decoded.
    """
    header_size = _check_header(data)
    minor, index_offset, index = _check_trailer(data)
    top = _parse_index(index)
    if refusal := _refusal(top, TOP_KEYS, "index"):
        fail("index", refusal)
    if _digest(top, "header_sha256", "index") != hashlib.sha256(data[:header_size]).hexdigest():
        fail("header", "header_sha256 differs")
    metadata = get(top, "metadata", dict, "index")
    if not all(isinstance(value, str) for value in metadata.values()):
        fail("metadata", "contains a value that is not a string")
    tensors, assets = _named_records(top, "tensors"), _named_records(top, "assets")
    if sum(get(asset, "size", int, "assets") for asset in assets) > MAX_ASSETS:
        fail("assets", f"their sizes add up to more than {MAX_ASSETS}")
    _check_folders(assets)
    _check_layout(data, tensors, assets, header_size, index_offset)
    return File(
        minor,
        hashlib.sha256(index).hexdigest(),
        metadata,
        {tensor.name: tensor for tensor in (_load_tensor(data, record) for record in tensors)},
        {asset.name: asset for asset in (_load_asset(data, record) for record in assets)},
        _shards(top, tensors),
    )


def read_path(path: Path) -> File:
    """Check a file, and the shards beside it if it is a head; return the tensors of all of them.

    Raises
    ------
    SpecError
        As `read`, or if a shard differs from its record in the head.
    """
    head = read(path.read_bytes())
    tensors = dict(head.tensors)
    for shard in head.shards:
        data = (path.parent / shard.name).read_bytes()
        found = read(data)
        if (len(data), found.root, found.shards) != (shard.size, shard.root, ()):
            fail(f"shard {shard.name!r}", "differs from its record in the head")
        for name, tensor in found.tensors.items():
            if tensors and name <= max(tensors):
                fail(f"shard {shard.name!r}", f"tensor {name!r} is not in order")
            tensors[name] = tensor
    return replace(head, tensors=tensors)


def _shards(top: Record, tensors: list[Record]) -> tuple[Shard, ...]:
    """Return the shards of a head (container 3.5)."""
    if ("shards" in top) != ("must_understand" in top and "shards" in _get_list(top, "must_understand", str, "index")):
        fail("index", "'shards' and 'must_understand' disagree")
    if "shards" not in top:
        return ()
    records = _named_records(top, "shards")
    if not records or tensors:
        fail("index", "no shards, or tensors beside shards")
    shards = []
    for record in records:
        name = get(record, "name", str, "shard")
        where = f"shard {name!r}"
        _check_path(name, where)
        if "/" in name:
            fail(where, "its name has a folder")
        if refusal := _refusal(record, SHARD_KEYS, where):
            fail(where, refusal)
        shards.append(Shard(name, get(record, "bytes", int, where), _digest(record, "root_sha256", where)))
    return tuple(shards)


def decode(tensor: Tensor, layers: int | None = None) -> npt.NDArray[Any]:
    """Decode one tensor.

    Parameters
    ----------
    tensor : Tensor
        A tensor of a `File`.
    layers : int, optional
        Number of layers to decode of a layered tensor. Default: everything.

    Returns
    -------
    numpy.ndarray
        The values in the tensor's shape. Raw and lossless codecs give numpy's dtype of the same name, or float32 where
        numpy has none (`bf16`, `f8_…`); quantized codecs and layers give float32.

    Raises
    ------
    SpecError
        If the record needs something unknown or does not fit its codec.
    """
    where = f"tensor {tensor.name!r}"
    if tensor.refusal:
        fail(where, tensor.refusal)
    params = get(tensor.record, "params", dict, where)
    has_error = "error" in tensor.record
    if tensor.codec in LAYERED:
        _check_layers(tensor, params, where)
        return decode_layers(tensor.dtype, tensor.shape, params, tensor.segments, layers=layers, where=where)
    values = decode_values(
        tensor.codec, tensor.dtype, tensor.shape, params, tensor.segments, has_error=has_error, where=where
    )
    # Checked last: an unknown codec might be layered.
    segments = get(tensor.record, "segments", list, where) if "segments" in tensor.record else []
    if "range" in tensor.record or any("error" in segment for segment in segments):
        fail(where, f"{tensor.codec} is not layered, but has a range, or a segment with an error")
    if layers is not None:
        fail(where, f"{tensor.codec} has no layers")
    return values


def decode_asset(asset: Asset) -> bytes:
    """Decode one asset.

    Parameters
    ----------
    asset : Asset
        An asset of a `File`.

    Returns
    -------
    bytes
        The decoded bytes; their size and digest are correct.

    Raises
    ------
    SpecError
        If the record needs something unknown, or the stored bytes do not decode to the recorded content.
    """
    where = f"asset {asset.name!r}"
    if asset.refusal:
        fail(where, asset.refusal)
    if asset.encoding == "raw":
        content = asset.stored
    elif asset.encoding == "zstd":
        content = _decompress(asset.stored, asset.size, where)
    else:
        fail(where, f"unknown encoding {asset.encoding!r}")
    if len(content) != asset.size:
        fail(where, f"decodes to {len(content)} bytes or more, not to {asset.size}")
    if hashlib.sha256(content).hexdigest() != asset.record["content_sha256"]:
        fail(where, "content_sha256 differs")
    return content


# ---- container 1, 4 and 5: header, trailer records, trailer


def _check_header(data: bytes) -> int:
    """Check the header and return its size; its digest is checked later, with the index."""
    if len(data) < ALIGNMENT + TRAILER_SIZE:
        fail("file", f"{len(data)} bytes are too few for a header and a trailer")
    magic, major, header_size, _, incompatible = struct.unpack_from("<8sHHIQ", data)
    if magic != b"\x89QFM\r\n\x1a\n":
        fail("header", f"magic is {magic!r}")
    if major != 1:
        fail("header", f"unknown major version {major}")
    if header_size == 0 or header_size % ALIGNMENT:
        fail("header", f"header_size {header_size} is not a positive multiple of {ALIGNMENT}")
    if incompatible:
        fail("header", f"unknown incompatible feature bits {incompatible:#x}")
    return int(header_size)


def _check_trailer(data: bytes) -> tuple[int, int, bytes]:
    """Check the trailer and its records; return the minor version, the index's offset and its bytes."""
    trailer = data[-TRAILER_SIZE:]
    index_offset, index_length, index_sha = struct.unpack_from("<QQ32s", trailer)
    records_length, records_sha, crc, end_magic, minor = struct.unpack_from("<Q32s24xI8sI", trailer, 48)
    if end_magic != b"QFM-END\n":
        fail("trailer", f"end magic is {end_magic!r}; the file is cut short or still being written")
    if crc != zlib.crc32(trailer[:112] + bytes(4) + trailer[116:]):
        fail("trailer", "crc32 differs")
    if index_offset % ALIGNMENT:
        fail("trailer", f"index_offset {index_offset} is not aligned")
    if index_offset + index_length + records_length + TRAILER_SIZE != len(data):
        fail("trailer", f"the lengths do not add up to the file's {len(data)} bytes")
    if index_length > MAX_INDEX:  # container 3.1
        fail("trailer", f"index_length {index_length} is above {MAX_INDEX}")
    records_offset = index_offset + index_length
    index, records = data[index_offset:records_offset], data[records_offset:-TRAILER_SIZE]
    if hashlib.sha256(index).digest() != index_sha:
        fail("index", f"index_sha256 differs (offset {index_offset}, length {index_length})")
    if records_length > MAX_RECORDS:
        fail("trailer records", f"records_length {records_length} is above {MAX_RECORDS}")
    if hashlib.sha256(records).digest() != records_sha:
        fail("trailer records", f"records_sha256 differs (offset {records_offset}, length {records_length})")

    position = 0
    while position < len(records):
        where = f"trailer record at offset {records_offset + position}"
        if len(records) - position < 16:
            fail(where, "cut short")
        kind, flags, length = struct.unpack_from("<IIQ", records, position)
        end = position + 16 + length
        position = end + -length % 8
        if position > len(records):
            fail(where, f"length {length} goes beyond the records")
        if any(records[end:position]):
            fail(where, "padding is not zero")
        if flags & 1:
            fail(where, f"unknown type {kind} must be understood")
    return minor, index_offset, index


# ---- container 3: index


def _parse_index(index: bytes) -> Record:
    """Parse the index and check that it is in canonical form."""
    if index.count(b"{") + index.count(b"[") > MAX_BRACKETS or index.count(b",") > MAX_COMMAS:
        fail("index", f"more than {MAX_BRACKETS} brackets or {MAX_COMMAS} commas")
    try:
        text = index.decode("utf-8")
        top = json.loads(text, parse_int=_integer, parse_float=_integer, parse_constant=_integer)
        _check_json(top, 0)
        # json escapes exactly as container 3.1 requires, and str sorts by code point. Duplicate keys, white space and
        # other spellings of strings and numbers do not survive, so that the bytes differ.
        again = json.dumps(top, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")
    except SpecError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        # ValueError: not JSON, not UTF-8, or an escaped lone surrogate, which UTF-8 cannot hold.
        raise SpecError(f"index: not JSON in UTF-8 within the limits ({error})") from error
    if again != index:
        at = next((i for i, (a, b) in enumerate(zip(again, index, strict=False)) if a != b), len(again))
        fail("index", f"not canonical at its byte {at}")
    if not isinstance(top, dict):
        fail("index", "not an object")
    return top


def _integer(text: str) -> int:
    # Digits are counted first, since int() refuses a very long text, or takes long.
    if not re.fullmatch(r"-?[0-9]{1,16}", text) or not 0 <= int(text) <= MAX_INTEGER:
        fail("index", f"number {text[:40]} is not an integer from 0 to 2^53 - 1")
    return int(text)


def _check_json(value: object, depth: int) -> None:
    """Refuse null and too deep a nesting; `depth` counts the arrays and objects around the value."""
    if value is None:
        fail("index", "contains null")
    if isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            fail("index", f"nested deeper than {MAX_DEPTH} levels")
        for child in value.values() if isinstance(value, dict) else value:
            _check_json(child, depth + 1)


def _get_list(record: Record, key: str, kind: type[T], where: str) -> list[T]:
    values = get(record, key, list, where)
    if any(type(value) is not kind for value in values):
        fail(where, f"{key!r} contains a value that is not of type {kind.__name__}")
    return values


def _digest(record: Record, key: str, where: str) -> str:
    value = get(record, key, str, where)
    if not HEX_DIGEST.fullmatch(value):
        fail(where, f"{key!r} is not a SHA-256 in lower-case hexadecimal")
    return value


def _refusal(record: Record, known: set[str], where: str) -> str:
    """Return an error message if `must_understand` names keys that this reader does not know, else an empty string."""
    names = _get_list(record, "must_understand", str, where) if "must_understand" in record else []
    unknown = sorted(set(names) - known)
    return f"unknown keys must be understood: {unknown}" if unknown else ""


def _named_records(top: Record, key: str) -> list[Record]:
    """Return an array of records, which must be sorted by name, names unique."""
    records: list[Record] = _get_list(top, key, dict, "index")
    for before, name in pairwise([get(record, "name", str, key) for record in records]):
        if before >= name:
            fail(key, f"name {name!r} is not unique or out of order")
    return records


def _check_folders(assets: list[Record]) -> None:
    """Check that no asset's name is the folder of another asset."""
    names = {get(asset, "name", str, "assets") for asset in assets}
    for name in names:
        for end, character in enumerate(name):
            if character == "/" and name[:end] in names:
                fail(f"asset {name!r}", f"{name[:end]!r} is an asset and a folder")


# ---- container 2 and 3: segments and the records that describe them


def _check_layout(data: bytes, tensors: list[Record], assets: list[Record], start: int, stop: int) -> None:
    """Check that the segments follow one another from header to index, with only zero bytes between (container 2)."""
    owners = [(asset, f"asset {asset['name']!r}") for asset in assets]
    for tensor in tensors:
        where = f"tensor {tensor['name']!r}"
        owners += [(segment, where) for segment in _get_list(tensor, "segments", dict, where)]
    spans = [(get(r, "offset", int, where), get(r, "length", int, where), where) for r, where in owners]
    end = start
    # Sorting by length too puts a segment of length 0 before the one that begins at the same offset.
    for offset, length, where in [*sorted(spans), (stop, 0, "index")]:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        if offset != begin:
            fail(where, f"begins at {offset} and not at {begin}")
        if offset + length > stop:
            fail(where, f"segment at {offset} of length {length} goes beyond the index at {stop}")
        if any(data[end:offset]):
            fail(where, f"padding from {end} to {offset} is not zero")
        end = offset + length


def _load(data: bytes, record: Record, where: str) -> bytes:
    """Return the bytes of a segment or an asset after checking their digest; the span has been checked."""
    offset, length = get(record, "offset", int, where), get(record, "length", int, where)
    content = data[offset : offset + length]
    if hashlib.sha256(content).hexdigest() != _digest(record, "sha256", where):
        fail(where, f"sha256 differs (offset {offset}, length {length})")
    return content


def _load_tensor(data: bytes, record: Record) -> Tensor:
    name = get(record, "name", str, "tensors")
    where = f"tensor {name!r}"
    if CONTROL.search(name) or not 1 <= len(name.encode()) <= 1024:
        fail(where, "name is empty, too long or has a control character")
    shape = _get_list(record, "shape", int, where)
    if len(shape) > 16 or math.prod(n for n in shape if n) > MAX_INTEGER:
        fail(where, f"shape {shape} has too many dimensions or elements")
    params, encoder = get(record, "params", dict, where), {}
    if "encoder" in record:
        encoder = get(record, "encoder", dict, where)
    if not all(isinstance(value, int | str) for value in [*params.values(), *encoder.values()]):
        fail(where, "params or encoder contains a value that is not an integer, string or boolean")
    if "error" in record:
        _check_measures(get(record, "error", dict, where), ("rmse", "max"), where)
    if "range" in record:
        _check_measures(record, ("range",), where)
    refusals = [_refusal(record, TENSOR_KEYS, where)]
    segments = []
    for segment in _get_list(record, "segments", dict, where):
        label = get(segment, "name", str, where)
        if CONTROL.search(label) or not 1 <= len(label.encode()) <= 1024:
            fail(where, "the name of a segment is empty, too long or has a control character")
        if "error" in segment:
            error = get(segment, "error", dict, f"{where} segment {label!r}")
            _check_measures(error, ("rmse", "max", "mean"), f"{where} segment {label!r}")
        segments.append((label, _load(data, segment, f"{where} segment {label!r}")))
        refusals.append(_refusal(segment, SEGMENT_KEYS, f"{where} segment {label!r}"))
    dtype, codec = get(record, "dtype", str, where), get(record, "codec", str, where)
    refusal = "; ".join(filter(None, refusals))
    return Tensor(name, tuple(shape), dtype, codec, record, tuple(segments), refusal)


def _check_measures(record: Record, keys: tuple[str, ...], where: str) -> None:
    """Check the form of errors and ranges (container 3.3)."""
    for key in keys:
        if not ERROR_VALUE.fullmatch(get(record, key, str, where)):
            fail(where, f"{key} is not in the form of %.9e")


def _check_layers(tensor: Tensor, params: Record, where: str) -> None:
    """Check range and errors in the record of a layered tensor (container 3.3, 3.4; codecs 16)."""
    names, values = layers_of(params, where), [get(tensor.record, "range", str, where)]
    last: Record = {}
    for segment in _get_list(tensor.record, "segments", dict, where):
        is_layer = segment["name"] in names
        if ("error" in segment) != is_layer:
            fail(where, f"segment {segment['name']!r} must {'' if is_layer else 'not '}have an error")
        if is_layer:
            last = get(segment, "error", dict, where)
            values += [get(last, key, str, where) for key in ("rmse", "max", "mean")]
    # codecs 17.1 and 16: no error if lossless, else that of the last layer.
    lossless = get(params, "lossless", bool, where)
    if ("error" in tensor.record) == lossless:
        fail(where, f"{tensor.codec} must {'not ' if lossless else ''}have an error")
    if not lossless:
        error = get(tensor.record, "error", dict, where)
        if any(error[key] != last.get(key) for key in ("rmse", "max")):
            fail(where, "its error is not that of its last layer")
    if 0 in tensor.shape and set(values) != {"0.000000000e+00"}:
        fail(where, "a range or an error is not zero, but there are no elements")


def _check_path(name: str, where: str) -> None:
    """Check the name of an asset or a shard."""
    if CONTROL.search(name) or "\\" in name or ":" in name or len(name.encode()) > 1024:
        fail(where, "name is too long or has a forbidden character")
    components = name.split("/")
    if len(components) > MAX_COMPONENTS or any(component in {"", ".", ".."} for component in components):
        fail(where, "name is not a plain relative path")


def _load_asset(data: bytes, record: Record) -> Asset:
    name = get(record, "name", str, "assets")
    where = f"asset {name!r}"
    _check_path(name, where)
    encoding, size = get(record, "encoding", str, where), get(record, "size", int, where)
    if size > MAX_ASSET:
        fail(where, f"size {size} is above {MAX_ASSET}")
    stored = _load(data, record, where)
    content_sha256 = _digest(record, "content_sha256", where)
    if encoding == "raw" and (size != record["length"] or content_sha256 != record["sha256"]):
        fail(where, "is raw, but its two sizes or its two digests differ")
    if encoding == "zstd" and len(stored) >= size:
        fail(where, "is compressed, but not to fewer bytes")
    return Asset(name, encoding, size, record, stored, _refusal(record, ASSET_KEYS, where))


def _frame_content_size(frame: bytes, where: str) -> int:
    """Return the content size of a zstd frame (RFC 8878, 3.1.1), which must state it and be the only frame."""
    try:
        magic, descriptor = struct.unpack_from("<IB", frame)
        single_segment = descriptor >> 5 & 1  # then there is no window descriptor
        position = 6 - single_segment + (0, 1, 2, 4)[descriptor & 3]  # dictionary id
        field = (single_segment, 2, 4, 8)[descriptor >> 6]
        if magic != 0xFD2FB528 or field == 0:
            fail(where, "not a zstd frame with its content size")
        content_size = int.from_bytes(frame[position : position + field], "little")
        content_size += 256 if field == 2 else 0
        position += field
        last = 0
        while not last:
            low, high = struct.unpack_from("<BH", frame, position)
            last, run, size = low & 1, low >> 1 & 3 == 1, low >> 3 | high << 5
            position += 3 + (1 if run else size)
        position += 4 * (descriptor >> 2 & 1)  # checksum
    except struct.error:
        fail(where, "zstd frame is cut short")
    if position != len(frame):
        fail(where, "not exactly one zstd frame")
    return content_size


def _decompress(frame: bytes, size: int, where: str) -> bytes:
    if (content_size := _frame_content_size(frame, where)) != size:  # container 3.6: before memory is allocated
        fail(where, f"zstd frame has content size {content_size} and not {size}")
    import zstandard  # only compressed assets need it

    # Not the one-shot call, which examines no block if the content size is 0. Reading one byte more than `size` makes
    # the stream continue to the end of the frame and compare its checksum.
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(frame) as stream:
            return stream.read(size + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise SpecError(f"{where}: {error}") from error


# ---- command line


def _report(path: str) -> None:
    file = read_path(Path(path))
    for tensor in file.tensors.values():
        decode(tensor)
        error = tensor.record.get("error")
        errors = f"  rmse {error['rmse']} max {error['max']}" if isinstance(error, dict) else ""
        name = tensor.name.encode("ascii", "backslashreplace").decode()  # safe for any terminal
        print(f"{name}  {tensor.codec}  {list(tensor.shape)}{errors}")
    for asset in file.assets.values():
        decode_asset(asset)
    print(f"root {file.root}")


def main() -> int:
    """Check the files named on the command line completely and list their tensors.

    Returns
    -------
    int
        Exit status: 0 if all files are valid, else 1.
    """
    status = 0
    for path in sys.argv[1:]:
        try:
            _report(path)
        except (OSError, SpecError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
