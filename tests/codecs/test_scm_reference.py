"""Layered tensors that the package writes: the independent reader gives the same bits, and finds the errors in the index."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qformat
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements
from qformat.errors import FormatError, QualityError, SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from tests.helpers import scm_encoder as written
from tests.helpers.kernels import FAMILIES, every_family, using
from tests.helpers.reference import reference
from tests.helpers.scm import METRICS
from tests.helpers.scm_encoder import LARGEST, MANTISSA, SIGN, UNSIGNED

OTHERS = ("scm:bpw=2.7", "scm:bpw=5", "scm:max_rmse=0.02", "scm:max_abs=0.03", "scm:mean_abs=0.001")


def patterns_of(values: Any, dtype: str) -> np.ndarray:
    """The patterns of values, rounded to the dtype."""
    values = np.asarray(values, np.float32)
    if dtype == "f16":
        return values.astype("<f2").view("<u2")
    found = values.view("<u4")
    return found if dtype == "f32" else (found >> 16).astype("<u2")


def values_of(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values of a lossless read."""
    if dtype == "bf16":
        return (patterns.astype("<u4") << 16).view("<f4")
    return patterns.view("<f2" if dtype == "f16" else "<f4")


def write(patterns: np.ndarray, dtype: str, type_: str, path: Path) -> bytes:
    """A file with one tensor, `x`."""
    found = DTYPES[dtype]
    source = Checkpoint([ArrayTensor("x", Elements(found, patterns.view(found.storage)))])
    convert(source, path, Recipe.parse(None, {"*": type_}), overwrite=True, jobs=2)
    return path.read_bytes()


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """To the bit, and of one shape and dtype."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and found.tobytes() == expected.tobytes()


def close(found: float | None, expected: Any, tolerance: float = 1e-5) -> bool:
    return found is not None and abs(found - expected) <= tolerance * expected


def read(path: Path, quality: Any) -> np.ndarray:
    with qformat.safe_open(path, quality=quality, jobs=2) as f:
        return f.get_tensor("x")


def check(
    path: Path,
    patterns: np.ndarray,
    dtype: str,
    type_: str = "scm",
    *,
    every: int = 1,
    writers: tuple[str, ...] = FAMILIES,  # numpy kernels take some time
) -> list[float]:
    """Compare a layer of so many, the first and the last one, and everything; give the bits per weight."""
    contents = []
    for family in writers:
        with using(family):
            contents.append(write(patterns, dtype, type_, path))
    assert contents[0] == contents[-1]
    tensor = reference.read(contents[0]).tensors["x"]
    with qformat.safe_open(path) as f:
        info = f.info("x")
    source = values_of(patterns, dtype)
    x = source.astype(np.float64)
    lossless, count = info.params["lossless"], info.params["layers"]
    assert len(info.layers) == count + lossless
    assert close(info.range, x.max() - x.min() if x.size else 0.0, 1e-9)
    nbytes = np.cumsum([len(content) for _, content in tensor.segments])[1:].tolist()
    assert [layer.nbytes for layer in info.layers] == nbytes
    rates = [layer.bpw for layer in info.layers]
    assert rates == [8 * size / x.size if x.size else 0 for size in nbytes]

    expected: list[tuple[Any, np.ndarray]] = []  # with a quality
    for k in sorted({*range(0, count, every), count - 1}):
        values = reference.decode(tensor, layers=k + 1)
        assert values.dtype == np.float32
        errors = np.abs(values.astype(np.float64) - x) if x.size else np.zeros(1)
        error = info.layers[k].error
        assert close(error.rmse, np.sqrt(np.mean(errors**2))), k
        assert close(error.maximum, errors.max()), k
        assert close(error.mean, errors.mean()), k
        expected.append((rates[k] or 1, values))
    everything = reference.decode(tensor)
    if lossless:
        assert same(everything, source)
        assert info.error is None
        error = info.layers[-1].error
        assert (error.rmse, error.maximum, error.mean) == (0, 0, 0)
        expected.append(("lossless", everything))
    else:
        assert same(everything, values)
        assert info.error is not None
        assert (info.error.rmse, info.error.maximum) == (error.rmse, error.maximum)
        if x.size:
            with pytest.raises(QualityError):
                read(path, "lossless")
    expected.append((None, everything))
    check_bound(info, type_)
    for family in FAMILIES:
        with using(family):
            for quality, values in expected[-1 if family == "numpy" and x.size > 100_000 else 0 :]:
                assert same(read(path, quality), values), (family, quality)
    return rates


def check_bound(info: Any, type_: str) -> None:
    """Assert that the last layer is the first one within the bound of the type."""
    key, _, number = type_.partition(":")[2].partition("=")
    if key in METRICS:
        errors = [getattr(layer.error, METRICS[key]) for layer in info.layers]
        bound = float(number) * info.range
        assert errors[-1] <= bound
        assert all(error > bound for error in errors[:-1])


def normal(*shape: int, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def signed(patterns: np.ndarray, dtype: str, seed: int = 0) -> np.ndarray:
    """With signs by chance, zeros too."""
    signs = np.random.default_rng(seed).integers(0, 2, patterns.shape)
    result: np.ndarray = patterns | (signs * SIGN[dtype]).astype(patterns.dtype)
    return result


# ---- tensors of all kinds


def types_in_turn(number: int) -> list[tuple[str, str]]:
    """Everything in one of the dtypes, and other types in the others."""
    return [
        (dtype, "scm" if (number + i) % 3 == 0 else OTHERS[(number + i) % len(OTHERS)])
        for i, dtype in enumerate(MANTISSA)
    ]


every_dtype = pytest.mark.parametrize("dtype", MANTISSA)


SHAPES: list[tuple[int, ...]] = [(1,), (), (1, 1), (63,), (65, 1), (3, 33), (129, 31), (5, 7, 3, 3), (4097,)]


@pytest.mark.parametrize(("number", "shape"), list(enumerate(SHAPES)))
def test_both_readers_agree_on_scm_tensors_of_every_shape(tmp_path: Path, number: int, shape: tuple[int, ...]) -> None:
    for dtype, type_ in types_in_turn(number):
        x = normal(*shape)
        rates = check(tmp_path / "x.qf", patterns_of(x, dtype), dtype, type_, every=5)
        assert type_ != "scm" or len(rates) > 8 or x.size < 2000


@every_dtype
@pytest.mark.parametrize("type_", ["scm", *OTHERS])
def test_both_readers_agree_on_scm_tensors_without_elements(tmp_path: Path, dtype: str, type_: str) -> None:
    for shape in ((0,), (0, 5), (3, 0), (2, 0, 4)):
        rates = check(tmp_path / "x.qf", patterns_of(normal(*shape), dtype), dtype, type_)
        assert set(rates) == {0}


def values_of_kinds() -> dict[str, np.ndarray]:
    """Values that f16 can hold, too."""
    rng = np.random.default_rng(0)
    x = normal(24, 43)
    kinds = {name: x.copy() for name in ("a little sparse", "sparse", "outlier", "outliers", "few", "row scales")}
    kinds["a little sparse"][rng.random(x.shape) < 0.03] = 0
    kinds["sparse"][rng.random(x.shape) < 0.9] = 0
    kinds["outlier"][17, 3] = -60_000
    kinds["outliers"][rng.random(x.shape) < 0.01] *= 30
    kinds["few"][:] = np.round(x * 40) / 40
    kinds["row scales"] *= np.exp2(np.arange(24, dtype=np.float32) - 12)[:, None]
    kinds |= {
        "constant": np.full((7, 33), 0.3, np.float32),
        "constant and negative": np.full(100, -1.0, np.float32),
        "ternary": rng.choice(np.array([-0.25, 0, 0.25], np.float32), (24, 43)),
        "binary": rng.choice(np.array([-3, 3], np.float32), (24, 43)),
        "zeros": np.zeros((9, 31), np.float32),
        "negative zeros": np.full((9, 31), -0.0, np.float32),
        "one number": np.zeros((9, 31), np.float32),
        "uniform": rng.uniform(-1, 1, (24, 43)).astype(np.float32),
        "positive": np.abs(x),
        "far from zero": x + 100,
        "heavy tails": np.clip(rng.standard_t(2, (24, 43)), -100, 100).astype(np.float32),
    }
    kinds["one number"][4, 4] = 1.5
    for name in ("sparse", "a little sparse", "ternary", "zeros", "one number"):
        zeros = kinds[name] == 0
        kinds[name][zeros] = np.where(rng.random(kinds[name].shape) < 0.5, -0.0, 0.0)[zeros]
    return kinds


@pytest.mark.parametrize("kind", values_of_kinds())
def test_both_readers_agree_on_scm_tensors_of_unusual_weights(tmp_path: Path, kind: str) -> None:
    kinds = values_of_kinds()
    for dtype, type_ in types_in_turn(list(kinds).index(kind)):
        writers = FAMILIES if kind in ("sparse", "outlier") else ("numba",)
        check(tmp_path / "x.qf", patterns_of(kinds[kind], dtype), dtype, type_, every=7, writers=writers)


@every_dtype
def test_both_readers_agree_on_scm_tensors_of_unusual_bit_patterns(tmp_path: Path, dtype: str) -> None:
    """Subnormal numbers, short mantissas, all exponents."""
    rng = np.random.default_rng(1)
    m = MANTISSA[dtype]
    usual = patterns_of(normal(24, 43), dtype)
    unsigned = usual.dtype
    short = usual.copy()
    for row in range(24):
        short[row] = short[row] >> min(row, m) << min(row, m)
    top = LARGEST[dtype] - (1 << m)  # less than half the largest one
    least = 1 if dtype == "f16" else 8 << m  # from 2^-119 on
    every = signed(rng.integers(least, top, (9, 33)).astype(unsigned), dtype)
    arrays = {
        "short mantissas": short,
        "every exponent": every,
        "every exponent, and zeros": every * (rng.random((9, 33)) < 0.7).astype(unsigned),
        "subnormal and usual": signed(rng.integers(0, 1 << m, (24, 43)).astype(unsigned), dtype),
        "large": signed(rng.integers(top - (2 << m), top, (9, 33)).astype(unsigned), dtype),
        "neighbours": (usual[0, 0] >> 6 << 6) + rng.integers(0, 64, (24, 43)).astype(unsigned),
    }
    arrays["subnormal and usual"][::2] = usual[::2]
    for number, patterns in enumerate(arrays.values()):
        for type_ in ("scm", "scm:mean_abs=0.0001" if number % 2 else "scm:bpw=4.1"):
            check(tmp_path / "x.qf", patterns, dtype, type_, every=9, writers=("numba",))


def test_both_readers_agree_on_scm_tensors_of_subnormal_f16(tmp_path: Path) -> None:
    """Of f16, which are far from those of binary32; others are refused."""
    patterns = signed(np.random.default_rng(0).integers(0, 1 << 10, (20, 35)).astype("<u2"), "f16")
    for some in (patterns, patterns[:5] & 0x8001):
        for type_ in ("scm", "scm:max_rmse=0.02"):
            check(tmp_path / "x.qf", some, "f16", type_, every=5)
    for dtype in ("f32", "bf16"):
        for pattern in (1, (1 << MANTISSA[dtype]) - 1, 1 << MANTISSA[dtype], 34 << MANTISSA[dtype]):
            with pytest.raises(SourceError, match="too small"):
                write(np.full(40, pattern, UNSIGNED[dtype]), dtype, "scm", tmp_path / "y.qf")


@every_dtype
def test_scm_tensors_of_the_largest_numbers_are_refused_or_finite(tmp_path: Path, dtype: str) -> None:
    """A tensor is refused if one of its layers would have an infinity, and none is written."""
    usual = patterns_of(normal(9, 33, scale=1), dtype)
    refused = 0
    for number in (0, 1, 4):
        arrays = [usual.copy(), usual.copy(), usual.copy()]
        most = LARGEST[dtype] - (number << MANTISSA[dtype] >> 2)
        arrays[0][7, 7] = most
        arrays[1][::4, ::3] = most
        arrays[2][:] = most
        for patterns in arrays:
            some = signed(patterns & (SIGN[dtype] - 1), dtype)
            try:
                check(tmp_path / "x.qf", some, dtype, every=6, writers=("numba",))
            except SourceError as error:
                assert "too large" in str(error)  # noqa: PT017
                refused += 1
    assert refused == 0 if dtype == "f16" else refused < 4


# ---- many elements


@pytest.mark.parametrize(
    ("dtype", "type_"), [("f32", "scm:bpw=2.2"), ("bf16", "scm:max_abs=0.2"), ("f16", "scm:bpw=3.6")]
)
def test_both_readers_agree_on_scm_rows_longer_than_a_chunk(tmp_path: Path, dtype: str, type_: str) -> None:
    x = normal(1, 600_001)
    x[0, 524_288:] *= 3  # the second chunk
    writers = FAMILIES if type_ == "scm:bpw=2.2" else ("numba",)
    check(tmp_path / "x.qf", patterns_of(x, dtype), dtype, type_, every=20, writers=writers)


@pytest.mark.parametrize(("dtype", "type_"), [("f32", "scm"), ("bf16", "scm:bpw=2.7"), ("f16", "scm:bpw=1.6")])
def test_both_readers_agree_on_dense_sparse_and_empty_scm_chunks(tmp_path: Path, dtype: str, type_: str) -> None:
    """Dense, sparse and empty ones; one with outliers; rows of short mantissas."""
    x = np.zeros((440, 2501), np.float32)  # 209 rows to a chunk
    x[:209:8] = normal(27, 2501)
    x[300] = normal(2501)
    x[418:420] = normal(2, 2501)
    x[418, :300] *= 1000
    x[x == 0] = np.where(normal(440, 2501, seed=1)[x == 0] < 0, np.float32(-0.0), np.float32(0))
    patterns = patterns_of(x, dtype)
    patterns[8:209:16] = patterns[8:209:16] >> 5 << 5
    if dtype == "f16":
        patterns[:300] &= SIGN[dtype]  # no element of the first chunk counts
    check(tmp_path / "x.qf", patterns, dtype, type_, every=20, writers=("numba",))


def test_both_readers_agree_on_wide_scm_chunks(tmp_path: Path) -> None:
    """More than one in 4096 has a magnitude of 15 or more, of 255 or more."""
    x = normal(30, 2000)
    x[:, ::400] *= 40
    x[:, 1::2000] *= 3000
    check(tmp_path / "x.qf", x.view("<u4"), "f32", every=9, writers=("numba",))


# ---- files of another writer


def check_other(path: Path, case: written.Case) -> None:
    """Every layer of a file from the encoder that was written from the text."""
    path.write_bytes(case.draft().pack())
    tensor = reference.read(path.read_bytes()).tensors["t"]
    with qformat.safe_open(path) as f:
        rates = [layer.bpw for layer in f.info("t").layers][: case.params["layers"]]
    expected: list[tuple[Any, np.ndarray]] = [(None, reference.decode(tensor))]
    for k, rate in enumerate(rates):
        # A little more: the layer itself, and not the next one.
        expected.append((rate * (1 + 1e-12) or 1, reference.decode(tensor, layers=k + 1)))
    for family in FAMILIES:
        with using(family):
            for quality, values in expected:
                with qformat.safe_open(path, quality=quality, jobs=1) as f:
                    assert same(f.get_tensor("t"), values), (family, quality)


@settings(max_examples=30)
@given(written.tensors())
def test_both_readers_agree_on_valid_scm_tensors_of_another_writer(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, list[int], Any, tuple[int, int]]
) -> None:
    """Any ends, offsets and steps; sections by classes without need; sparse or wide chunks without need; too many layers."""
    dtype, patterns, choices, shape = drawn
    case, _ = written.encode([(patterns, choices)], dtype, shape)
    check_other(tmp_path_factory.mktemp("other") / "x.qf", case)


@pytest.mark.parametrize(("dtype", "sparse"), [("f16", False), ("bf16", True), ("f32", True), ("f32", False)])
def test_both_readers_agree_on_every_part_of_another_scm_writer(tmp_path: Path, dtype: str, sparse: bool) -> None:
    rng = np.random.default_rng(sparse)
    patterns = patterns_of(rng.laplace(size=2500), dtype).copy()
    patterns[::7] &= SIGN[dtype]
    modes = iter(lambda: bool(rng.integers(2)), None)
    ends = [0, 5, 32, 33, 70, 70, 200, 512]
    steps = (Fraction(1, 8), Fraction(3, 16))
    choices = written.Choices(steps, rng.bytes(32), ends, sparse, False, [0] * 25, lambda: next(modes))
    case, _ = written.encode([(patterns.tolist(), choices)], dtype, (25, 10, 10))
    check_other(tmp_path / "x.qf", case)


def test_both_readers_agree_on_scm_tensors_made_by_hand(tmp_path: Path) -> None:
    for case in (written.BY_HAND, written.LOSSY, written.SPARSE):
        check_other(tmp_path / "x.qf", case)


@every_family
def test_the_package_refuses_scm_chunks_that_the_reference_refuses(tmp_path: Path, family: str) -> None:
    """The package refuses what the independent reader refuses."""
    path = tmp_path / "x.qf"

    def refused(case: written.Case) -> bool:
        path.write_bytes(case.draft().pack())
        with pytest.raises(reference.SpecError):
            reference.decode(reference.read(path.read_bytes()).tensors["t"])
        try:
            with qformat.safe_open(path, jobs=1) as f:
                f.get_tensor("t")
        except FormatError:
            return True
        return False

    accepted = []
    with using(family):
        for number, (case, name, chunk, old, new, _) in enumerate(written.WRONG):
            changed = written.cut([chunk.replace(bytes.fromhex(old), bytes.fromhex(new), 1)])
            if not refused(case.with_segments(**{name: changed})):
                accepted.append(str(number))
        first = written.cut([bytes.fromhex("0000 00 020000000100 00020000000100")])
        segments = {"grid": bytes.fromhex("00008071") * 2 + bytes(32), "layer.1": first}
        for dtype, symbols in (
            *(("f16", bytes.fromhex(rest)) for rest in ("003e0000", "00ffff01")),
            *(("bf16", bytes.fromhex(rest)) for rest in ("073f03", "074000", "07ff03")),
            *(("f32", bytes.fromhex(rest)) for rest in ("003f01028001", "008000000000", "00ff01020301")),
        ):
            rest = written.cut([written.constant(*symbols)])
            case = written.Case(dtype, (1,), {"layers": 1, "lossless": True}, segments | {"rest": rest})
            if not refused(case):
                accepted.append(f"{dtype} {symbols.hex()}")
        grids = (
            *("00000000", "000080bf", "0100803f", "8000803f", "0000807f", "0000c07f", "0001807e", "0000007f"),
            "00ff7f0d",
        )
        for step in map(bytes.fromhex, grids):
            both = step + written.GRID[4:], written.GRID[:4] + step + written.GRID[8:]
            accepted += [step.hex() for grid in both if not refused(written.BY_HAND.with_segments(grid=grid))]
    assert accepted == []


@every_family
def test_both_readers_agree_on_scm_tensors_with_changed_bytes(tmp_path: Path, family: str) -> None:
    rng = np.random.default_rng(0)
    patterns = np.abs(rng.laplace(size=300)).astype(np.float32).view("<u4")
    patterns[::5] = 0
    modes = iter(lambda: bool(rng.integers(2)), None)
    choices = written.Choices(
        (Fraction(1), Fraction(2)), rng.bytes(32), (0, 40, 200), True, False, [0] * 10, lambda: next(modes)
    )
    case, _ = written.encode([(patterns.tolist(), choices)], "f32", (10, 30))
    path = tmp_path / "x.qf"
    count = 0
    with using(family):
        for name, content in case.segments.items():
            for _ in range(25 if family == "numba" else 10):
                changed = bytearray(content)
                changed[rng.integers(len(content))] ^= rng.integers(1, 256)
                path.write_bytes(case.with_segments(**{name: bytes(changed)}).draft().pack())
                expected = None
                with suppress(reference.SpecError):
                    expected = reference.decode(reference.read(path.read_bytes()).tensors["t"])
                try:
                    with qformat.safe_open(path, jobs=1) as f:
                        found = f.get_tensor("t")
                except FormatError:
                    assert expected is None, (name, bytes(changed))
                    continue
                assert expected is not None, (name, bytes(changed))
                assert same(found, expected), (name, bytes(changed))
                count += 1
    assert count > 5


# ---- any


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, str, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(MANTISSA)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = st.integers(1, 24) | st.sampled_from([32, 65])
    shape = tuple(draw(st.lists(sides, max_size=2))) + draw(st.sampled_from([(), (2,), (3, 3)]))
    exponent = draw(st.integers(-6, 4) if dtype == "f16" else st.integers(-60, 60))
    draws = {
        "normal": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "cauchy": np.clip(rng.standard_cauchy(shape), -500, 500),
        "levels": rng.integers(-2, 3, shape) / 3,
        "exponents": np.exp2(rng.uniform(-9, 9, shape)),
    }
    x = draws[draw(st.sampled_from(sorted(draws)))] * 2.0**exponent
    patterns = np.atleast_1d(patterns_of(x, dtype)).reshape(shape)
    patterns = np.where(
        rng.random(shape) < draw(st.sampled_from([0, 0.02, 0.5, 0.99])), patterns & SIGN[dtype], patterns
    )
    patterns = patterns.astype("<u4" if dtype == "f32" else "<u2")
    if draw(st.booleans()) and len(shape) > 1:  # short mantissas in some rows
        z = draw(st.integers(1, MANTISSA[dtype]))
        patterns[::2] = patterns[::2] >> z << z
    number = draw(st.floats(1.5, 8).map(lambda value: round(value, 2)))
    bound = draw(st.floats(-4, 0).map(lambda value: f"{10**value:.3g}"))
    types = ("scm", f"scm:bpw={number}", *(f"scm:{metric}={bound}" for metric in METRICS), "scm:max_abs=0")
    return dtype, draw(st.sampled_from(types)), patterns


@settings(max_examples=30)
@given(tensors(), st.sampled_from([*FAMILIES, "numba"]))
def test_both_readers_agree_on_any_scm_tensor(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, str, np.ndarray], family: str
) -> None:
    dtype, type_, patterns = drawn
    check(tmp_path_factory.mktemp("any") / "x.qf", patterns, dtype, type_, every=2, writers=(family,))
