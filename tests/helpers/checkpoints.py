"""Checkpoints in safetensors files, written byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_SAFETENSORS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64", "f8_e4m3": "F8_E4M3", "f8_e5m2": "F8_E5M2"}


def safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """Return a .safetensors file of (dtype, shape, bytes)."""
    entries, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        entries[name] = {"dtype": _SAFETENSORS.get(dtype, dtype), "shape": list(shape), "data_offsets": offsets}
        body += data
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    dtypes = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint8": "U8"}
    entries = {name: (dtypes[a.dtype.name], a.shape, a.tobytes()) for name, a in arrays.items()}
    path.write_bytes(safetensors_bytes(entries))


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    ONE: {"a.weight": weights(0, 8, 40), "a.bias": weights(1, 8)},
    TWO: {"b.weight": weights(2, 8, 33), "b.ids": np.arange(5)},
}
HOME = {name: shard for shard, arrays in SHARDS.items() for name in arrays}


def hub_model(directory: Path) -> Path:
    """Make a directory as the hub has them: two shards, an index and a configuration."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "test"}')
    for shard, arrays in SHARDS.items():
        write_safetensors(directory / shard, arrays)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": HOME}))
    return directory


def model(folder: Path, tensors: Mapping[str, np.ndarray], **files: str) -> Path:
    """Make a directory with tensors in one file, and a configuration or other JSON files."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    for name, text in (files or {"config": '{"model_type": "x"}'}).items():
        (folder / f"{name}.json").write_text(text)
    return folder


def layers(count: int, rows: int, cols: int, *, seed: int = 5, name: str = "layer.{}.weight") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name.format(i): rng.normal(size=(rows, cols)).astype(np.float32) for i in range(count)}
