"""The least error of Q4_0 for a block, by trying every binary16 scale; and blocks to try it on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np

SIZE = 32
CHUNK = 512  # divides the number of scales


def _scales() -> np.ndarray:
    """Return every finite binary16 number of both signs, as float64."""
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    return every[np.isfinite(every)].astype(np.float64)


SCALES = _scales()


@numba.njit(nogil=True)
def _best(blocks: np.ndarray, scales: np.ndarray, inverses: np.ndarray, found: np.ndarray) -> None:
    errors = np.empty(CHUNK)
    for block in range(len(blocks)):
        least = math.inf
        for start in range(0, len(scales), CHUNK):
            errors[:] = 0.0
            for i in range(SIZE):
                x = blocks[block, i]
                for j in range(CHUNK):  # the compiler makes vectors of it: no sum depends on another one
                    q = min(max(math.floor(x * inverses[start + j] + 0.5), -8.0), 7.0)
                    error = x - scales[start + j] * q
                    errors[j] += error * error
            least = min(least, errors.min())
        found[block] = least


def exact_q4_0(blocks: np.ndarray) -> np.ndarray:
    """Return the least sum of squared errors of each block of 32 floats.

    Every finite binary16 scale is tried with the nearest codes -8 to 7, in float64. Where a quotient lies so close to the middle of
    two codes that rounding decides, both give the same error but for rounding.
    """
    wide = np.ascontiguousarray(blocks, np.float64)
    inverses = np.divide(1.0, SCALES, out=np.zeros_like(SCALES), where=SCALES != 0)
    found = np.empty(len(wide))
    _best(wide, SCALES, inverses, found)
    return found


def _sparse(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape) * (rng.random(shape) < 0.1)


def _outlier(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    values = rng.standard_normal(shape)
    values[np.arange(len(values)), rng.integers(0, SIZE, len(values))] *= 50
    return values


#: functions that return blocks of a given shape, by name
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: 0.02 * rng.standard_normal(shape),
    "Laplace": lambda rng, shape: 0.02 * rng.laplace(size=shape),
    "Cauchy": lambda rng, shape: np.clip(0.02 * rng.standard_cauchy(shape), -1000, 1000),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "90 % zeros": _sparse,
    "ternary": lambda rng, shape: 0.037 * rng.integers(-1, 2, shape),
    "five levels": lambda rng, shape: 0.013 * rng.integers(-2, 3, shape),
    "constant": lambda rng, shape: np.repeat(rng.standard_normal((shape[0], 1)), SIZE, axis=1),
    "near-constant": lambda rng, shape: 1 + 1e-3 * rng.standard_normal(shape),
    "one outlier": _outlier,
    "subnormal scales": lambda rng, shape: 2.0**-22 * rng.standard_normal(shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape),
}


def sample(name: str, count: int) -> np.ndarray:
    """Return float32 blocks of one of the `DISTRIBUTIONS`, the same ones each time."""
    rng = np.random.default_rng(sorted(DISTRIBUTIONS).index(name))
    return DISTRIBUTIONS[name](rng, (count, SIZE)).astype(np.float32)
