"""``scm``: sizes and errors of layers, bounds that are met, weights that come back bit for bit, damage that is noticed."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qformat
from qformat.codecs.registry import parse_type
from qformat.codecs.scm import rate_control
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.truncate import truncate
from qformat.dtypes import DTYPES, Elements
from qformat.errors import FormatError, SourceError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.quality import Quality
from qformat.records import TensorRecord
from tests.helpers.files import Json
from tests.helpers.hostile import (
    Records,
    changed,
    edited,
    packed,
    read_package,
    read_reference,
    taken_apart,
    verify_one,
)

DTYPE_NAMES = ("f16", "bf16", "f32")
every_dtype = pytest.mark.parametrize("dtype", DTYPE_NAMES)
DISTRIBUTIONS = ("normal", "laplace")
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
LADDER = (*(2 + number / 4 for number in range(17)), 7.0, 8.0)
METRICS = {"max_rmse": "rmse", "max_abs": "maximum", "mean_abs": "mean"}
SLACK = 0.03  # bits for each weight that a layer may leave


def drawn(distribution: str, *shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    found: np.ndarray = getattr(np.random.default_rng(seed), distribution)(size=shape) * scale
    return found.astype(np.float32)


def elements(dtype: str, values: np.ndarray) -> Elements:
    """Return values rounded to a dtype."""
    return Elements(DTYPES[dtype], Elements(DTYPES["f32"], np.asarray(values, np.float32)).cast(DTYPES[dtype]))


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
    """Return the patterns of what was read in the dtype of the source."""
    return Elements(source.dtype, Elements(DTYPES["f32"], found.astype(np.float32)).cast(source.dtype)).data.tobytes()


# ---- parameters


def test_scm_types_print_as_they_are_written_and_are_lossless_by_default():
    assert parse_type("scm") == parse_type("scm:bpw=any")
    assert str(parse_type("scm")) == "scm"
    assert parse_type("scm:lossless=true") != parse_type("scm:bpw=8")
    for number in ("1.5", "2.7", "8", "3e0", "8.0"):
        assert str(parse_type(f"scm:bpw={number}")) == f"scm:bpw={number}"
    for metric in METRICS:
        for bound in ("0", "0.01", "1e-3", "7"):
            assert str(parse_type(f"scm:{metric}={bound}")) == f"scm:{metric}={bound}"


@pytest.mark.parametrize(
    ("type_", "message"),
    [
        ("scm:bpw=1.49", "bpw may be a number from 1.5 to 8, not '1.49'"),
        ("scm:bpw=8.01", "bpw may be a number from 1.5 to 8, not '8.01'"),
        ("scm:bpw=0", "bpw may be"),
        ("scm:bpw=-3", "bpw may be"),
        ("scm:bpw=nan", "bpw may be"),
        ("scm:bpw=inf", "bpw may be"),
        ("scm:bpw=many", "bpw may be a number from 1.5 to 8, not 'many'"),
        ("scm:bpw=", "bpw may be"),
        ("scm:bpw", "give bpw once, as bpw=VALUE"),
        ("scm:bpw=3,bpw=4", "give bpw once"),
        *(
            (f"scm:{metric}={wrong}", f"{metric} may be a number from 0 on, not '{wrong}'")
            for metric in METRICS
            for wrong in ("-0.1", "nan", "inf", "x", "1%")
        ),
        ("scm:bpw=3,max_rmse=0.1", "give one of bpw, max_rmse, max_abs, mean_abs and lossless, not 2 of them"),
        ("scm:max_abs=0.1,mean_abs=0.1", "not 2 of them"),
        ("scm:bpw=3,max_rmse=0.1,lossless=true", "not 3 of them"),
        ("scm:bpw=3,lossless=true", "not 2 of them"),
        ("scm:lossless=1", "lossless may be true or false, not '1'"),
        ("scm:layers=3", "scm has no parameter 'layers'"),
        ("scm:rate=3", "scm has no parameter 'rate'; it knows bpw, max_rmse, max_abs, mean_abs, lossless"),
    ],
)
def test_impossible_scm_parameters_are_refused(type_, message):
    with pytest.raises(TypeSpecError) as caught:
        parse_type(type_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scm_refuses_f64_and_f8_and_leaves_integers_raw(tmp_path):
    for name in ("f64", "f8_e4m3", "f8_e5m2"):
        dtype = DTYPES[name]
        with pytest.raises(SourceError, match=rf"tensor 'x': type scm cannot hold {name}"):
            store(tmp_path / "x.qf", "scm", x=Elements(dtype, np.zeros((2, 3), dtype.storage)))
    qformat.save_file({"n": np.arange(6).reshape(2, 3), "v": np.ones(3, np.float32)}, tmp_path / "x.qf", "scm")
    assert [record_of(tmp_path / "x.qf", name).codec for name in "nv"] == ["i64", "f32"]


# ---- sizes


def check_ladder(record: TensorRecord, *, full: bool) -> None:
    """One layer for each number of bits, which it nearly takes, and maybe one after them."""
    lossy = record.layers[: int(record.params["layers"])]
    assert len(lossy) == len(LADDER) + full
    for layer, bits in zip(lossy, LADDER, strict=False):
        assert bits - SLACK <= layer.bpw <= bits
    for before, after in itertools.pairwise(lossy):
        assert after.error.rmse < before.error.rmse
        assert after.error.maximum <= before.error.maximum
        assert after.error.mean is not None
        assert before.error.mean is not None
        assert after.error.mean < before.error.mean


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "logistic"])
@pytest.mark.parametrize("shape", [(320, 320), (7, 20_011), (1_100, 600)])
def test_scm_layers_take_the_bits_of_the_ladder(distribution, shape, tmp_path):
    store(tmp_path / "x.qf", "scm", x=drawn(distribution, *shape, seed=shape[0]))
    check_ladder(record_of(tmp_path / "x.qf"), full=True)


@every_dtype
def test_scm_layers_take_the_bits_of_the_ladder_for_every_dtype(dtype, tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 300)) * rng.lognormal(-4, 0.5, (400, 1))  # as weights are
    store(tmp_path / "x.qf", "scm", x=elements(dtype, rows))
    check_ladder(record_of(tmp_path / "x.qf"), full=dtype != "bf16")


def test_scm_layers_of_sparse_weights_take_the_bits_of_the_ladder(tmp_path):
    x = drawn("normal", 400, 500)
    x[np.random.default_rng(1).random(x.shape) < 0.3] = 0
    store(tmp_path / "x.qf", "scm", x=x)
    record = record_of(tmp_path / "x.qf")
    layers = record.layers[:-1]
    assert all(any(bits - SLACK <= layer.bpw <= bits for layer in layers) for bits in LADDER if bits <= 6)
    assert all(any(bits - SLACK <= layer.bpw <= bits for bits in LADDER) for layer in layers[:-2])


@pytest.mark.parametrize("bpw", [1.5, 1.77, 2, 2.01, 2.7, 3.14, 4.5, 6.6, 8])
@every_distribution
def test_scm_files_take_the_requested_bits_per_weight(bpw, distribution, tmp_path):
    x = drawn(distribution, 330, 350, seed=3)
    for number, part in enumerate((x, np.concatenate([x] * 5, axis=0))):
        store(tmp_path / f"{number}.qf", f"scm:bpw={bpw}", x=part)
        record = record_of(tmp_path / f"{number}.qf")
        assert bpw - SLACK <= 8 * record.nbytes / part.size <= bpw
        assert record.params["lossless"] is False
        assert record.error is not None
        # those of the ladder below, and the last
        below = [bits for bits in LADDER if bits < bpw]
        assert len(record.layers) in (len(below), len(below) + 1)
        for layer, bits in zip(record.layers, [*below, bpw], strict=False):
            assert layer.bpw <= bits


def test_scm_layers_of_small_tensors_stay_within_the_ladder(tmp_path):
    for size in (1, 2, 31, 64, 65, 200, 3000, 5000):
        store(tmp_path / "x.qf", "scm", x=drawn("normal", 1, size), y=drawn("laplace", size))
        for name in "xy":
            record = record_of(tmp_path / "x.qf", name)
            lossy = record.layers[: int(record.params["layers"])]
            assert len(lossy) >= 1
            assert all(any(layer.bpw <= bits for bits in LADDER) for layer in lossy[1:])
            assert all(one.nbytes < two.nbytes for one, two in itertools.pairwise(record.layers))
            if size >= 1000:
                assert lossy[0].bpw <= 2


# ---- quality


def ideal(distribution: str, rates: list[float]) -> dict[float, float]:
    """Return the rmse of ideally entropy-coded uniform quantization over the standard deviation, at each rate.

    Cells are equally wide, one has zero in its middle; values are the means of cells.
    """
    edges = np.linspace(-16, 16, (1 << 17) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-(middles**2) / 2) if distribution == "normal" else np.exp(-math.sqrt(2) * np.abs(middles))
    density /= density.sum()

    def measured(step: float) -> tuple[float, float]:
        cells = np.rint(middles / step).astype(np.int64)
        cells -= cells.min()
        mass = np.bincount(cells, density)
        sums = np.bincount(cells, density * middles)
        used = mass > 0
        entropy = -np.sum(mass[used] * np.log2(mass[used]))
        power = np.sum(density * middles**2) - np.sum(sums[used] ** 2 / mass[used])
        return float(entropy), math.sqrt(power)

    found = {}
    for rate in rates:
        low, high = 1e-3, 20.0
        for _ in range(24):
            step = math.sqrt(low * high)
            if measured(step)[0] > rate:
                low = step
            else:
                high = step
        found[rate] = measured(high)[1]
    return found


def test_ideal_rate_distortion_of_the_test_is_that_of_theory():
    rate = 7.0
    assert ideal("normal", [rate])[rate] == pytest.approx(math.sqrt(math.pi * math.e / 6) * 2**-rate, rel=2e-3)
    # the best of all scalar quantizers has 10.55 dB
    assert 10 ** (-10.55 / 20) <= ideal("normal", [2.0])[2.0] <= 10 ** (-10.45 / 20)


@every_distribution
def test_scm_errors_are_near_those_of_ideal_coding(distribution, tmp_path):
    best = ideal(distribution, [*LADDER])
    # small matrices have to be told their cells, too
    for shape, limit in (((320, 320), 1.125), ((1_200, 1_000), 1.10 if distribution == "normal" else 1.115)):
        x = drawn(distribution, *shape, seed=7)
        store(tmp_path / "x.qf", "scm", x=x)
        for layer, bits in zip(record_of(tmp_path / "x.qf").layers, LADDER, strict=False):
            found = read(tmp_path / "x.qf", bits).astype(np.float64)
            rmse = math.sqrt(np.mean((found - x) ** 2))
            assert rmse == pytest.approx(layer.error.rmse, rel=1e-6)
            assert best[bits] * 0.97 <= rmse / x.std() <= best[bits] * limit
    store(tmp_path / "x.qf", "scm:bpw=2.7", x=x)
    assert record_of(tmp_path / "x.qf").layers[-1].error.rmse / x.std() <= limit * ideal(distribution, [2.7])[2.7]


# ---- bounds


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bound", [0.014, 0.0101, 0.004, 0.0007])
def test_scm_meets_error_bounds_with_as_few_bits_as_possible(metric, bound, tmp_path):
    x = drawn("laplace", 300, 400, seed=5)
    spread = float(np.float64(x.max()) - x.min())
    errors = {}
    for name, type_ in (("bound", f"scm:{metric}={bound}"), ("ladder", "scm")):
        store(tmp_path / f"{name}.qf", type_, x=x)
    record = record_of(tmp_path / "bound.qf")
    errors = np.abs(read(tmp_path / "bound.qf").astype(np.float64) - x)
    found = {"max_rmse": math.sqrt(np.mean(errors**2)), "max_abs": errors.max(), "mean_abs": errors.mean()}[metric]
    assert found <= bound * spread * (1 + 1e-9)
    assert found == pytest.approx(getattr(record.layers[-1].error, METRICS[metric]), rel=1e-6)
    # missed one layer earlier, and so it is by a file with a few bits less
    assert len(record.layers) > 1
    assert all(getattr(layer.error, METRICS[metric]) > bound * spread for layer in record.layers[:-1])
    step = next(
        layer
        for layer in record_of(tmp_path / "ladder.qf").layers
        if getattr(layer.error, METRICS[metric]) <= bound * spread
    )
    assert record.layers[-1].bpw <= step.bpw + 0.01
    fewer = record.layers[-1].bpw - 0.05
    store(tmp_path / "less.qf", f"scm:bpw={fewer}", x=x)
    assert getattr(record_of(tmp_path / "less.qf").layers[-1].error, METRICS[metric]) > bound * spread


def test_scm_meets_bounds_out_of_reach_losslessly_and_loose_ones_with_one_layer(tmp_path):
    x = drawn("normal", 60, 70)
    for type_ in ("scm:max_rmse=1e-9", "scm:max_abs=0", "scm:mean_abs=0"):
        store(tmp_path / "x.qf", type_, x=x)
        assert record_of(tmp_path / "x.qf").params["lossless"] is True
        assert read(tmp_path / "x.qf").tobytes() == x.tobytes()
    store(tmp_path / "x.qf", "scm:max_abs=1", x=x)
    assert record_of(tmp_path / "x.qf").params == {"layers": 1, "lossless": False}


def test_scm_stores_constant_tensors_exactly_under_any_bound(tmp_path):
    """All are the same, so no error but 0 is allowed."""
    for value in (0.0, -0.3, 2.5):
        x = np.full((20, 30), value, np.float32)
        for metric in METRICS:
            store(tmp_path / "x.qf", f"scm:{metric}=0.1", x=x)
            assert record_of(tmp_path / "x.qf").range == 0
            np.testing.assert_array_equal(read(tmp_path / "x.qf"), x)


# ---- bit for bit


@every_dtype
def test_scm_returns_weights_bit_for_bit_in_at_most_two_percent_more_bytes_than_lossless(dtype, tmp_path):
    x = elements(dtype, drawn("normal", 500, 1000))
    layered, plain = store(tmp_path / "x.qf", "scm", x=x), store(tmp_path / "y.qf", "lossless", x=x)
    assert bits_of(read(tmp_path / "x.qf"), x) == x.data.tobytes()
    assert bits_of(read(tmp_path / "x.qf", "lossless"), x) == x.data.tobytes()
    assert layered <= 1.02 * plain
    assert record_of(tmp_path / "x.qf").error is None
    assert store(tmp_path / "z.qf", "scm:lossless=true", x=x) == layered
    assert (tmp_path / "z.qf").read_bytes() == (tmp_path / "x.qf").read_bytes()


@pytest.mark.parametrize("origin", ["f16", "bf16"])
def test_scm_takes_advantage_of_short_mantissas(origin, tmp_path):
    x = elements(origin, drawn("normal", 500, 1000)).to_f32()
    layered, plain = store(tmp_path / "x.qf", "scm", x=x), store(tmp_path / "y.qf", "lossless", x=x)
    assert read(tmp_path / "x.qf").tobytes() == x.tobytes()
    assert layered <= 1.02 * plain
    mixed = np.where(np.arange(500)[:, None] % 2 == 0, x, drawn("normal", 500, 1000, seed=1))
    store(tmp_path / "x.qf", "scm", x=mixed)
    assert read(tmp_path / "x.qf").tobytes() == mixed.tobytes()


def ends_of(path: Path) -> list[int]:
    """Return the position at which each layer of a tensor of one chunk ends."""
    content = path.read_bytes()
    layers = [segment for segment in record_of(path).segments if segment.name.startswith("layer")]
    return [struct.unpack_from("<H", content, layer.offset + 4)[0] for layer in layers]


@pytest.mark.parametrize(
    ("dtype", "kept", "end"),
    [("f32", 23, 512), ("f16", 10, 512), ("f32", 9, 512), ("f32", 8, 448), ("f32", 7, None), ("bf16", 7, None)],
)
def test_scm_adds_layers_where_the_residual_would_take_more_bytes(dtype, kept, end, tmp_path, monkeypatch):
    x = drawn("normal", 500, 1000).view(np.uint32) >> (23 - kept) << (23 - kept)
    source = elements(dtype, x.view(np.float32))
    size = store(tmp_path / "x.qf", "scm", x=source)
    assert bits_of(read(tmp_path / "x.qf"), source) == source.data.tobytes()
    ends = ends_of(tmp_path / "x.qf")
    store(tmp_path / "bound.qf", "scm:max_abs=0", x=source)
    assert (tmp_path / "bound.qf").read_bytes() == (tmp_path / "x.qf").read_bytes()
    monkeypatch.setattr(rate_control, "_FEW", math.inf)
    without = store(tmp_path / "y.qf", "scm", x=source)
    assert ends == [*ends_of(tmp_path / "y.qf"), *([end] if end else [])]
    assert size < without - 1000 if end else size == without


def test_scm_omits_a_layer_that_saves_less_than_its_record_takes(tmp_path):
    x = drawn("normal", 400, 200)
    x[np.random.default_rng(0).random(x.shape) < 0.2] = 0
    assert np.count_nonzero(x) < 1 << 16 < x.size
    store(tmp_path / "x.qf", "scm", x=x)
    assert record_of(tmp_path / "x.qf").layers[-2].bpw <= LADDER[-1]


def odd_patterns(dtype: str) -> dict[str, np.ndarray]:
    """Finite patterns of all sorts, as f32 numbers that the dtype holds."""
    rng = np.random.default_rng(2)
    mantissa, sign = DTYPES[dtype].mantissa, 8 * DTYPES[dtype].size - 1
    kind = f"u{DTYPES[dtype].size}"
    usual = elements(dtype, drawn("normal", 60, 65)).data.view(kind).astype(np.uint64)
    subnormal = rng.integers(0, 1 << mantissa, (60, 65)).astype(np.uint64)
    signs = rng.integers(0, 2, (60, 65)).astype(np.uint64) << np.uint64(sign)
    cases = {
        "usual and subnormal": np.where(rng.random((60, 65)) < 0.2, subnormal | signs, usual),
        "zeros of both signs": np.where(rng.random((60, 65)) < 0.5, signs, usual),
        "a few negative zeros": np.where(rng.random((60, 65)) < 0.003, 1 << sign, usual),
        "only zeros": signs,
        "one": np.where(np.arange(65) == 7, usual[:, :1], 0) | signs,
        "a short mantissa in each row": usual >> np.uint64(mantissa // 2) << np.uint64(mantissa // 2),
        "one value": np.full((60, 65), usual[3, 3]),
        "near one": (usual[0, 0] & ~np.uint64(0x3F)) + rng.integers(0, 64, (60, 65)).astype(np.uint64),
    }
    return {name: patterns.astype(kind) for name, patterns in cases.items()}


@every_dtype
def test_scm_returns_unusual_patterns_bit_for_bit(dtype, tmp_path):
    sources = {
        name: Elements(DTYPES[dtype], patterns.view(DTYPES[dtype].storage))
        for name, patterns in odd_patterns(dtype).items()
    }
    store(tmp_path / "x.qf", "scm", **sources)
    for name, source in sources.items():
        found = read(tmp_path / "x.qf", name=name)
        expected = source.data if DTYPES[dtype].native else source.to_f32()
        assert found.dtype == expected.dtype
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), name


@every_dtype
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_scm_returns_any_mixture_bit_for_bit(dtype, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 12)), int(rng.integers(1, 32)))
    exponents = (-8, 3) if dtype == "f16" else (-60, 60)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(*exponents) * rng.lognormal(0, rng.random() * 2, (shape[0], 1))
    if dtype == "f16":
        x = np.clip(x, -30_000, 30_000)
    x[rng.random(shape) < rng.choice([0, 0.01, 0.5])] = rng.choice([0.0, -0.0, 2.0**-24])
    source = elements(dtype, x)
    path = tmp_path_factory.getbasetemp() / "mixture.qf"
    store(path, "scm", x=source)
    expected = source.data if DTYPES[dtype].native else source.to_f32()
    assert read(path).tobytes() == np.ascontiguousarray(expected).tobytes()


# ---- zeros


@pytest.mark.parametrize("share", [1 / 64, 0.05, 0.5, 0.99])
@every_dtype
def test_scm_keeps_zeros_at_every_quality(dtype, share, tmp_path):
    x = drawn("normal", 640, 100, seed=4)
    zeros = np.zeros(x.size, bool)
    zeros[np.random.default_rng(5).permutation(x.size)[: math.ceil(share * x.size)]] = True
    x[zeros.reshape(x.shape)] = np.where(drawn("normal", int(zeros.sum())) < 0, np.float32(-0.0), np.float32(0))
    store(tmp_path / "x.qf", "scm", x=elements(dtype, x))
    for quality in (*LADDER, "max_rmse=0.01", "lossless"):
        found = read(tmp_path / "x.qf", quality)
        assert not found[x == 0].any()
        assert (found != 0)[x != 0].mean() > 0.999
    for bpw in (1.5, 2.6):
        store(tmp_path / "y.qf", f"scm:bpw={bpw}", x=elements(dtype, x))
        assert not read(tmp_path / "y.qf")[x == 0].any()


def test_scm_keeps_zeros_in_every_chunk(tmp_path):
    x = drawn("normal", 3, 600_000, seed=6)
    x[np.random.default_rng(7).random(x.shape) < 0.03] = 0
    store(tmp_path / "x.qf", "scm:bpw=3", x=x)
    for quality in (2, 3):
        assert not read(tmp_path / "x.qf", quality)[x == 0].any()


def test_scm_stores_a_tensor_of_zeros_exactly_in_few_bytes(tmp_path):
    for shape in ((200, 300), (1, 700_000)):
        x = np.zeros(shape, np.float32)
        nbytes = store(tmp_path / "x.qf", "scm", x=x)
        assert nbytes < x.size / 1024 + 4000
        assert not read(tmp_path / "x.qf", 2).any()
        assert record_of(tmp_path / "x.qf").range == 0
        store(tmp_path / "x.qf", "scm:bpw=3", x=x)
        record = record_of(tmp_path / "x.qf")
        assert record.error is not None
        assert (record.error.rmse, record.error.maximum) == (0, 0)


# ---- what cannot be stored


@pytest.mark.parametrize("type_", ["scm", "scm:bpw=3", "scm:max_rmse=0.01"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_scm_refuses_nan_and_infinity_or_keeps_the_tensor_raw(dtype, bad, type_, tmp_path):
    x = drawn("normal", 12, 20)
    x[7, 3] = bad
    tensors = {"good": elements(dtype, drawn("normal", 12, 20)), "odd one": elements(dtype, x)}
    with pytest.raises(SourceError, match=r"tensor 'odd one' holds NaN or infinity") as caught:
        store(tmp_path / "x.qf", type_, **tensors)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    store(tmp_path / "x.qf", type_, {"allow_nonfinite": True}, **tensors)
    assert record_of(tmp_path / "x.qf", "odd one").codec == dtype
    assert record_of(tmp_path / "x.qf", "good").codec == "scm"
    assert bits_of(read(tmp_path / "x.qf", name="odd one"), tensors["odd one"]) == tensors["odd one"].data.tobytes()


def test_scm_finds_nan_in_a_late_chunk(tmp_path):
    x = drawn("normal", 3, 600_000)
    x[2, 599_999] = np.nan
    with pytest.raises(SourceError, match=r"tensor 'x' holds NaN or infinity"):
        store(tmp_path / "x.qf", "scm", x=x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exponent", [-70, -40, 30, 100])
def test_scm_layers_do_not_depend_on_the_magnitude_of_weights(exponent, tmp_path):
    x = drawn("normal", 150, 200)
    store(tmp_path / "x.qf", "scm", x=x)
    store(tmp_path / "y.qf", "scm", x=np.ldexp(x, exponent))
    one, other = record_of(tmp_path / "x.qf"), record_of(tmp_path / "y.qf")
    assert [layer.nbytes for layer in one.layers[:-1]] == [layer.nbytes for layer in other.layers[:-1]]
    # which numbers the cells about zero hold depends on the scale
    assert other.nbytes == pytest.approx(one.nbytes, rel=0.01)
    assert one.range is not None
    assert other.range == pytest.approx(math.ldexp(one.range, exponent), rel=1e-8)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert b.error.rmse == pytest.approx(math.ldexp(a.error.rmse, exponent), rel=1e-8)
    for quality in (2, 5):
        found = np.ldexp(read(tmp_path / "x.qf", quality), exponent)
        assert read(tmp_path / "y.qf", quality).tobytes() == found.tobytes()


def test_scm_refuses_values_too_large_or_too_small_by_name(tmp_path):
    largest = float(np.finfo(np.float32).max)
    cases = [
        (drawn("normal", 9, 40) * 1e-30, "holds weights that are too small"),
        (np.sign(drawn("normal", 9, 40)) * largest, "holds weights that are too large"),
    ]
    for x, message in cases:
        for type_ in ("scm", "scm:bpw=3", "scm:max_abs=0.01"):
            with pytest.raises(SourceError, match=rf"tensor 'x':? {message}; keep it with --tensor-type x=f32") as got:
                store(tmp_path / "x.qf", type_, x=x)
            assert "\n" not in str(got.value)
            assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-140, 2.0**-134])
def test_scm_refuses_subnormal_values(magnitude, tmp_path):
    x = np.sign(drawn("normal", 9, 40)) * np.float32(magnitude)
    with pytest.raises(SourceError, match="too small"):
        store(tmp_path / "x.qf", "scm", x=x)


def test_scm_values_far_apart_do_not_overflow(tmp_path):
    """Warnings are errors."""
    for big, small in ((3e38, 1e-44), (1e38, 1.0), (1e30, 1e-30), (1.0, 1e-45)):
        x = drawn("normal", 30, 40) * np.float32(small)
        x[3, 5] = big
        try:
            store(tmp_path / "x.qf", "scm", x=x)
        except SourceError as error:
            assert "too large" in str(error)  # noqa: PT017
            assert big > 1e38
            continue
        assert read(tmp_path / "x.qf").tobytes() == x.tobytes()
        for quality in (2, 8):
            found = read(tmp_path / "x.qf", quality)
            assert np.isfinite(found).all()
            assert abs(found[3, 5] - big) < 0.3 * big


# ---- records


@every_dtype
def test_scm_records_the_errors_of_layers_and_the_range(dtype, tmp_path):
    x = elements(dtype, np.concatenate([drawn("normal", 700, 800), drawn("laplace", 300, 800)]))
    store(tmp_path / "x.qf", "scm", x=x)
    record, source = record_of(tmp_path / "x.qf"), x.to_f32().astype(np.float64)
    assert (record.codec, record.dtype, record.shape, record.encoder) == ("scm", dtype, (1000, 800), {})
    count = len(LADDER) + (dtype != "bf16")
    assert record.params == {"layers": count, "lossless": True}
    assert [segment.name for segment in record.segments] == [
        "grid",
        *(f"layer.{number + 1}" for number in range(count)),
        "rest",
    ]
    assert record.range == pytest.approx(source.max() - source.min(), rel=1e-9)
    assert [segment.error is None for segment in record.segments] == [True, *[False] * count, True]
    nbytes = record.segments[0].length
    for layer, segment in zip(record.layers, record.segments[1:], strict=True):
        nbytes += segment.length
        assert (layer.nbytes, layer.bpw) == (nbytes, 8 * nbytes / source.size)
        errors = np.abs(read(tmp_path / "x.qf", layer.bpw).astype(np.float64) - source)
        assert layer.error.rmse == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-6)
        assert layer.error.maximum == pytest.approx(errors.max(), rel=1e-6)
        assert layer.error.mean == pytest.approx(errors.mean(), rel=1e-6)
    assert record.layers[-1].error.rmse == 0
    store(tmp_path / "x.qf", "scm:bpw=4", x=x)
    record = record_of(tmp_path / "x.qf")
    assert record.error is not None
    last = record.layers[-1].error
    assert (record.error.rmse, record.error.maximum, record.error.mean) == (last.rmse, last.maximum, None)


def test_scm_tensors_of_every_shape_round_trip(tmp_path):
    shapes: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0), (0, 7), (1, 600_000), (3, 5, 2), (2, 3, 4, 5), (70, 1)]
    sources = {str(shape): drawn("normal", *shape).reshape(shape) for shape in shapes if shape}
    sources["()"] = np.array(0.5, np.float32)
    for type_ in ("scm", "scm:bpw=3", "scm:mean_abs=0.01"):
        store(tmp_path / "x.qf", type_, **sources)
        with qformat.safe_open(tmp_path / "x.qf") as f:
            for name, source in sources.items():
                found = f.get_tensor(name)
                assert (found.shape, found.dtype) == (source.shape, np.float32)
                assert type_ != "scm" or found.tobytes() == source.tobytes()


# ---- what bytes do not depend on

SCRIPT = """
import sys
from pathlib import Path
from tests.codecs.test_scm import digests
from qformat.kernels import load
print(load("planes").__name__, *digests(Path(sys.argv[1])))
"""


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
    """Return digests of files and of what is read."""
    found = []
    two_pieces = elements("f32", drawn("normal", 2, 270_000))
    for type_, tensors in (
        ("scm", many()),
        ("scm:max_abs=0.02", {"b": many()["b"]}),
        ("scm:bpw=2.3", {"x": two_pieces}),
    ):
        store(path, type_, **tensors)
        found.append(hashlib.sha256(path.read_bytes()).hexdigest())
        qualities = (None,) if "x" in tensors else (2, 4.25, None)
        values = [read(path, quality, name) for name in tensors for quality in qualities]
        found += [hashlib.sha256(one.tobytes()).hexdigest() for one in values]
    return found


def test_scm_bytes_and_values_do_not_depend_on_kernels(tmp_path):
    expected = digests(tmp_path / "x.qf")
    env = os.environ | {"QFORMAT_KERNELS": "numpy", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "y.qf")]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["qformat.kernels.numpy.planes", *expected]


@pytest.mark.parametrize("type_", ["scm", "scm:bpw=2.3", "scm:mean_abs=0.004"])
def test_scm_bytes_and_values_do_not_depend_on_jobs(type_, tmp_path):
    long = drawn("normal", 5, 524_288)  # more chunks than are encoded by one thread
    long[3] *= 2
    long[4, ::2] = 0
    tensors = many() | {"long": elements("f16", long), "z": elements("f32", drawn("normal", 40, 40))}
    results = []
    for jobs in (1, 2, 5):
        store(tmp_path / "x.qf", type_, {"jobs": jobs}, **tensors)
        with qformat.safe_open(tmp_path / "x.qf", quality=3, jobs=jobs) as f:
            results.append(((tmp_path / "x.qf").read_bytes(), [f.get_tensor(name).tobytes() for name in f.keys()]))  # noqa: SIM118
    assert results[0] == results[1] == results[2]


# ---- rows


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rows_of_scm_tensors_are_those_of_the_whole_tensor(dtype, tmp_path):
    tensors = {
        "x": elements(dtype, drawn("normal", 2, 530_000)),  # more than one chunk to a row
        "y": elements(dtype, drawn("laplace", 50, 6, 7)),
        "z": elements(dtype, drawn("normal", 700, 800)),  # two chunks
    }
    store(tmp_path / "x.qf", "scm", **tensors)
    for quality in (2, 3.6, "max_abs=0.01", None):
        with qformat.safe_open(tmp_path / "x.qf", quality=quality) as f:
            for name in tensors:
                whole = f.get_tensor(name)
                last = len(whole) - 1
                for rows in (last, [last, 0, 0], slice(1, None, 7), np.array([], int)):
                    found = f.get_rows(name, rows)
                    expected = whole[rows]
                    assert found.dtype == whole.dtype
                    assert found.tobytes() == expected.tobytes()
                    assert found.shape == expected.shape


# ---- damage

KINDS = ("dense", "sparse", "wide", "bf16", "f16", "lossy", "zeros", "tiny")
every_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(kind: str) -> tuple[str, Elements]:
    x = drawn("normal", 11, 31, seed=8)
    if kind == "sparse":
        x[:, ::3] = np.where(x[:, ::3] < 0, np.float32(-0.0), np.float32(0))
    elif kind == "wide":
        x[::5, ::7] *= 100
        x[0, 0] = 1000
    elif kind == "zeros":
        x[:] = 0
    elif kind == "tiny":
        x = x[:1, :2]
    return ("scm:bpw=5" if kind == "lossy" else "scm"), elements(kind if kind in DTYPES else "f32", x)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Records:
    path, found = tmp_path_factory.mktemp("scm") / "x.qf", Records()
    for kind in KINDS:
        type_, source = of_kind(kind)
        store(path, type_, t=source)
        found[kind] = taken_apart(path.read_bytes())
    long = np.zeros((1, 524_288 + 40), np.float32)
    long[0, ::500] = drawn("normal", 1049)
    store(path, "scm", t=long)
    found["long"] = taken_apart(path.read_bytes())
    return found


def check_all_qualities(path: Path) -> int:
    """Read at each quality without comparing digests; count what is refused."""
    refused = 0
    for quality in (2, 5, None):
        with qformat.safe_open(path, quality=quality, verify=False) as f:
            shape = f.info("t").shape
            for get in (lambda f: f.get_tensor("t"), lambda f: f.get_rows("t", slice(None))):
                try:
                    found = get(f)
                except FormatError as error:
                    refused += "\n" not in str(error)
                else:
                    assert found.shape == shape
                    assert found.dtype in (np.float32, np.float16)
    return refused


def lengthened(content: bytes) -> bytes:
    """Return a segment of one chunk with the length that it has."""
    return struct.pack("<I", len(content)) + content


@every_kind
@settings(max_examples=25)
@given(data=st.data())
def test_both_readers_agree_on_changed_scm_segments(written, kind, data, tmp_path_factory):
    """By both readers of the format, digests being right."""
    record = written[kind]
    number = data.draw(st.integers(0, len(record["segments"]) - 1))
    name, content = (record["segments"][number][key] for key in ("name", "bytes"))
    if name == "grid":
        content = edited(content, data)
    else:
        chunk = edited(content[4:], data)
        cut = data.draw(st.sampled_from(["no", "no", "end", "start", "more"]))
        at = data.draw(st.integers(0, len(chunk)))
        chunk = {"no": chunk, "end": chunk[:at], "start": chunk[at:], "more": chunk + chunk[:at]}[cut]
        content = lengthened(chunk)
    path = tmp_path_factory.getbasetemp() / "changed.qf"
    data_ = packed(record, segments=changed(record, **{name: content}))
    if name == "layer.1" and len(content) * 1024 < math.prod(record["shape"]):
        return
    path.write_bytes(data_)
    package, other = read_package(path), read_reference(data_)
    assert package.refused is None
    assert verify_one(path).ok
    assert package.errors.keys() == other.errors.keys(), (package.errors, other.errors)
    assert package.values == other.values
    assert (check_all_qualities(path) > 0) >= bool(package.errors)


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_flipped_bytes_of_scm_files_are_refused_or_decode(written, kind, data, tmp_path_factory):
    """Without digests, and with all of them wrong."""
    content = bytearray(packed(written[kind]))
    first = content.index(next(one["bytes"] for one in written[kind]["segments"] if one["bytes"]))
    last = max(content.index(one["bytes"]) + len(one["bytes"]) for one in written[kind]["segments"] if one["bytes"])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(first, last - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.qf"
    path.write_bytes(content)
    check_all_qualities(path)


@every_kind
def test_truncated_scm_segments_are_refused(written, kind, tmp_path):
    """With and without lengths that fit; at every byte of short ones."""
    record = written[kind]
    for one in record["segments"]:
        name, content = one["name"], one["bytes"]
        ends = range(0, len(content), 2) if len(content) < 30 else [0, 3, 6, len(content) // 2, len(content) - 1]
        for end in ends:
            choices = [content[:end]] if name == "grid" else [content[:end], lengthened(content[4 : max(4, end)])]
            for wrong in choices:
                if wrong == content:
                    continue
                path = tmp_path / "x.qf"
                path.write_bytes(packed(record, segments=changed(record, **{name: wrong})))
                with qformat.safe_open(path) as f, pytest.raises(FormatError, match="tensor 't'"):
                    f.get_tensor("t")


def test_wrong_chunk_lengths_of_scm_layers_are_refused(written, tmp_path):
    record = written["long"]
    for one in record["segments"][1:5]:
        content = one["bytes"]
        (first,) = struct.unpack_from("<I", content)
        wrong = [
            struct.pack("<2I", first - 1, len(content) - 8 - first + 1) + content[8:],
            struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF) + content[8:],
            struct.pack("<2I", 0, len(content) - 8) + content[8:],
            content[:4],
            content + b"\0",
            content[4:],
        ]
        for changed_content in wrong:
            (tmp_path / "x.qf").write_bytes(packed(record, segments=changed(record, **{one["name"]: changed_content})))
            with qformat.safe_open(tmp_path / "x.qf") as f, pytest.raises(FormatError, match="tensor 't'"):
                f.get_tensor("t")


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"layers": 0, "lossless": True}},
        {"params": {"layers": 65, "lossless": True}},
        {"params": {"layers": 3, "lossless": True}},
        {"params": {"layers": True, "lossless": True}},
        {"params": {"layers": 19}},
        {"params": {"layers": 19, "lossless": True, "bpw": "3"}},
        {"params": {"layers": 19, "lossless": False}},
        {"dtype": "f64"},
        {"dtype": "f8_e4m3"},
        {"shape": [2**26, 2**20]},
        {"shape": [12, 31]},
        {"shape": [0, 31]},
        {"range": ...},
        {"error": {"rmse": "1.000000000e-01", "max": "5.000000000e-01"}},
    ],
)
def test_impossible_scm_records_are_refused(written, change, tmp_path):
    record = written["dense"]
    (tmp_path / "x.qf").write_bytes(packed(record))
    assert read(tmp_path / "x.qf", name="t").shape == (11, 31)
    (tmp_path / "x.qf").write_bytes(packed(record, **change))
    with pytest.raises(FormatError, match="tensor 't'"):
        read(tmp_path / "x.qf", name="t")


def test_a_wrong_digest_of_an_scm_layer_is_reported_unless_the_layer_is_not_read(written, tmp_path):
    data = bytearray(packed(written["dense"]))
    layer = next(one["bytes"] for one in written["dense"]["segments"] if one["name"] == "layer.3")
    data[data.index(layer) + len(layer) - 2] ^= 1
    (tmp_path / "x.qf").write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor 't', segment 'layer.3' is damaged: its SHA-256"):
        read(tmp_path / "x.qf", name="t")
    record = record_of(tmp_path / "x.qf", "t")
    assert read(tmp_path / "x.qf", record.layers[1].bpw, "t").shape == (11, 31)  # what is not read is not checked


def _kinds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = 600, 512  # more than what is small

    def with_zeros(share: float) -> np.ndarray:
        return np.where(rng.random(shape) < share, 0, rng.standard_normal(shape)).astype(np.float32)

    return {
        "constant": np.full(shape, 0.3, np.float32),
        "one": np.ones((1, 1), np.float32),
        "ternary": (rng.integers(-1, 2, shape) * 0.02).astype(np.float32),
        "huge": (rng.integers(-1, 2, shape) * 1e36).astype(np.float32),
        "four levels": rng.choice([-3, -1, 1, 3], shape).astype(np.float32),
        "half zeros": with_zeros(0.5),
        "few weights": with_zeros(0.9),
        "cauchy": rng.standard_cauchy(shape).astype(np.float32),
        "zeros": np.zeros(shape, np.float32),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_converting_to_an_scm_rate_equals_truncating_to_it(kind, tmp_path):
    array = _kinds()[kind]
    qformat.save_file({"x": array}, tmp_path / "whole.qf", {"x": "scm"})
    for bits in (2, 3, 6):
        qformat.save_file({"x": array}, tmp_path / "made.qf", {"x": f"scm:bpw={bits}"}, overwrite=True)
        truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=bits), overwrite=True)
        assert (tmp_path / "made.qf").read_bytes() == (tmp_path / "cut.qf").read_bytes()
        with qformat.safe_open(tmp_path / "made.qf") as f:
            error = f.info("x").error
            assert error.rmse <= 2.0 ** (1 - bits) * np.abs(array[np.isfinite(array)]).astype(np.float64).max()
            assert kind == "one" or f.info("x").layers[-1].bpw <= bits
            read = f.get_tensor("x").astype(np.float64)
            assert np.isclose(np.sqrt(np.square(read - array).mean()), error.rmse, rtol=1e-5, atol=1e-12)
    with qformat.safe_open(tmp_path / "whole.qf", quality="lossless") as f:
        assert f.get_tensor("x").tobytes() == array.tobytes()
