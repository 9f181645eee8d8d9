"""Writing and reading tensors of type scm."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import TensorRecord
from tests.helpers.files import Json
from tests.helpers.layered import elements

DTYPE_NAMES = ("f16", "bf16", "f32")
every_dtype = pytest.mark.parametrize("dtype", DTYPE_NAMES)
DISTRIBUTIONS = ("normal", "laplace")
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
METRICS = {"max_rmse": "rmse", "max_abs": "maximum", "mean_abs": "mean"}
SLACK = 0.03  # bits for each weight that a layer may leave


def drawn(distribution: str, *shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    found: np.ndarray = getattr(np.random.default_rng(seed), distribution)(size=shape) * scale
    return found.astype(np.float32)


def store(path: Path, type_: str, /, _options: Json | None = None, **tensors: Elements | np.ndarray) -> int:
    """Write tensors of one type; return the length of the file."""
    sources = [
        ArrayTensor(name, x if isinstance(x, Elements) else elements("f32", x)) for name, x in sorted(tensors.items())
    ]
    convert(Checkpoint(sources), path, Recipe.parse(None, {"*": type_}), overwrite=True, **(_options or {}))
    return path.stat().st_size


def record_of(path: Path, name: str = "x") -> TensorRecord:
    with qformat.safe_open(path) as f:
        return f.info(name)


def read(path: Path, quality: Any = None, name: str = "x") -> np.ndarray:
    with qformat.safe_open(path, quality=quality) as f:
        return f.get_tensor(name)


def bits_of(found: np.ndarray, source: Elements) -> bytes:
    """Return the bits of values after a cast to the dtype of the source."""
    return Elements(source.dtype, Elements(DTYPES["f32"], found.astype(np.float32)).cast(source.dtype)).data.tobytes()


def many() -> dict[str, Elements]:
    """Return tensors of all dtypes, sparse and dense."""
    sparse = drawn("laplace", 90, 111)
    sparse[sparse < 0.01] = 0
    return {
        "a": elements("f16", drawn("normal", 130, 77)),
        "b": elements("bf16", drawn("laplace", 200, 201)),
        "c": elements("f32", sparse),
        "e": elements("bf16", drawn("normal", 33)),
    }


def digests(path: Path) -> list[str]:
    """Return digests of files and of their values."""
    found = []
    two_chunks = elements("f32", drawn("normal", 2, 270_000))
    kinds = (("scm", many()), ("scm:max_abs=0.02", {"b": many()["b"]}), ("scm:bpw=2.3", {"x": two_chunks}))
    for type_, tensors in kinds:
        store(path, type_, **tensors)
        found.append(hashlib.sha256(path.read_bytes()).hexdigest())
        qualities = (None,) if "x" in tensors else (2, 4.25, None)
        values = [read(path, quality, name) for name in tensors for quality in qualities]
        found += [hashlib.sha256(one.tobytes()).hexdigest() for one in values]
    return found
