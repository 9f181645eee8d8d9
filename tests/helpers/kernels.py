"""Kernel modules of both families, numba and numpy, and values on which to compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat.kernels import load

FAMILIES = ("numba", "numpy")
every_family = pytest.mark.parametrize("family", FAMILIES)

finite_f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: vectors of up to eight blocks of 32
rows = hnp.arrays(np.float32, st.integers(1, 8).map(lambda n: 32 * n), elements=finite_f32)

_factors = st.sampled_from([0.0, 1.0, -0.7, 10.0, 3e-5, -1e-7, 1000.0])
_lengths = st.integers(1, 40).map(lambda n: 32 * n)
_levels = hnp.arrays(np.float32, _lengths, elements=st.integers(-12, 12).map(np.float32))
#: vectors of blocks as weights are: around some value, of some spread, often with few different values
likely_rows = st.tuples(_levels, _factors, _factors).map(
    lambda parts: (parts[0] * np.float32(parts[1]) + np.float32(parts[2])).astype(np.float32)
)


def modules(*names: str) -> list[dict[str, ModuleType]]:
    """Return kernel modules by name, those of numba and those of numpy."""
    return [{name: import_module(f"qformat.kernels.{family}.{name}") for name in names} for family in FAMILIES]


@contextmanager
def using(family: str) -> Iterator[None]:
    """Make the package use the kernels of one family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QFORMAT_KERNELS", family)
        load.cache_clear()
        assert load("blocks").__name__.split(".")[-2] == family
        yield
    load.cache_clear()


def battery() -> dict[str, np.ndarray]:
    """Return matrices of blocks of 32 weights, of common and of awkward values."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((64, 32)).astype(np.float32)
    grid = np.arange(-8, 8, dtype=np.float32) / 8
    return {
        "normal": normal,
        "heavy tails": rng.standard_cauchy((64, 32)).astype(np.float32),
        "zeros": np.zeros((4, 32), np.float32),
        "negative zeros": np.full((4, 32), -0.0, np.float32),
        "one weight": np.eye(32, dtype=np.float32),
        "tied extremes": np.tile(np.array([1, -1], np.float32), (4, 16)),
        "tied extremes, negative first": np.tile(np.array([-1, 1], np.float32), (4, 16)),
        "halfway codes": np.tile(np.concatenate([grid, grid + 1 / 16]), (3, 1)).astype(np.float32),
        "constant": np.full((4, 32), 0.3, np.float32),
        "ternary": rng.choice(np.array([-0.7, 0, 0.7], np.float32), (64, 32)),
        "sparse": (normal * (rng.random((64, 32)) < 0.1)).astype(np.float32),
        "scale is a subnormal half": normal * np.float32(1e-6),
        "scale is zero": normal * np.float32(1e-9),
        "subnormal": normal * np.float32(1e-39),
        "smallest subnormal": np.where(normal > 0, np.float32(1e-45), np.float32(0)),
        "near overflow of the scale": (normal / np.abs(normal).max() * np.float32(524000)).astype(np.float32),
        "scale overflows": normal * np.float32(1e7),
        "largest floats": (np.sign(normal) * np.finfo(np.float32).max).astype(np.float32),
    }


def every_f32(step: int = 9973) -> np.ndarray:
    """Return float32 numbers of all exponents, and those next to the borders of the 16-bit formats."""
    patterns = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    borders = np.array([0x38800000, 0x47800000, 0x477FE000, 0x477FF000, 0x33000000, 0x33000001, 0x7F7F8000], np.uint32)
    near = (borders[:, None] + np.arange(-70, 70).astype(np.uint32)).ravel()
    both = np.concatenate([patterns, near, near | 0x80000000]).astype(np.uint32)
    return both.view(np.float32)


def asymmetric_battery() -> dict[str, np.ndarray]:
    """Return the battery, and values whose mean is far from zero."""
    rng = np.random.default_rng(7)
    positive = rng.random((16, 128)).astype(np.float32) + 1
    return battery() | {
        "positive": positive,
        "negative": -positive,
        "narrow, far from zero": positive / 1000 + 5,
        "outlier": np.where(np.arange(2048) == 77, 300, rng.standard_normal(2048)).astype(np.float32),
    }


def q4_0_battery() -> dict[str, np.ndarray]:
    """Return the battery, and blocks with few levels, of one sign, or next to the borders of binary16 scales."""
    rng = np.random.default_rng(6)
    scale = rng.random((64, 1)) + 0.5
    normal = rng.standard_normal((64, 32))
    more = {
        "five levels": rng.choice([-2, -1, 0, 1, 2], (64, 32)) * scale,
        "integers": rng.integers(-9, 9, (64, 32)),
        "zeros and one magnitude of one sign": rng.choice([0, -1], (64, 32)) * scale,
        "halves": normal.astype(np.float16),
        "magnitudes far apart": normal * 2.0 ** rng.integers(-20, 3, (64, 32)),
        "laplace": rng.laplace(size=(64, 32)),
        "sparse": normal * (rng.random((64, 32)) < 0.1),
        "no multiple of 16 blocks": normal[:37],
    }
    small = {f"normal, 2^{e}": normal * 2.0**e for e in range(-30, -8, 3)}
    return {**battery(), **{name: x.astype(np.float32) for name, x in {**more, **small}.items()}}


def padded_rows(x: np.ndarray, cols: int) -> np.ndarray:
    """Return the values of five rows of `cols` columns, each padded with zeros to whole blocks of 32."""
    rows = np.resize(x.astype(np.float32).ravel(), (5, cols))
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -cols % 32)))).reshape(-1)


def codes_in(packed: np.ndarray, width: int) -> np.ndarray:
    """Unpack codes by the definition: code j is in bits j * width and up."""
    whole = int.from_bytes(packed.tobytes(), "little")
    return np.array([whole >> (j * width) & ((1 << width) - 1) for j in range(packed.size * 8 // width)], np.uint8)
