"""GGUF files, written by the gguf package or byte by byte, and their blocks."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from qformat.converters.convert import convert
from qformat.converters.sources.gguf import open_gguf
from qformat.converters.sources.gguf_file import TYPE_NUMBERS, TYPES
from qformat.pipeline.recipe import Recipe

UNDECODABLE = ("q8_1", "q8_k", "q1_0")


def store(source: Path, type_: str | None = None) -> Path:
    path = source.with_suffix(".qf")
    convert(open_gguf(source), path, Recipe.parse(type_), overwrite=True)
    return path


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random rows of blocks, which decode to finite values."""
    rng = np.random.default_rng(seed)
    size = TYPES[TYPE_NUMBERS[name]].nbytes
    found = rng.integers(0, 256, (4 * rows * blocks + 64, size), dtype=np.uint8)
    if name not in UNDECODABLE:
        with np.errstate(all="ignore"):
            found = found[np.isfinite(dequantize(found, GGMLQuantizationType[name.upper()])).all(axis=1)]
    return found[: rows * blocks].reshape(rows, blocks * size)


def write(path: Path, tensors: dict[str, tuple[Any, str]], alignment: int | None = None) -> Path:
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_file_type(2)
    writer.add_token_list([f"tok{i}" for i in range(1000)])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_key_value("a.nested", [["x", "yy"], ["z"]], gguf.GGUFValueType.ARRAY)
    writer.add_float64("a.float", 1.5)
    writer.add_bool("a.bool", val=True)
    for name, (array, type_) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[type_.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


@dataclass
class Entry:
    name: str | bytes = "t"
    ne: tuple[int, ...] = (32, 2)
    type: int = 2
    offset: int = 0

    def pack(self) -> bytes:
        shape = struct.pack(f"<I{len(self.ne)}Q", len(self.ne), *self.ne)
        return string(self.name) + shape + struct.pack("<IQ", self.type, self.offset)


@dataclass
class Draft:
    pairs: list[bytes] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=lambda: [Entry()])
    data: bytes = bytes(64)
    alignment: int = 32
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None

    def pack(self) -> bytes:
        tensors, keys = self.counts or (len(self.entries), len(self.pairs))
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        head += b"".join(self.pairs) + b"".join(entry.pack() for entry in self.entries)
        return head + bytes(-len(head) % self.alignment) + self.data
