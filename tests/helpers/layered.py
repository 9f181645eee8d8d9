"""Layered tensors of many sizes, and files that hold them beside others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint

LADDER = (*(2 + number / 4 for number in range(17)), 7.0, 8.0)
METADATA = {"made by": "a test ⁂", "licence": "none"}
ASSETS = {"config.json": b'{"a": 1}', "tok/vocab.txt": b"".join(b"token %d\n" % (i % 9) for i in range(300))}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def elements(dtype: str, values: np.ndarray) -> Elements:
    return Elements(DTYPES[dtype], Elements(DTYPES["f32"], np.asarray(values, np.float32)).cast(DTYPES[dtype]))


def model(seed: int, *, big: bool = False) -> dict[str, Elements]:
    """Return layered tensors of many sizes."""
    rng = np.random.default_rng(seed)
    found = {
        "a.weight": elements("f32", normal(120, 90, seed=seed)),
        "b.bf16": elements("bf16", normal(90, 130, seed=seed + 1)),
        "c.f16": elements("f16", rng.laplace(0, 0.02, (70, 150)).astype(np.float32)),
        "d.one": elements("f32", normal(1)),
        "d.two": elements("f16", normal(1, 2)),
        "e.few": elements("f32", normal(5, 31)),
        "g.sparse": elements("f32", np.where(rng.random((60, 70)) < 0.4, 0, normal(60, 70)).astype(np.float32)),
        "i.levels": elements("f32", rng.integers(-40, 41, (64, 64)).astype(np.float32) * np.float32(0.3)),
        "j.tails": elements("f32", rng.standard_cauchy((64, 100)).astype(np.float32)),
        "k.small": elements("f32", normal(20, 15)),
        "l.scalar": Elements(DTYPES["f32"], np.array(-0.7, np.float32)),
    }
    if big:
        found["m.long"] = elements("f32", normal(2, 300_000, seed=seed))
    return found


def exact() -> dict[str, Elements]:
    """Return tensors that few bits hold losslessly."""
    rng = np.random.default_rng(0)
    return {
        "f.empty": elements("f32", normal(0, 4)),
        "h.zeros": elements("bf16", np.zeros((20, 20), np.float32)),
        "i.ternary": elements("f32", rng.integers(-1, 2, (64, 64)).astype(np.float32) * np.float32(0.3)),
    }


OTHERS = {
    "z.bias": elements("f32", normal(9)),
    "z.ids": Elements(DTYPES["i64"], np.arange(7)),
    "z.q4": elements("f32", normal(6, 64)),
    "z.raw": elements("f16", normal(4, 5)),
}


def write(path: Path, type_: str, tensors: Mapping[str, Elements], **overrides: str) -> bytes:
    """Store tensors as one type, and `OTHERS` as others."""
    sources = [ArrayTensor(name, x) for name, x in (dict(tensors) | OTHERS).items()]
    types = {"[a-y]*": type_, "z.q4": "q4_0", "z.raw": "lossless"} | overrides
    assets = {name: (lambda data=data: data) for name, data in ASSETS.items()}
    convert(Checkpoint(sources, assets), path, Recipe.parse(None, types), overwrite=True, metadata=METADATA)
    return path.read_bytes()
