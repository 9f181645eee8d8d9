from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from qformat.codecs.codebooks import Points, deviation, fit_gauss, fit_lloyd, fit_percentile, lloyd
from qformat.codecs.layout import Chunk
from qformat.codecs.registry import parse_type
from tests.helpers.arrays import distance
from tests.helpers.codecs import encode, survey_of

every_size = pytest.mark.parametrize("size", [4, 8, 16])


def distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return {
        "normal": rng.standard_normal(100_000),
        "heavy tails": rng.standard_t(3, 100_000),
        "uniform": rng.uniform(-1, 1, 100_000),
        "two heaps": np.concatenate([rng.normal(-3, 0.5, 50_000), rng.normal(1, 0.1, 50_000)]),
        "outliers": np.concatenate([rng.standard_normal(100_000), [60, -80, 81]]),
        "skewed": rng.exponential(1, 100_000),
        "as bfloat16": (rng.standard_normal(100_000).astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32),
    }


def long_lloyd(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Lloyd's method on the values themselves."""
    values = np.sort(x)
    sums = np.concatenate([[0], np.cumsum(values)])
    for _ in range(1000):
        inner = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        borders = np.concatenate([[0], inner, [values.size]])
        counts = np.diff(borders)
        moved = np.where(counts > 0, np.diff(sums[borders]) / np.maximum(counts, 1), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


@every_size
@pytest.mark.parametrize("name", distributions())
def test_lloyd_codebooks_err_no_more_than_a_long_run_on_the_values(name, size):
    x = distributions()[name].astype(np.float32).astype(np.float64)
    book, _ = fit_lloyd(survey_of(x), size)
    assert (np.diff(book.entries.astype(np.float32)) > 0).all()
    mean, deviation_ = x.mean(), x.std()
    middles = np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)])
    starts = [mean + 1.3 * deviation_ * middles, np.quantile(x, (np.arange(size) + 0.5) / size)]
    for start in starts:
        assert distance(x, book.entries) <= distance(x, long_lloyd(x, start)) * 1.005


@pytest.mark.parametrize("name", distributions())
def test_no_lloyd_iteration_increases_the_error(name):
    survey = survey_of(distributions()[name])
    _, history = fit_lloyd(survey, 16)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(history))
    points = Points.of(survey)
    poor = np.append(np.arange(16), points.counts.size)  # a start that needs many rounds
    _, history = lloyd(points, poor)
    assert len(history) > 10
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(history))


def test_lloyd_codebooks_resolve_values_far_from_zero():
    x = np.random.default_rng(9).normal(1, 0.02, 100_000).astype(np.float32).astype(np.float64)
    book, _ = fit_lloyd(survey_of(x), 16)
    assert distance(x, book.entries) < 1.02 * distance(x, long_lloyd(x, np.quantile(x, (np.arange(16) + 0.5) / 16)))


@every_size
def test_percentile_codebooks_hold_the_quantiles_of_the_values(size):
    for x in distributions().values():
        book = fit_percentile(survey_of(x), size)
        shares = np.delete((2 * np.arange(size + 1) + 1) / (2 * size + 2), size // 2)
        expected = np.quantile(x.astype(np.float32), shares)
        np.testing.assert_allclose(book.entries, expected, rtol=0.01, atol=0.002)
    book = fit_percentile(survey_of(np.array([0.7, -0.7, 0.7, 0.0, 0.0])), size)
    assert {-0.7, 0.0, 0.7} >= {round(float(entry), 1) for entry in book.entries}


@every_size
def test_gauss_codebooks_use_every_code_equally_often(size):
    x = np.random.default_rng(10).normal(0, 0.03, 400_000)
    assert deviation(survey_of(x)) == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-4)
    codec = parse_type(f"lut:size={size},fit=gauss")
    encoded = encode(codec, x.astype(np.float32).reshape(400, 1000))
    counts = codec.histograms(encoded.parts, Chunk(0, 400, 0, 1000))["histogram"]
    counts[size // 2 - 1] -= 400 * 24  # zeros that fill up the rows, at a threshold
    np.testing.assert_allclose(counts / 400_000, 1 / size, rtol=0.06)
    middles = [0.03 * NormalDist().inv_cdf((2 * i + 1) / (2 * size)) for i in range(size)]
    np.testing.assert_allclose(np.frombuffer(encoded.parts[0], np.float16), middles, rtol=5e-3)
    thresholds = fit_gauss(2.0, size).thresholds
    np.testing.assert_allclose(thresholds, [2 * NormalDist().inv_cdf(i / size) for i in range(1, size)], rtol=1e-6)


@pytest.mark.parametrize("name", ["encoder.layer.0.output.dense.weight", "encoder.layer.5.output.dense.weight"])
def test_lloyd_codebooks_of_real_weights_err_no_more_than_a_long_run(minilm, name):
    from safetensors.numpy import load_file

    x = load_file(minilm / "model.safetensors")[name].reshape(-1).astype(np.float64)
    book, _ = fit_lloyd(survey_of(x), 16)
    found = distance(x, book.entries)
    middles = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    for start in (1.3 * x.std() * middles, np.linspace(x.min(), x.max(), 16), book.entries.astype(np.float64)):
        assert found <= distance(x, long_lloyd(x, start)) * 1.005
