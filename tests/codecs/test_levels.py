"""``ternary`` and ``levels``: the best levels, by sparsity, by rate, and weights that have few values already."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import qformat
from qformat.codecs.layout import Chunk
from qformat.codecs.level_fit import fit
from qformat.codecs.levels import LevelCodec
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, F32, Elements
from qformat.errors import SourceError
from tests.helpers.codecs import chunks_of, encode, survey_of
from tests.helpers.kernels import modules

BOTH = NUMBA, NUMPY = [each["levels"] for each in modules("levels")]
SCALES = ("scale=tensor", "scale=row", "scale=group,group=64")
every_scale = pytest.mark.parametrize("scale", SCALES)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def saved(tmp_path, array, type_, **options):
    path = tmp_path / "x.qf"
    qformat.save_file({"x": array}, path, {"x": type_}, overwrite=True, **options)
    with qformat.safe_open(path) as f:
        record = f.info("x")
        return f.get_tensor("x"), f.get_codes("x"), record, 8 * record.nbytes / max(1, record.elements)


def relative(found: np.ndarray, array: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - array.astype(np.float64)) ** 2)) / array.std())


# ---- quality


@every_scale
def test_ternary_error_of_gaussian_weights_is_the_least_possible(scale, tmp_path):
    x = normal(1024, 1024)
    found, codes, record, bits = saved(tmp_path, x, f"ternary:{scale}")
    assert relative(found, x) <= 0.437
    assert record.error.rmse == pytest.approx(np.sqrt(np.mean((found - x.astype(np.float64)) ** 2)), rel=1e-6)
    assert record.error.maximum == np.abs(found - x).max()
    assert bits < 1.545 + {"scale=tensor": 0, "scale=row": 16 / 1024}.get(scale, 16 / 64)
    assert set(np.unique(codes.codes)) == {-1, 0, 1}


@pytest.mark.parametrize(("n", "most"), [(3, 0.437), (5, 0.2835), (7, 0.2105), (9, 0.1675), (15, 0.1045)])
def test_levels_error_falls_with_the_number_of_levels(n, most, tmp_path):
    x = normal(700, 900)
    found, codes, _, _ = saved(tmp_path, x, f"levels:n={n},scale=tensor")
    assert relative(found, x) <= most
    assert codes.levels.size == n
    assert codes.levels[n // 2] == 0
    assert (np.diff(codes.levels) > 0).all()


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=14), st.sampled_from([3, 5]))
def test_fitted_levels_have_the_least_error_of_all_cells(numbers, size):
    # integers up to 40 fall into bins of their own, unless they are equal
    values = np.array(numbers, np.float64)
    levels = fit(survey_of(values), size)
    codes = np.empty(values.size, np.uint8)
    NUMBA.classify(values.astype(np.float32), levels.thresholds, codes)
    error = np.sum((values - levels.entries[codes].astype(np.float64)) ** 2)
    assert error <= _least_error(np.sort(values), size // 2) * (1 + 1e-6) + 1e-9


def _least_error(values: np.ndarray, half: int) -> float:
    """Try every way to cut both sides of zero into cells of neighbours."""
    best = 0.0
    for side in (values[values > 0], -values[values < 0][::-1]):
        choices = []
        for cuts in itertools.combinations_with_replacement(range(side.size + 1), half):
            cells = np.split(side, cuts)
            choices.append(np.sum(cells[0] ** 2) + sum(np.sum((c - c.mean()) ** 2) for c in cells[1:] if c.size))
        best += min(choices)
    return best


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 7, 15]))
def test_fitted_levels_are_finite_and_ordered_for_any_values(seed, size):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(rng.integers(1, 400)) * np.exp(rng.normal(0, 20))).astype(np.float32)
    values[rng.random(values.size) < rng.random()] = rng.choice([0, 1, -1e-30])
    bits = float(rng.random() * 3 + 0.01)
    for levels in (
        fit(survey_of(values), size),
        fit(survey_of(values), size, bits=bits),
        fit(survey_of(values), size, sparsity=0.5),
    ):
        assert np.isfinite(levels.entries).all()
        assert levels.entries[size // 2] == 0
        assert (levels.thresholds[1:] >= levels.thresholds[:-1]).all()


# ---- sparsity and rate


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
@every_scale
def test_sparsity_zeroes_the_smallest_weights(scale, sparsity, tmp_path):
    x = normal(90, 640, seed=3)
    found, _, _, _ = saved(tmp_path, x, f"levels:n=5,{scale},sparsity={sparsity}", allow_zeroed=True)
    groups = {"scale=tensor": x.reshape(1, -1), "scale=row": x}.get(scale, x.reshape(-1, 64))
    zeros = found.reshape(groups.shape) == 0
    assert (zeros.mean(axis=1) >= sparsity).all()
    for values, zero in zip(np.abs(groups), zeros, strict=True):
        assert zero.all() or sparsity < 0.5 or values[zero].max() <= values[~zero].min()
    if scale == "scale=tensor":
        assert zeros.mean() < sparsity + 0.01


def test_sparsity_applies_to_rows_or_to_the_tensor_as_scales_do(tmp_path):
    x = normal(8, 512) * np.exp(np.arange(8))[:, None].astype(np.float32)
    by_tensor = saved(tmp_path, x, "ternary:scale=tensor,sparsity=0.5")[0] == 0
    by_row = saved(tmp_path, x, "ternary:scale=row,sparsity=0.5")[0] == 0
    assert by_tensor[0].all()
    assert not by_tensor[7].mean() > 0.2
    assert (by_row.mean(axis=1) >= 0.5).all()
    assert by_row.mean() < 0.7


@pytest.mark.parametrize(
    "type_", ["ternary", "ternary:scale=tensor", "levels:n=15,scale=tensor", "levels:n=9,scale=group"]
)
def test_levels_keep_to_a_rate_and_err_less_at_higher_ones(type_, tmp_path, minilm):
    x = load_file(minilm / "model.safetensors")["encoder.layer.1.intermediate.dense.weight"]
    errors = []
    for bpw in (0.4, 0.8, 1.1, 1.5, 2.0):
        found, _, record, bits = saved(tmp_path, x, f"{type_}{',' if ':' in type_ else ':'}bpw={bpw}")
        assert bits <= bpw + 800 / x.size
        assert bits >= 0.93 * min(bpw, 1.5)
        errors.append(relative(found, x))
        assert record.encoder["bpw"] == str(bpw)
    assert errors == sorted(errors, reverse=True)
    if (
        type_ == "levels:n=15,scale=tensor"
    ):  # entropy-coded scalar quantization of Gaussian weights: a quarter bit from the bound
        assert errors[-1] < 1.08 * 2 ** -(2.0 - 0.254)


def test_a_rate_below_that_of_the_scales_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"'x': its scales alone take 0.25 bits per weight.*--tensor-type"):
        saved(tmp_path, normal(64, 64), "ternary:scale=row,bpw=0.2")


# ---- weights that have few values already


@every_scale
@pytest.mark.parametrize("magnitude", [0.0123, 1 / 3, 1e-20, 1e30])
def test_ternary_weights_are_stored_exactly(scale, magnitude, tmp_path):
    x = (np.random.default_rng(1).integers(-1, 2, (300, 130)) * np.float32(magnitude)).astype(np.float32)
    x[5] = 0
    x[6] = np.float32(magnitude)
    for type_ in (f"ternary:{scale}", f"levels:n=7,{scale}"):
        found, _, record, bits = saved(tmp_path, x, type_)
        np.testing.assert_array_equal(found, x)
        assert (record.error.rmse, record.error.maximum) == (0, 0)
        assert bits < 1.7 + 16 * (3 if "group" in scale else 1) / 130


def test_ternary_rows_are_stored_exactly_where_the_scale_dtype_holds_them(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.integers(-1, 2, (200, 96)) * rng.lognormal(-3, 1, (200, 1))
    bf16 = (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    for type_ in ("ternary", "ternary:dtype=bf16", "levels:n=5,dtype=bf16"):
        np.testing.assert_array_equal(saved(tmp_path, bf16, type_)[0], bf16)
    full = x.astype(np.float32)
    np.testing.assert_array_equal(saved(tmp_path, full, "ternary:dtype=f32")[0], full)


def test_tensors_of_five_values_are_stored_exactly_by_levels(tmp_path):
    x = np.random.default_rng(3).choice(np.array([-3.7, -0.1, 0, 0.25, 9e4], np.float32), (50, 41))
    np.testing.assert_array_equal(saved(tmp_path, x, "levels:scale=tensor")[0], x)


# ---- scales


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_ternary_scales_are_those_of_least_squares(dtype, tmp_path):
    x = normal(40, 200, seed=5) * np.exp(normal(40, 1, seed=6))
    _, codes, record, _ = saved(tmp_path, x, f"ternary:dtype={dtype}")
    assert record.params["dtype"] == dtype
    chosen = codes.levels[codes.codes.astype(int) + 1].astype(np.float64)
    best = np.sum(chosen * x, axis=1) / np.sum(chosen**2, axis=1)
    np.testing.assert_allclose(codes.scales[:, 0], best, rtol={"f16": 2**-11, "bf16": 2**-8, "f32": 2**-23}[dtype])


def test_get_codes_returns_codes_levels_and_scales_of_the_weights(tmp_path):
    x = normal(17, 333)
    found, codes, _, _ = saved(tmp_path, x, "levels:n=9,scale=group,group=96")
    assert codes.codes.dtype == np.int8
    assert codes.scales.shape == (17, 4)
    values = codes.levels[codes.codes.astype(int) + 4] * codes.scales[:, np.arange(333) // 96]
    np.testing.assert_array_equal(values, found)
    codec = parse_type("levels:n=9,scale=tensor")
    encoded = encode(codec, x)
    counts = codec.histograms(encoded.parts, Chunk(0, 17, 0, 333))["histogram"]
    assert counts.sum() == x.size
    assert encoded.entropy > 0
    with qformat.safe_open(tmp_path / "x.qf") as f, pytest.raises(KeyError):
        f.get_codes("y")


@pytest.mark.parametrize("type_", ["ternary", "ternary:scale=tensor", "levels:n=7,scale=group", "levels:sparsity=0.5"])
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1,), (50,), (3, 1), (1, 600_000), (3, 524_289), (2, 3, 5), ()])
def test_levels_of_every_shape_round_trip(type_, shape, tmp_path):
    x = np.asarray(normal(*shape) if shape else np.float32(1.5), np.float32)
    found, codes, record, _ = saved(tmp_path, x, type_, allow_zeroed=True)
    assert found.shape == codes.codes.shape == shape
    codec = parse_type(type_)
    assert record.segments[1].length == 4 * len(chunks_of(codec, shape))
    if len(shape) > 1 and shape[0]:
        with qformat.safe_open(tmp_path / "x.qf") as f:
            np.testing.assert_array_equal(f.get_rows("x", [0, shape[0] - 1, 0]), found[[0, shape[0] - 1, 0]])


# ---- refusals


def test_levels_refuse_weights_that_cannot_be_stored_by_name(tmp_path):
    x = normal(8, 64)
    cases = [
        (np.where(x > 2, np.inf, x), "ternary", "NaN or infinity"),
        (np.where(x > 2, np.nan, x), "levels:scale=tensor", "NaN or infinity"),
        (x * np.float32(1e6), "ternary", "too large"),
        (x.astype(np.float64) * 1e39, "ternary:scale=tensor", "too large"),
        (np.vstack([x, x * np.float32(1e-12)]), "ternary", "would become zero"),
    ]
    for array, type_, message in cases:
        with pytest.raises(SourceError, match=rf"tensor 'x' .*{message}") as caught:
            saved(tmp_path, array, type_)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
    mixed = np.vstack([x, x * np.float32(1e-12)])
    assert not saved(tmp_path, mixed, "ternary", allow_zeroed=True)[0][8:].any()
    assert relative(saved(tmp_path, mixed, "ternary:dtype=bf16")[0][8:], mixed[8:]) < 0.5
    assert relative(saved(tmp_path, mixed[8:], "ternary")[0], mixed[8:]) < 0.5  # where all are small, the levels are


def test_levels_refuse_weights_below_the_range_of_float32(tmp_path):
    tiny = np.full((2, 64), 1e-50)
    for type_ in ("ternary", "ternary:scale=tensor", "levels:scale=group", "ternary:dtype=f32"):
        with pytest.raises(SourceError, match=r"tensor 'x' .*would become zero"):
            saved(tmp_path, tiny, type_)
        assert not saved(tmp_path, tiny, type_, allow_zeroed=True)[0].any()


@pytest.mark.parametrize("type_", ["ternary:sparsity=0.5", "levels:scale=group,sparsity=0.9", "ternary:bpw=0.9"])
def test_levels_refuse_to_zero_a_tensor_without_allow_zeroed(type_, tmp_path):
    signs = np.sign(normal(64, 256))  # all as small as the others
    with pytest.raises(SourceError, match=r"tensor 'x' .*would become zero"):
        saved(tmp_path, signs, type_)
    assert not saved(tmp_path, signs, type_, allow_zeroed=True)[0].any()


@pytest.mark.parametrize("magnitude", [2.0**-149, 3 * 2.0**-149, 2.0**-126, 1.0, 3.4028234663852886e38])
@every_scale
def test_ternary_keeps_zeros(scale, magnitude, tmp_path):
    x = (np.random.default_rng(8).integers(-1, 2, (5, 96)) * magnitude).astype(np.float32)
    found = saved(tmp_path, x, f"ternary:{scale}", allow_zeroed=True)[0]
    assert not found[x == 0].any()
    if not (scale == "scale=tensor" and magnitude < 2.0**-126):  # in the bin of zero
        np.testing.assert_array_equal(found, x)


def test_five_values_far_apart_are_stored_exactly_by_levels(tmp_path):
    x = np.array([[-2.7027508e23, -5.5042636e13, 0, 2.7627678e-9, 1.5]], np.float32)
    np.testing.assert_array_equal(saved(tmp_path, x, "levels:n=13,scale=tensor")[0], x)


@pytest.mark.parametrize("sparsity", ["1e-9", "0.5", "0.999"])
@every_scale
def test_sparsity_of_the_largest_floats_does_not_overflow(scale, sparsity, tmp_path):
    largest = np.sign(normal(3, 341)) * np.finfo(np.float32).max
    x = largest.astype(np.float32)
    x[:, 1::2] *= np.float32(0.5)
    dtype = "" if scale == "scale=tensor" else ",dtype=f32"
    found = saved(tmp_path, x, f"levels:{scale}{dtype},sparsity={sparsity}", allow_zeroed=True)[0]
    assert np.isfinite(found).all()  # warnings are errors


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 2.0]))
def test_fitting_levels_to_a_rate_works_for_values_far_apart(seed, bits):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(40) * 10.0 ** rng.integers(-45, 38, 40)
    for size in (3, 7, 15):
        levels = fit(survey_of(values), size, bits=bits)  # warnings are errors
        assert np.isfinite(levels.entries).all()
        assert levels.entries[size // 2] == 0


@pytest.mark.parametrize("type_", ["ternary", "ternary:dtype=bf16", "levels:n=7,scale=group,group=64,dtype=f32"])
def test_no_neighbouring_scale_of_levels_has_a_smaller_error(type_, tmp_path):
    x = normal(30, 160, seed=9) * np.exp(normal(30, 1, seed=10))
    found, codes, record, _ = saved(tmp_path, x, type_)
    chosen = codes.levels[codes.codes.astype(int) + codes.levels.size // 2].astype(np.float64)
    width = 64 if "group" in type_ else 160
    spread = codes.scales.astype(np.float64)[:, np.arange(160) // width]
    least = np.sum((x - chosen * spread) ** 2)
    assert np.sum((x - found.astype(np.float64)) ** 2) == pytest.approx(least, rel=1e-6)
    for step in (-2, -1, 1, 2):
        if record.params["dtype"] == "f16":
            other = (
                (codes.scales.astype(np.float16).view(np.uint16).astype(np.int64) + step)
                .astype(np.uint16)
                .view(np.float16)
            )
        else:
            by = step << (16 if record.params["dtype"] == "bf16" else 0)
            other = (codes.scales.view(np.uint32).astype(np.int64) + by).astype(np.uint32).view(np.float32)
        for number, start in enumerate(range(0, 160, width)):
            part = slice(start, start + width)
            errors = [
                np.sum((x[:, part] - chosen[:, part] * scales[:, number, None].astype(np.float64)) ** 2, axis=1)
                for scales in (codes.scales, other)
            ]
            assert (errors[0] <= errors[1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("type_", ["ternary", "levels:n=11,scale=tensor", "levels:scale=group,sparsity=0.7"])
def test_histograms_of_levels_count_the_codes(type_, tmp_path):
    x = normal(37, 211, seed=11)
    _, codes, _, _ = saved(tmp_path, x, type_)
    codec = parse_type(type_)
    encoded = encode(codec, x)
    expected = np.bincount((codes.codes.astype(int) + codes.levels.size // 2).ravel(), minlength=codes.levels.size)
    np.testing.assert_array_equal(codec.histograms(encoded.parts, Chunk(0, 37, 0, 211))["histogram"], expected)


# ---- kernels


@given(st.integers(0, 2**32 - 1))
def test_level_kernels_of_numba_and_numpy_give_identical_results(seed):
    rng = np.random.default_rng(seed)
    rows, cols = (int(n) for n in rng.integers(1, [6, 150]))
    group = int(rng.choice([cols, 32, 64]))
    group = min(group, cols)
    x = (rng.standard_normal(rows * cols) * rng.choice([1, 1e-30, 1e30])).astype(np.float32)
    x[rng.random(x.size) < 0.3] = 0
    if rng.random() < 0.3:
        x = np.sign(x) * np.float32(0.1)
    count = rows * -(-cols // group)
    entries = np.array([-1.5, -0.5, 0, 0.5, 1.5], np.float32)
    results = []
    for kernels in BOTH:
        squares, magnitudes = np.empty(count), np.empty(count, np.uint32)
        kernels.measure(x, cols, group, squares, magnitudes)
        scales = np.where(squares > 0, np.sqrt(squares / group), 1).astype(np.float32)
        scales[scales == 0] = 1
        y, codes = np.empty_like(x), np.empty(x.size, np.uint8)
        kernels.unscale(x, cols, group, scales, scales / 8, y)
        kernels.classify(y, np.array([-1, -0.25, 0.25, np.inf], np.float32), codes)
        common, own = np.empty(count), np.empty(count)
        kernels.products(x, codes, entries, cols, group, common, own)
        values = entries[codes]
        kernels.rescale(values, cols, group, scales)
        results.append((squares, magnitudes, y, codes, common, own, values))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_ternary_of_bfloat16_equals_ternary_of_the_same_float32_values():
    x = normal(40, 100)
    patterns = (x.view(np.uint32) >> 16).astype(np.uint16)
    codec = parse_type("ternary")
    assert isinstance(codec, LevelCodec)
    both = (Elements(BF16, patterns), Elements(F32, (patterns.astype(np.uint32) << 16).view(np.float32)))
    narrow, wide = (encode(codec, elements).parts for elements in both)
    assert [bytes(part) for part in narrow] == [bytes(part) for part in wide]
