"""The independent reader of spec/, loaded as a module."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def load_script(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


reference = load_script(ROOT / "spec" / "reference.py")


def decode(codec: str, shape: tuple[int, ...], params: Any, segments: Mapping[str, bytes], dtype: str = "f32") -> Any:
    """Decode one tensor with the independent reader."""
    lossless = codec in (dtype, "lossless")
    record = {"params": params} | ({} if lossless else {"error": dict.fromkeys(("rmse", "max"), "0.000000000e+00")})
    return reference.decode(reference.Tensor("t", shape, dtype, codec, record, tuple(segments.items()), ""))
