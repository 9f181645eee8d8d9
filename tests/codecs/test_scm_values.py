"""``scm``: weights that come back bit for bit, refusals, records, and bytes that depend on the weights only."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qformat
from qformat.codecs.scm import rate_control
from qformat.dtypes import DTYPES, Elements
from qformat.errors import SourceError
from tests.helpers.layered import LADDER, elements
from tests.helpers.scm import bits_of, digests, drawn, every_dtype, many, read, record_of, store

# ---- bit for bit


@every_dtype
def test_scm_returns_weights_bit_for_bit_in_at_most_two_percent_more_bytes_than_lossless(dtype, tmp_path):
    x = elements(dtype, drawn("normal", 500, 1000))
    layered, lossless = store(tmp_path / "x.qf", "scm", x=x), store(tmp_path / "y.qf", "lossless", x=x)
    assert bits_of(read(tmp_path / "x.qf"), x) == x.data.tobytes()
    assert bits_of(read(tmp_path / "x.qf", "lossless"), x) == x.data.tobytes()
    assert layered <= 1.02 * lossless
    assert record_of(tmp_path / "x.qf").error is None
    assert store(tmp_path / "z.qf", "scm:lossless=true", x=x) == layered
    assert (tmp_path / "z.qf").read_bytes() == (tmp_path / "x.qf").read_bytes()


@pytest.mark.parametrize("origin", ["f16", "bf16"])
def test_scm_takes_advantage_of_short_mantissas(origin, tmp_path):
    x = elements(origin, drawn("normal", 500, 1000)).to_f32()
    layered, lossless = store(tmp_path / "x.qf", "scm", x=x), store(tmp_path / "y.qf", "lossless", x=x)
    assert read(tmp_path / "x.qf").tobytes() == x.tobytes()
    assert layered <= 1.02 * lossless
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


# ---- refusals


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


# ---- bytes

SCRIPT = """
import sys
from pathlib import Path
from tests.helpers.scm import digests
from qformat.kernels import load
print(load("planes").__name__, *digests(Path(sys.argv[1])))
"""


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
