"""Derive the mappings of `nlm`: three steepnesses of a logit, and the integers of `spec/codecs.md`.

Run as ``python -m benchmarks.nlm_mappings``; takes a minute or two. Matrices of real models, each divided by its standard
deviation, are cut into blocks; each block is quantized with each steepness, with a slow search for the best header. Then the three
steepnesses are chosen that, together with the linear mapping, give the least error where each block takes the best of the four: the
least mean logarithm of the rmse over the real models and block sizes, in which 32, the default, counts twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numba
import numpy as np

from benchmarks.inputs import minilm_matrices, whisper

BLOCKS = (32, 64, 128)
SAMPLE = 12_000  # blocks of each model and block size
STEEPNESS = np.array([0.0, *np.arange(0.50, 0.97, 0.02)]).round(2)
HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
RANGES, MINIMA = HALVES[::32], HALVES[::16]  # the values that a header can store; minima also negative


def mapping(steepness: float) -> np.ndarray:
    """Return the integers of a mapping: a logit of 16 steps, or the line that it becomes at steepness 0."""
    t = (2 * np.arange(16) - 15) / 15
    upper = t[8:] if steepness == 0 else np.arctanh(steepness * t[8:]) / np.arctanh(steepness)
    upper = 8192 + np.rint(8192 * upper).astype(np.int64)
    return np.concatenate([16384 - upper[::-1], upper])


@numba.njit
def _sums(x, levels, minimum, scale):
    """Return the squared error with the nearest codes, and the line through the weights that these codes ask for."""
    n, sx, st, stt, sxt, error = x.size, 0.0, 0.0, 0.0, 0.0, 0.0
    for value in x:
        code, u = 0, (value - minimum) / scale if scale > 0 else 0.0
        for i in range(15):
            code += u > (levels[i] + levels[i + 1]) / 2
        t = levels[code]
        error += (value - minimum - scale * t) ** 2
        sx, st, stt, sxt = sx + value, st + t, stt + t * t, sxt + value * t
    determinant = n * stt - st * st
    slope = (n * sxt - sx * st) / determinant if determinant > 0 else 0.0
    return error, (sx - slope * st) / n, slope


@numba.njit
def _error(x, levels, ranges, minima):
    """Return the least squared error of a block that a descent from several headers finds."""
    best = np.inf
    low, width = x.min(), x.max() - x.min()
    for shift, factor in ((0.0, 1.0), (0.03, 0.94), (-0.04, 1.08), (-0.015, 0.98), (0.03, 0.98)):
        minimum, scale = low + shift * width, factor * width
        for _ in range(2):
            _, minimum, scale = _sums(x, levels, minimum, scale)
        at = np.searchsorted(ranges, scale)
        sign = -1.0 if minimum < 0 else 1.0
        beside = np.searchsorted(minima, abs(minimum))
        for r in ranges[max(at - 1, 0) : at + 1]:
            for m in minima[max(beside - 1, 0) : beside + 1]:
                best = min(best, _sums(x, levels, sign * m, r)[0])
    return best


@numba.njit(parallel=True)
def _errors(blocks, tables, ranges, minima):
    errors = np.empty((len(blocks), len(tables)))
    for b in numba.prange(len(blocks)):
        for k in range(len(tables)):
            errors[b, k] = _error(blocks[b], tables[k], ranges, minima)
    return errors


def _real(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [array.reshape(len(array), -1).astype(np.float32) for array in arrays.values()]


def _sample(matrices: list[np.ndarray], block: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    total = sum(matrix.size for matrix in matrices)
    chosen = []
    for matrix in matrices:
        blocks = matrix[:, : matrix.shape[1] // block * block].reshape(-1, block)
        if len(blocks):
            picked = blocks[rng.choice(len(blocks), min(len(blocks), -(-SAMPLE * matrix.size // total)), replace=False)]
            chosen.append(picked.astype(np.float64) / matrix.std())
    blocks = np.concatenate(chosen)
    return blocks[blocks.any(axis=1)]


def main() -> None:
    """Print the choice, the tables, and the choice for each block size alone."""
    normal = [np.random.default_rng(0).standard_normal((4096, 1024), np.float32)]
    models = {"MiniLM": _real(minilm_matrices()), "Whisper-base": _real(whisper()), "N(0,1)": normal}
    tables = np.array([mapping(s) for s in STEEPNESS]) / 16384
    errors = {
        (model, block): _errors(_sample(matrices, block), tables, RANGES, MINIMA) / block
        for model, matrices in models.items()
        for block in BLOCKS
    }
    real = [key for key in errors if key[0] != "N(0,1)"]
    triples = np.array(list(itertools.combinations(range(1, len(STEEPNESS)), 3)))

    def rmse(key: tuple[str, int], triple: np.ndarray) -> float:
        return float(np.sqrt(errors[key][:, [0, *triple]].min(axis=1).mean()))

    table = {key: np.array([rmse(key, triple) for triple in triples]) for key in errors}
    best = int(np.argmin(sum(np.log(table[key]) * (2 if key[1] == 32 else 1) for key in real)))
    print("steepness:", *STEEPNESS[triples[best]])
    for number, steepness in enumerate((0.0, *STEEPNESS[triples[best]])):
        print(f"| {number} |", *mapping(steepness), "|")
    for block in BLOCKS:
        own = int(np.argmin(sum(np.log(table[key]) for key in real if key[1] == block)))
        print(f"block {block}: its own choice would be", *STEEPNESS[triples[own]])
        for model in models:
            e = errors[model, block]
            shares = np.bincount(e[:, [0, *triples[best]]].argmin(axis=1), minlength=4) / len(e)
            only = [round(float(np.sqrt(e[:, k].mean())), 5) for k in (0, int(e.mean(axis=0).argmin()))]
            print(
                f"  {model}: rmse {table[model, block][best]:.5f}, own {table[model, block][own]:.5f},"
                f" linear only {only[0]}, best single {only[1]}; shares",
                *(f"{100 * share:.2f}" for share in shares),
            )


if __name__ == "__main__":
    main()
