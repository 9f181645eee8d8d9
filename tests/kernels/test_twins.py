"""Every kernel exists twice, compiled by numba and in numpy, with the same interface and bit-identical results."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qformat import kernels
from qformat.codecs.affine import _EXTREMES, _STEPS
from qformat.codecs.codebooks import midpoints
from tests.helpers.kernels import FAMILIES, asymmetric_battery, likely_rows, modules, padded_rows, q4_0_battery, rows

SOURCES = {family: Path(kernels.__file__).parent / family for family in FAMILIES}
PUBLIC = sorted(path.stem for path in SOURCES["numpy"].glob("[!_]*.py"))
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}

Kernels = dict[str, ModuleType]
BOTH: list[Kernels] = modules(*PUBLIC)


# ---- interfaces


@cache
def tree(family: str, name: str) -> ast.Module:
    return ast.parse((SOURCES[family] / f"{name}.py").read_text())


def functions(family: str, name: str) -> dict[str, list[str]]:
    """Return the parameters of each public function of a module; functions that numba inlines into others are not public."""
    found = {}
    for node in tree(family, name).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if not any(ast.unparse(one) == "inline" for one in node.decorator_list):
                found[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("kernel("):  # of a numpy kernel
            function = ast.unparse(node.targets[0])
            found[function] = functions("numpy", name)[function]
    return found


@cache
def names_used_by_numpy_kernels() -> set[str]:
    nodes = [node for name in PUBLIC for node in ast.walk(tree("numpy", name))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_both_families_have_the_same_kernels_with_the_same_parameters(name):
    compiled, numpy = functions("numba", name), functions("numpy", name)
    helpers = numpy.keys() - compiled.keys()
    assert helpers <= names_used_by_numpy_kernels(), "a numpy kernel has no twin in numba"
    assert compiled == {function: numpy.get(function) for function in compiled}


# ---- results


def measured(found: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in found)


def quantize(name: str, both: Kernels, x: np.ndarray) -> list[Any]:
    blocks, lanes = np.zeros(x.size // 32 * BLOCK_BYTES[name], np.uint8), np.zeros(both["blocks"].LANES)
    found = measured(both[name].quantize(x, blocks, lanes))
    values = np.empty(x.size, np.float32)
    if not found[2]:  # no scale is infinite
        both[name].dequantize(blocks, values)
    return [found, blocks, *([] if found[2] else [lanes, values])]


def search(name: str, how: str, both: Kernels, x: np.ndarray) -> list[Any]:
    """Choose scales, and minima if the format has them, and encode with them."""
    count = x.size // 32
    chosen = [np.zeros(count, np.uint16) for _ in range(1 if name == "q4_0" else 2)]
    both[f"{name}_{how}"].choose(x, *chosen)
    blocks, lanes = np.zeros(count * BLOCK_BYTES[name], np.uint8), np.zeros(both["blocks"].LANES)
    found = measured(both[name].encode(x, *chosen, blocks, lanes))
    return [found, *chosen, blocks, *([] if found[2] else [lanes])]


def nlm(mode: str, block: int, both: Kernels, x: np.ndarray) -> list[Any]:
    x = np.resize(x, -(-x.size // block) * block)
    headers = np.zeros(x.size // block, np.uint32)
    getattr(both["nlm_search"], mode)(x, headers, block)
    assert (headers < 1 << 24).all()
    blocks, lanes = np.zeros(headers.size * (3 + block // 2), np.uint8), np.zeros(both["blocks"].LANES)
    found = measured(both["nlm"].encode(x, headers, blocks, lanes, block))
    values = np.empty(x.size, np.float32)
    if not found[2]:
        both["nlm"].dequantize(blocks, values, block)
    return [found, headers, blocks, *([] if found[2] else [lanes, values])]


def affine(both: Kernels, x: np.ndarray, *, sym: bool) -> list[Any]:
    results: list[Any] = []
    for cols, group in ((1, 128), (33, 32), (341, 96), (341, 352), (256, 128)):
        values = padded_rows(x, cols)
        for width, scale in ((2, 0), (3, 1), (4, 0), (8, 2)):  # scales as binary16, bfloat16 and float32
            scales = np.empty(5 * -(-cols // group), np.float32)
            zeros = np.full(scales.size, 1 << (width - 1), np.uint8)
            codes, lanes = np.empty(values.size // 8 * width, np.uint8), np.zeros(16)
            if sym:
                choices = np.array(_EXTREMES[width], np.float32)
                both["affine_search"].symmetric(values, cols, group, width, scale, choices, scales)
            else:
                choices = np.array(_STEPS[width], np.float32)
                both["affine_search"].asymmetric(values, cols, group, width, scale, choices, scales, zeros)
            results += [scales, zeros]
            found = both["affine"].encode(values, cols, group, scales, zeros, codes, lanes, width)
            if np.isfinite(scales).all():
                results += [codes, lanes, measured(found)]
    return results


def lut(both: Kernels, x: np.ndarray) -> list[Any]:
    results: list[Any] = []
    for cols, size, block in ((1, 4, 128), (33, 16, 128), (341, 8, 256), (341, 16, 128), (600, 4, 128)):
        values, padded, width = padded_rows(x, cols), -(-cols // 32) * 32, size.bit_length() - 1
        counts, sums, squares = np.ones(1 << 16, np.int64), np.full(1 << 16, 0.1), np.zeros(5 * 16)
        both["lut"].survey(values, counts, sums)
        both["lut"].row_squares(values, padded, squares)
        books = np.empty(5 * -(-cols // block) * size, np.float32)
        both["lut_search"].codebooks(values, cols, block, size, books)
        results += [counts, sums, squares, books]
        with np.errstate(over="ignore"):
            halves = books.astype(np.float16)
        for each in (block, 0):
            used = (halves if each else halves[:size]).astype(np.float32)
            borders = midpoints(used.astype(np.float16).reshape(-1, size)).reshape(-1)
            for scales in (np.ones(5, np.float32), np.array([0, 1, 0.5, -2, 0], np.float32)):
                codes, lanes, out = np.empty(values.size // 8 * width, np.uint8), np.zeros(16), np.empty_like(values)
                found = both["lut"].encode(values, cols, each, scales, borders, used, codes, lanes, width)
                both["lut"].dequantize(used, scales, codes, out, padded, each, width)
                if np.isfinite(used).all():
                    results += [measured(found), codes, lanes, out]
    return results


def scaled(both: Kernels, x: np.ndarray) -> list[Any]:
    results: list[Any] = []
    rng = np.random.default_rng(0)
    for width in (1, 2, 3, 4, 5, 6, 8):
        for count, cols, group in ((2, 32, 32), (3, 33, 7), (1, 70, 70), (2, 100, 64)):
            codes = rng.integers(0, 1 << width, count * -(-cols // 32) * 32).astype(np.uint8)
            stored, again = np.empty(codes.size // 8 * width, np.uint8), np.empty_like(codes)
            both["packing"].pack(codes, stored, width)
            both["packing"].unpack(stored, again, width)
            assert np.array_equal(again, codes)
            groups = 3 * -(-cols // group)
            scales, zeros = np.resize(x, groups), np.resize(x[::-1], groups)
            for subtract in (False, True):
                values = np.empty((count, cols), np.float32)
                bands = rng.integers(0, 3, count).astype(np.uint32)
                both["scaled"].dequantize(scales, zeros, bands, stored, values, group, width, 1, subtract)
                # which NaN comes of infinities differs between processors
                results += [stored, np.where(np.isnan(values), np.float32(np.nan), values)]
    return results


def codebook(both: Kernels, x: np.ndarray) -> list[Any]:
    results: list[Any] = []
    codes = np.resize(x.view(np.uint8), 5 * 352)
    for cols, group, width in ((1, 16, 4), (33, 16, 8), (341, 48, 4), (341, 352, 8), (256, 64, 4)):
        table, scales = np.resize(x, 1 << width), np.resize(x[::-1], 5 * 352)
        packed = np.resize(codes, 5 * -(-cols // 32) * 4 * width)
        for starts in (np.arange(5) * cols, np.arange(5) * (-(-cols // group) * group)):
            for factor in (np.float32(1), np.float32(1 / 127)):
                out = np.empty((5, cols), np.float32)
                both["codebook"].dequantize(table, scales, factor, starts, packed, out, group, width)
                results.append(np.where(np.isnan(out), np.float32(0), out))
    return results


def floats(both: Kernels, x: np.ndarray) -> list[Any]:
    results: list[Any] = []
    for part in (x[:0], x[:1], x[:31], x[:33], x[1:], x):
        values, others, size = part.copy(), part[::-1].copy(), part.size
        for name in ("f32_to_f16", "f32_to_bf16"):
            halves = np.empty(size, np.uint16)
            getattr(both["floats"], name)(values, halves)
            results += [halves, int(both["floats"].peak_16(halves))]
        lanes, counts = np.zeros(32), np.zeros(1 << 19, np.int64)
        with np.errstate(over="ignore", invalid="ignore"):
            largest = both["floats"].difference(values, others, lanes)
            both["floats"].error_histogram(values, others, counts)
            exact = np.abs(values - others).view(np.uint32)
        peak = both["floats"].peak_f32(values)
        assert peak == (np.abs(values).view(np.uint32).max() if size else 0)
        assert largest == (exact.max() if size else 0)
        results += [lanes, counts]
    return results


RUNS: dict[str, Callable[[Kernels, np.ndarray], list[Any]]] = {
    **{name: partial(quantize, name) for name in BLOCK_BYTES},
    **{f"q4_0_{how}": partial(search, "q4_0", how) for how in ("table", "exact")},
    **{f"q4_1_{how}": partial(search, "q4_1", how) for how in ("als", "best")},
    **{f"nlm {mode} {block}": partial(nlm, mode, block) for mode in ("rmse", "maximum") for block in (32, 64, 128)},
    "floats": floats,
    "scaled": scaled,
}
SLOW_RUNS = {
    "affine sym": partial(affine, sym=True),
    "affine": partial(affine, sym=False),
    "lut": lut,
    "codebook": codebook,
}
CASES = asymmetric_battery() | q4_0_battery()

modest = hnp.arrays(np.float32, 256, elements=st.floats(-(2.0**15), 2.0**15, width=32))


def assert_identical(run: Callable[[Kernels, np.ndarray], list[Any]], x: np.ndarray) -> None:
    compiled, numpy = (run(both, x) for both in BOTH)
    assert len(compiled) == len(numpy)
    for one, other in zip(compiled, numpy, strict=True):
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()
        else:
            assert one == other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [*RUNS, *SLOW_RUNS])
def test_numba_and_numpy_give_identical_results(kernel, case):
    assert_identical((RUNS | SLOW_RUNS)[kernel], CASES[case].reshape(-1))


@pytest.mark.parametrize("kernel", RUNS)
@given(x=st.one_of(rows, likely_rows, modest))
def test_numba_and_numpy_give_identical_results_for_any_floats(kernel, x):
    assert_identical(RUNS[kernel], x)


@pytest.mark.parametrize("kernel", RUNS)
def test_numba_and_numpy_give_identical_results_for_real_weights_and_zeros_of_both_signs(kernel, minilm):
    from safetensors.numpy import load_file

    x = load_file(minilm / "model.safetensors")["encoder.layer.0.intermediate.dense.weight"].reshape(-1)
    for blocks in (0, 1, 7, 17, 1030):
        assert_identical(RUNS[kernel], x[: 128 * blocks])
    few = (np.round(np.random.default_rng(8).standard_normal(1000 * 128) * 2) / 3).astype(np.float32)
    assert (np.signbit(few) & (few == 0)).any()
    assert_identical(RUNS[kernel], few)
