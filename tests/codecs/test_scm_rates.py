"""``scm``: parameters, sizes and errors of layers, and bounds that are met."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import qformat
from qformat.codecs.registry import parse_type
from qformat.converters.truncate import truncate
from qformat.dtypes import DTYPES, Elements
from qformat.errors import SourceError
from qformat.quality import Quality
from qformat.records import TensorRecord
from tests.helpers import scm
from tests.helpers.layered import LADDER, elements

# ---- parameters


def test_scm_types_print_as_they_are_written_and_are_lossless_by_default():
    assert parse_type("scm") == parse_type("scm:bpw=any")
    assert str(parse_type("scm")) == "scm"
    assert parse_type("scm:lossless=true") != parse_type("scm:bpw=8")
    for number in ("1.5", "2.7", "8", "3e0", "8.0"):
        assert str(parse_type(f"scm:bpw={number}")) == f"scm:bpw={number}"
    for metric in scm.METRICS:
        for bound in ("0", "0.01", "1e-3", "7"):
            assert str(parse_type(f"scm:{metric}={bound}")) == f"scm:{metric}={bound}"


def test_scm_refuses_f64_and_f8_and_leaves_integers_raw(tmp_path):
    for name in ("f64", "f8_e4m3", "f8_e5m2"):
        dtype = DTYPES[name]
        with pytest.raises(SourceError, match=rf"tensor 'x': type scm cannot hold {name}"):
            scm.store(tmp_path / "x.qf", "scm", x=Elements(dtype, np.zeros((2, 3), dtype.storage)))
    qformat.save_file({"n": np.arange(6).reshape(2, 3), "v": np.ones(3, np.float32)}, tmp_path / "x.qf", "scm")
    assert [scm.record_of(tmp_path / "x.qf", name).codec for name in "nv"] == ["i64", "f32"]


# ---- sizes


def check_ladder(record: TensorRecord, *, full: bool) -> None:
    """One layer for each number of bits, which it nearly takes, and maybe one after them."""
    lossy = record.layers[: int(record.params["layers"])]
    assert len(lossy) == len(LADDER) + full
    for layer, bits in zip(lossy, LADDER, strict=False):
        assert bits - scm.SLACK <= layer.bpw <= bits
    for before, after in itertools.pairwise(lossy):
        assert after.error.rmse < before.error.rmse
        assert after.error.maximum <= before.error.maximum
        assert after.error.mean is not None
        assert before.error.mean is not None
        assert after.error.mean < before.error.mean


@pytest.mark.parametrize("distribution", [*scm.DISTRIBUTIONS, "logistic"])
@pytest.mark.parametrize("shape", [(320, 320), (7, 20_011), (1_100, 600)])
def test_scm_layers_take_the_bits_of_the_ladder(distribution, shape, tmp_path):
    scm.store(tmp_path / "x.qf", "scm", x=scm.drawn(distribution, *shape, seed=shape[0]))
    check_ladder(scm.record_of(tmp_path / "x.qf"), full=True)


@scm.every_dtype
def test_scm_layers_take_the_bits_of_the_ladder_for_every_dtype(dtype, tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 300)) * rng.lognormal(-4, 0.5, (400, 1))  # as weights are
    scm.store(tmp_path / "x.qf", "scm", x=elements(dtype, rows))
    check_ladder(scm.record_of(tmp_path / "x.qf"), full=dtype != "bf16")


def test_scm_layers_of_sparse_weights_take_the_bits_of_the_ladder(tmp_path):
    x = scm.drawn("normal", 400, 500)
    x[np.random.default_rng(1).random(x.shape) < 0.3] = 0
    scm.store(tmp_path / "x.qf", "scm", x=x)
    record = scm.record_of(tmp_path / "x.qf")
    layers = record.layers[:-1]
    assert all(any(bits - scm.SLACK <= layer.bpw <= bits for layer in layers) for bits in LADDER if bits <= 6)
    assert all(any(bits - scm.SLACK <= layer.bpw <= bits for bits in LADDER) for layer in layers[:-2])


@pytest.mark.parametrize("bpw", [1.5, 1.77, 2, 2.01, 2.7, 3.14, 4.5, 6.6, 8])
@scm.every_distribution
def test_scm_files_take_the_requested_bits_per_weight(bpw, distribution, tmp_path):
    x = scm.drawn(distribution, 330, 350, seed=3)
    for number, part in enumerate((x, np.concatenate([x] * 5, axis=0))):
        scm.store(tmp_path / f"{number}.qf", f"scm:bpw={bpw}", x=part)
        record = scm.record_of(tmp_path / f"{number}.qf")
        assert bpw - scm.SLACK <= 8 * record.nbytes / part.size <= bpw
        assert record.params["lossless"] is False
        assert record.error is not None
        # those of the ladder below, and the last
        below = [bits for bits in LADDER if bits < bpw]
        assert len(record.layers) in (len(below), len(below) + 1)
        for layer, bits in zip(record.layers, [*below, bpw], strict=False):
            assert layer.bpw <= bits


def test_scm_layers_of_small_tensors_stay_within_the_ladder(tmp_path):
    for size in (1, 2, 31, 64, 65, 200, 3000, 5000):
        scm.store(tmp_path / "x.qf", "scm", x=scm.drawn("normal", 1, size), y=scm.drawn("laplace", size))
        for name in "xy":
            record = scm.record_of(tmp_path / "x.qf", name)
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


@scm.every_distribution
def test_scm_errors_are_near_those_of_ideal_coding(distribution, tmp_path):
    best = ideal(distribution, [*LADDER])
    # for small matrices the parameters of cells count, too
    for shape, limit in (((320, 320), 1.125), ((1_200, 1_000), 1.10 if distribution == "normal" else 1.115)):
        x = scm.drawn(distribution, *shape, seed=7)
        scm.store(tmp_path / "x.qf", "scm", x=x)
        for layer, bits in zip(scm.record_of(tmp_path / "x.qf").layers, LADDER, strict=False):
            found = scm.read(tmp_path / "x.qf", bits).astype(np.float64)
            rmse = math.sqrt(np.mean((found - x) ** 2))
            assert rmse == pytest.approx(layer.error.rmse, rel=1e-6)
            assert best[bits] * 0.97 <= rmse / x.std() <= best[bits] * limit
    scm.store(tmp_path / "x.qf", "scm:bpw=2.7", x=x)
    assert scm.record_of(tmp_path / "x.qf").layers[-1].error.rmse / x.std() <= limit * ideal(distribution, [2.7])[2.7]


# ---- bounds


@pytest.mark.parametrize("metric", scm.METRICS)
@pytest.mark.parametrize("bound", [0.014, 0.0101, 0.004, 0.0007])
def test_scm_meets_error_bounds_with_as_few_bits_as_possible(metric, bound, tmp_path):
    x = scm.drawn("laplace", 300, 400, seed=5)
    spread = float(np.float64(x.max()) - x.min())
    errors = {}
    for name, type_ in (("bound", f"scm:{metric}={bound}"), ("ladder", "scm")):
        scm.store(tmp_path / f"{name}.qf", type_, x=x)
    record = scm.record_of(tmp_path / "bound.qf")
    errors = np.abs(scm.read(tmp_path / "bound.qf").astype(np.float64) - x)
    found = {"max_rmse": math.sqrt(np.mean(errors**2)), "max_abs": errors.max(), "mean_abs": errors.mean()}[metric]
    assert found <= bound * spread * (1 + 1e-9)
    assert found == pytest.approx(getattr(record.layers[-1].error, scm.METRICS[metric]), rel=1e-6)
    # missed one layer earlier, and so it is by a file with a few bits less
    assert len(record.layers) > 1
    assert all(getattr(layer.error, scm.METRICS[metric]) > bound * spread for layer in record.layers[:-1])
    step = next(
        layer
        for layer in scm.record_of(tmp_path / "ladder.qf").layers
        if getattr(layer.error, scm.METRICS[metric]) <= bound * spread
    )
    assert record.layers[-1].bpw <= step.bpw + 0.01
    fewer = record.layers[-1].bpw - 0.05
    scm.store(tmp_path / "less.qf", f"scm:bpw={fewer}", x=x)
    assert getattr(scm.record_of(tmp_path / "less.qf").layers[-1].error, scm.METRICS[metric]) > bound * spread


def test_scm_meets_bounds_out_of_reach_losslessly_and_loose_ones_with_one_layer(tmp_path):
    x = scm.drawn("normal", 60, 70)
    for type_ in ("scm:max_rmse=1e-9", "scm:max_abs=0", "scm:mean_abs=0"):
        scm.store(tmp_path / "x.qf", type_, x=x)
        assert scm.record_of(tmp_path / "x.qf").params["lossless"] is True
        assert scm.read(tmp_path / "x.qf").tobytes() == x.tobytes()
    scm.store(tmp_path / "x.qf", "scm:max_abs=1", x=x)
    assert scm.record_of(tmp_path / "x.qf").params == {"layers": 1, "lossless": False}


def test_scm_stores_constant_tensors_exactly_under_any_bound(tmp_path):
    """All are the same, so no error but 0 is allowed."""
    for value in (0.0, -0.3, 2.5):
        x = np.full((20, 30), value, np.float32)
        for metric in scm.METRICS:
            scm.store(tmp_path / "x.qf", f"scm:{metric}=0.1", x=x)
            assert scm.record_of(tmp_path / "x.qf").range == 0
            np.testing.assert_array_equal(scm.read(tmp_path / "x.qf"), x)


def _kinds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = 600, 512  # above the limit for small tensors

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
