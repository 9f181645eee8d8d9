"""Container files built from the text of the specification, without the package."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

from tests.helpers.reference import reference

MAGIC = b"\x89QFM\r\n\x1a\n"
Json = dict[str, Any]


def align(offset: int) -> int:
    return -(-offset // 64) * 64


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def header(
    *, magic: bytes = MAGIC, major: int = 1, size: int = 64, incompatible: int = 0, compatible: int = 0
) -> bytes:
    fixed = struct.pack("<8sHHIQQ32s", magic, major, size, 0, incompatible, compatible, b"")
    return fixed + bytes(max(0, size - 64))


def trailer(
    index: bytes,
    index_offset: int,
    *,
    records: bytes = b"",
    minor: int = 5,
    index_length: int | None = None,
    records_length: int | None = None,
    index_sha256: bytes | None = None,
    records_sha256: bytes | None = None,
    reserved: bytes = b"",
    end_magic: bytes = b"QFM-END\n",
    crc_xor: int = 0,
) -> bytes:
    fields = [
        index_offset,
        len(index) if index_length is None else index_length,
        hashlib.sha256(index).digest() if index_sha256 is None else index_sha256,
        len(records) if records_length is None else records_length,
        hashlib.sha256(records).digest() if records_sha256 is None else records_sha256,
        reserved,
    ]
    without = struct.pack("<QQ32sQ32s24sI8sI", *fields, 0, end_magic, minor)
    return struct.pack("<QQ32sQ32s24sI8sI", *fields, zlib.crc32(without) ^ crc_xor, end_magic, minor)


def trailer_record(payload: bytes = b"", *, kind: int = 7, flags: int = 0, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("<IIQ", kind, flags, size) + payload + bytes(-len(payload) % 8)


@dataclass
class Draft:
    """A file that is not put together yet.

    Segment and asset records hold their bytes under ``bytes`` until `place` lays them out. After that ``index`` and ``body`` may
    be edited at will; `pack` computes every digest that stands above an edit (that of the header, while it is ``...``).
    """

    tensors: list[Json] = field(default_factory=list)
    assets: list[Json] = field(default_factory=list)
    metadata: Json = field(default_factory=dict)
    header: bytes = field(default_factory=header)
    records: bytes = b""
    minor: int = 5
    index: Json = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Draft:
        """Take a file apart."""
        (header_size,) = struct.unpack_from("<H", data, 10)
        at, length = struct.unpack_from("<QQ", data, len(data) - 128)
        index = json.loads(data[at : at + length])
        (minor,) = struct.unpack_from("<I", data, len(data) - 4)
        return cls(
            header=data[:header_size],
            body=data[header_size:at],
            index=index,
            records=data[at + length : -128],
            minor=minor,
        )

    def place(self) -> Draft:
        if self.index:
            return self
        body = bytearray()
        segments = [segment for tensor in self.tensors for segment in tensor["segments"]]
        for segment in [*self.assets, *segments]:
            data = segment.pop("bytes")
            segment |= {"offset": len(self.header) + len(body), "length": len(data), "sha256": sha256(data)}
            body += data + bytes(-len(data) % 64)
        self.body = bytes(body)
        self.index = {"assets": self.assets, "tensors": self.tensors, "metadata": self.metadata, "header_sha256": ...}
        return self

    def index_bytes(self) -> bytes:
        self.place()
        if self.index.get("header_sha256") is ...:
            self.index["header_sha256"] = sha256(self.header)
        return canonical(self.index)

    def pack(self, index: bytes | None = None, **fields: Any) -> bytes:
        """Return the file; `index` stands in for the canonical index, `fields` for fields of the trailer."""
        data = self.index_bytes() if index is None else index
        at = fields.pop("index_offset", len(self.header) + len(self.body))
        end = trailer(data, at, **({"records": self.records, "minor": self.minor} | fields))
        return self.header + self.body + data + self.records + end


def find(value: Any, *path: str | int) -> Any:
    """Follow keys and positions; a string chooses from a list of records the one of that name."""
    for step in path:
        if isinstance(value, list) and isinstance(step, str):
            value = next(item for item in value if item["name"] == step)
        else:
            value = value[step]
    return value


def segment(name: str, data: bytes) -> Json:
    return {"name": name, "bytes": data}


def raw_tensor(name: str, dtype: str, array: np.ndarray) -> Json:
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": dtype,
        "codec": dtype,
        "params": {},
        "segments": [segment("data", array.tobytes())],
    }


def q4_0_tensor(name: str, array: np.ndarray) -> Json:
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": "f32",
        "codec": "q4_0",
        "params": {},
        "encoder": {"search": "naive"},
        "error": {"rmse": "1.000000000e-01", "max": "5.000000000e-01"},
        "segments": [segment("blocks", reference.quantize_q4_0(array))],
    }


def raw_asset(name: str, data: bytes) -> Json:
    return {"name": name, "encoding": "raw", "size": len(data), "content_sha256": sha256(data), "bytes": data}


def zstd_asset(name: str, data: bytes, frame: bytes | None = None) -> Json:
    """Describe an asset of the content `data`; `frame` is stored, whatever it is."""
    stored = zstandard.ZstdCompressor(level=9).compress(data) if frame is None else frame
    return {"name": name, "encoding": "zstd", "size": len(data), "content_sha256": sha256(data), "bytes": stored}


VOCABULARY = b"".join(b"token %d\n" % (i // 7) for i in range(60))


def small_draft() -> Draft:
    """Return a file with something of everything: about 2.5 kB."""
    rng = np.random.default_rng(5)
    return Draft(
        tensors=[
            raw_tensor("a.weight", "f32", rng.normal(size=(2, 3)).astype("<f4")),
            q4_0_tensor("b.weight", rng.normal(size=(3, 40)).astype("<f4")),
            raw_tensor("bool", "bool", np.array([True, False, True, True, False])),
            raw_tensor("empty", "f32", np.zeros((0, 4), "<f4")),
            raw_tensor("scalar", "i64", np.array(-7, "<i8")),
            raw_tensor("zhalf", "f16", rng.normal(size=(7, 5)).astype("<f2")),
        ],
        assets=[raw_asset("LICENSE", b"do what you like"), zstd_asset("tok/vocab.txt", VOCABULARY)],
        metadata={"made by": "a test \u2028 \U0001f600"},
    )


Edit = Callable[[Draft], bytes | None]


def put(*path_and_value: Any) -> Edit:
    """Return an edit that sets a value in the index."""
    *path, last, value = path_and_value

    def edit(draft: Draft) -> None:
        find(draft.place().index, *path)[last] = deepcopy(value)

    return edit


def drop(*path: Any) -> Edit:
    """Return an edit that removes a key from the index."""

    def edit(draft: Draft) -> None:
        del find(draft.place().index, *path[:-1])[path[-1]]

    return edit


def replace_text(old: str, new: str | bytes) -> Edit:
    """Return an edit of the index's text, where `old` has to stand."""

    def edit(draft: Draft) -> bytes:
        text = draft.index_bytes()
        assert old.encode() in text
        return draft.pack(text.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1))

    return edit
