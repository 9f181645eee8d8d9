"""The scales that the searches for Q4_0 choose: against each other, and against every binary16 number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

import qformat
from qformat.kernels import load
from tests.helpers.kernels import modules, q4_0_battery, rows

SEARCHES = ["table", "exact"]
NUMBA, NUMPY = modules("q4_0", "q4_0_table", "q4_0_exact")
EVERY_SCALE = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
EVERY_SCALE = EVERY_SCALE[np.isfinite(EVERY_SCALE) & (EVERY_SCALE != 0)]


def search(kernels, name: str, x: np.ndarray) -> np.ndarray:
    scales = np.zeros(x.size // 32, np.uint16)
    kernels[f"q4_0_{name}"].choose(np.ascontiguousarray(x, np.float32).reshape(-1), scales)
    return scales


def encode(kernels, x: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    blocks, lanes = np.zeros(scales.size * 18, np.uint8), np.zeros(load("blocks").LANES)
    found = kernels["q4_0"].encode(np.ascontiguousarray(x, np.float32).reshape(-1), scales, blocks, lanes)
    return blocks, lanes, tuple(int(value) for value in found)


def errors(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the squared error of each block with the nearest codes, in float64."""
    d = scales.view(np.float16).astype(np.float64)[:, None]
    wide = x.reshape(-1, 32).astype(np.float64)
    with np.errstate(all="ignore"):
        codes = np.where(d == 0, 0, np.clip(np.rint(wide / d), -8, 7))
    return np.square(wide - codes * d).sum(axis=1)


def least_error(block: np.ndarray) -> float:
    """Return the error of the best of all scales."""
    wide = block.astype(np.float64)
    codes = np.clip(np.rint(wide / EVERY_SCALE[:, None]), -8, 7)
    return min(np.square(wide - codes * EVERY_SCALE[:, None]).sum(axis=1).min(), np.square(wide).sum())


CASES = q4_0_battery()


@pytest.mark.parametrize("case", [case for case in CASES if "overflow" not in case and case != "largest floats"])
def test_q4_0_exact_search_finds_the_best_of_all_scales(case):
    x = CASES[case][:4]
    found = errors(x, search(NUMBA, "exact", x))
    for block, error in zip(x, found, strict=True):
        energy = np.square(block.astype(np.float64)).sum()
        assert error <= least_error(block) + 1e-12 * energy


@given(rows)
def test_q4_0_exact_search_errs_no_more_than_table_and_table_no_more_than_naive(x):
    lanes, blocks = np.zeros(16), np.zeros(x.size // 32 * 18, np.uint8)
    overflowed = NUMBA["q4_0"].quantize(x, blocks, lanes)[2]
    naive = blocks.reshape(-1, 18)[:, :2].copy().view(np.uint16)[:, 0]
    table, exact = (search(NUMBA, name, x) for name in SEARCHES)
    assert (np.isinf(table.view(np.float16)) == np.isinf(naive.view(np.float16))).all()
    assert (np.isinf(exact.view(np.float16)) == np.isinf(naive.view(np.float16))).all()
    if not overflowed:
        slack = 1e-6 * np.square(x.reshape(-1, 32).astype(np.float64)).sum(axis=1)
        assert (errors(x, table) <= errors(x, naive) + slack).all()
        assert (errors(x, exact) <= errors(x, table) + slack).all()


def test_q4_0_searches_reduce_the_error_of_real_weights(minilm, tmp_path):
    from safetensors.numpy import load_file

    name = "encoder.layer.3.attention.output.dense.weight"
    x = load_file(minilm / "model.safetensors")[name]
    found = {}
    for kind in ("naive", *SEARCHES):
        qformat.save_file({"x": x}, tmp_path / "x.qf", f"q4_0:search={kind}", overwrite=True)
        with qformat.safe_open(tmp_path / "x.qf") as f:
            decoded, info = f.get_tensor("x"), f.info("x")
        assert info.encoder == {"search": kind}
        found[kind] = np.sqrt(np.mean(np.square((x - decoded).astype(np.float64))))
        assert info.error.rmse == pytest.approx(found[kind], rel=1e-6)
    assert found["table"] < 0.95 * found["naive"]
    assert found["exact"] < found["table"] < 1.001 * found["exact"]


def test_q4_0_searches_meet_blocks_of_one_magnitude():
    x = np.zeros((8, 32), np.float32)
    x[:, ::3] = np.array([1, -1, 0.7, -0.7, 3e-7, 3e4, 1e-3, -2e-6], np.float32)[:, None]
    x[::2, 5] *= -1
    for name in SEARCHES:
        relative = np.sqrt(errors(x, search(NUMBA, name, x)) / np.square(x.astype(np.float64)).sum(axis=1))
        assert (relative[[0, 1, 2, 3, 5, 6]] < 2.0**-11).all()
        assert relative[0] == relative[1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SEARCHES)
def test_q4_0_searches_confine_nan_and_infinity_to_their_block(name, bad):
    x = CASES["normal"].copy()
    expected = search(NUMBA, name, x)
    x[[3, 20], [4, 31]] = bad
    scales = search(NUMBA, name, x)
    others = np.setdiff1d(np.arange(len(x)), [3, 20])
    np.testing.assert_array_equal(scales[others], expected[others])
    assert encode(NUMBA, x, scales)[2][0] >= 0x7F800000
