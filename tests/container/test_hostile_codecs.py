"""Wrong records and awkward tensors of format 1.1: both readers agree on each, and no encoder loses weights quietly."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.codecs.layout import Matrix
from qformat.codecs.registry import codec_of
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import BF16, F16, F32, Elements
from qformat.errors import FormatError, SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import MeasuredError, Segment, TensorRecord
from tests.helpers.codecs import chunks_of, part_of
from tests.helpers.codecs import decode as decode_chunk
from tests.helpers.files import segment
from tests.helpers.hostile import (
    ERROR,
    NUMBERS,
    ODD_VALUES,
    OTHER_SHAPES,
    PARAMETERS,
    SHAPES,
    WORDS,
    bounded_memory,
    readable,
)
from tests.helpers.kernels import FAMILIES, using
from tests.helpers.reference import reference

Params = dict[str, Any]
GROUPED = {"bits": 4, "group": 128, "sym": True, "scale": "f16"}
BOOK = {"scope": "tensor", "block": 128, "size": 16, "scale": "tensor"}
BASES: dict[str, tuple[str, Params]] = {
    "q4_1": ("q4_1", {}),
    "q5_1": ("q5_1", {}),
    **{f"nlm {block}": ("nlm", {"block": block}) for block in (32, 64, 128)},
    "affine": ("affine", GROUPED),
    "affine row": ("affine", GROUPED | {"bits": 8, "group": "row", "scale": "f32"}),
    "affine 96": ("affine", {"bits": 3, "group": 96, "sym": False, "scale": "bf16"}),
    "affine 32": ("affine", {"bits": 2, "group": 32, "sym": False, "scale": "f16"}),
    "lut": ("lut", BOOK),
    "lut row": ("lut", BOOK | {"size": 8, "scale": "row"}),
    "lut 128": ("lut", BOOK | {"scope": "block", "size": 4}),
    "lut 256": ("lut", BOOK | {"scope": "block", "block": 256}),
}
every_base = pytest.mark.parametrize("name", BASES)


# ---- the specification's rules, once more


def allowed(codec: str, params: Params) -> bool:
    known: Params = {"nlm": {"block": 0}, "affine": GROUPED, "lut": BOOK}.get(codec, {})
    typed = {(key, type(value), str(value)) for key, value in params.items()}
    group = params.get("group")
    if type(group) is int and group % 32 == 0 and 32 <= group <= 2**20:
        typed = (typed - {("group", int, str(group))}) | {("group", str, "row")}
    one = params.get("scope") == "tensor"
    values: Params = {"bits": (2, 3, 4, 8), "group": ("row",), "sym": (True, False), "scale": ("f16", "bf16", "f32")}
    values |= {"block": (32, 64, 128), "scope": ("tensor", "block"), "size": (4, 8, 16)}
    if codec == "lut":
        values |= {"block": (128,) if one else (128, 256), "scale": ("tensor", "row") if one else ("tensor",)}
    good = {(key, type(value), str(value)) for key in known for value in values[key]}
    return params.keys() == known.keys() and typed <= good


def layout(codec: str, params: Params, shape: tuple[int, ...]) -> dict[str, int]:
    rows, cols = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))

    def cuts(length: int) -> int:
        return rows * -(-cols // length)

    found = {"blocks": cuts(32) * {"q4_1": 20, "q5_1": 24}.get(codec, 0)}
    if codec == "nlm":
        found = {"blocks": cuts(params["block"]) * (3 + params["block"] // 2)}
    elif codec == "affine":
        groups = rows if params["group"] == "row" else cuts(params["group"])
        found = {"scales": groups * (4 if params["scale"] == "f32" else 2)}
        found |= {} if params["sym"] else {"zeros": groups}
        found |= {"codes": cuts(32) * 4 * params["bits"]}
    elif codec == "lut":
        books = cuts(params["block"]) if params["scope"] == "block" else 1
        found = {"codebooks": 2 * books * params["size"]}
        found |= {"scales": 2 * rows} if params["scale"] == "row" else {}
        found |= {"codes": cuts(32) * 4 * {4: 2, 8: 3, 16: 4}[params["size"]]}
    return {name: length if rows * cols else 0 for name, length in found.items()}


def random_segments(codec: str, params: Params, shape: tuple[int, ...], seed: int, finite: bool) -> dict[str, bytes]:
    """Return random bytes; with `finite` the highest bit of every exponent is 0."""
    found = {}
    for name, length in layout(codec, params, shape).items():
        data = np.frombuffer(np.random.default_rng(seed).bytes(length), np.uint8).copy()
        if finite and name in ("scales", "codebooks"):
            width = 4 if params["scale"] == "f32" else 2
            data[width - 1 :: width] &= 0xBF
        elif finite and name == "blocks":
            blocks = data.reshape(-1, layout(codec, params, (1,))["blocks"])
            at, masks = ([1, 2], b"\xfd\xef") if codec == "nlm" else ([1, 3], b"\xbf\xbf")
            blocks[:, at] &= np.frombuffer(masks, np.uint8)
        found[name] = data.tobytes()
    return found


# ---- wrong records


def record_of(codec: str, params: Params, shape: tuple[int, ...], /, **changes: Any) -> dict[str, Any]:
    segments = random_segments(codec, params, shape, 1, finite=True)
    record = {"name": "t", "shape": list(shape), "dtype": "f32", "codec": codec, "params": params, "error": ERROR}
    return record | {"segments": [segment(*item) for item in segments.items()]} | changes


@every_base
def test_unchanged_tensors_of_fixed_size_are_valid(tmp_path: Path, name: str) -> None:
    codec, params = BASES[name]
    for shape in [*SHAPES, (33,), (0,), (1, 0, 3), (2**40, 0), (341, 1), (2, 2, 2, 40)]:
        assert readable(tmp_path / "f.qf", record_of(codec, params, shape)), shape
    for dtype in ("f8_e4m3", "f8_e5m2", "f16", "bf16", "f64"):
        assert readable(tmp_path / "f.qf", record_of(codec, params, (2, 341), dtype=dtype))
    assert readable(tmp_path / "f.qf", record_of(codec, params, (2, 341), encoder={"search": 7, "group": "row"}))


@every_base
def test_impossible_codec_parameters_are_refused(tmp_path: Path, name: str) -> None:
    codec, params = BASES[name]
    changed = [params | {key: value} for key in params for value in [*NUMBERS, *WORDS, *ODD_VALUES]]
    changed += [{k: v for k, v in params.items() if k != key} for key in params] + [{}]
    changed += [params | {key: 32} for key in PARAMETERS if key not in params]
    changed += [{k.upper(): v for k, v in params.items()}, {k: str(v).lower() for k, v in params.items()}]
    fine = 0
    for bad in changed:
        # Without elements all segments are empty, so that only the parameters can be wrong.
        empty = record_of(codec, params, (0, 64), params=bad)
        if allowed(codec, bad):
            empty = record_of(codec, bad, (0, 64))
            assert readable(tmp_path / "f.qf", record_of(codec, bad, (2, 341))), bad
            same = layout(codec, bad, (2, 341)) == layout(codec, params, (2, 341))
            assert readable(tmp_path / "f.qf", record_of(codec, params, (2, 341), params=bad)) == same, bad
            fine += 1
        assert readable(tmp_path / "f.qf", empty) == allowed(codec, bad), bad
    assert fine >= len(params)


@every_base
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_wrong_segments_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    codec, params = BASES[name]
    parts = record_of(codec, params, shape)["segments"]
    wrong: list[list[dict[str, Any]]] = [[], [*parts, segment("extra", b"")], [segment("data", b""), *parts]]
    wrong += [[segment("scales", b"\0" * 4), *parts], [*parts, segment("zeros", b"")]]
    if len(parts) > 1:
        wrong += [parts[::-1], [*parts[1:], parts[0]]]
        if len(parts[0]["bytes"]) != len(parts[-1]["bytes"]):
            wrong += [[segment(a["name"], b["bytes"]) for a, b in zip(parts, parts[::-1], strict=True)]]
    for i, part in enumerate(parts):
        data, before, after = part["bytes"], parts[:i], parts[i + 1 :]
        wrong += [[*before, *after], [*before, part, part, *after]]
        for renamed in (part["name"].upper(), part["name"] + "s", part["name"][:-1], "data"):
            wrong.append([*before, segment(renamed, data), *after])
        for step in (1, 2, layout(codec, params, (1, 1))[part["name"]], len(data)):  # the third is a block or group
            wrong.append([*before, segment(part["name"], data + bytes(step or 1)), *after])
            wrong += [[*before, segment(part["name"], data[:-step]), *after]] if 0 < step <= len(data) else []
    for bad in wrong:
        assert not readable(tmp_path / "f.qf", record_of(codec, params, shape, segments=bad)), bad


@every_base
def test_shapes_that_segments_do_not_fit_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    codec, params = BASES[name]
    for shape in ((2, 341), (0, 64)):
        for other in [*SHAPES, *OTHER_SHAPES]:
            same = layout(codec, params, shape) == layout(codec, params, other)
            record = record_of(codec, params, shape, shape=list(other))
            with bounded_memory(8 << 20):
                assert readable(tmp_path / "f.qf", record) == same, other


@every_base
def test_impossible_keys_in_records_are_refused(tmp_path: Path, name: str) -> None:
    codec, params = BASES[name]
    wrong: Params = {"dtype": ["i32", "bool", "u8", "F32", "float32", "f128", "", codec, ...]}
    wrong |= {"error": [{"rmse": "inf", "max": "inf"}, {"rmse": "0.000000000e+00"}, {}, ...], "params": [..., [], ""]}
    wrong |= {"codec": [codec.upper(), codec + " ", "q4_2", "f32", ...], "shape": [[2, -1], [True, 0], [0, 0.0], ...]}
    for shape in ((2, 341), (0, 64)):
        for key, value in ((key, value) for key, values in wrong.items() for value in values):
            assert not readable(tmp_path / "f.qf", record_of(codec, params, shape, **{key: value})), (key, value)


# ---- any bytes, in both families of kernels and the reference


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Params, tuple[int, ...]]:
    codec, params = draw(st.sampled_from(list(BASES.values())))
    if codec == "affine":
        group = st.sampled_from(["row", 32, 64, 96, 128, 160, 1024, 2**20])
        params = {"bits": draw(st.sampled_from([2, 3, 4, 8])), "group": draw(group), "sym": draw(st.booleans())}
        params["scale"] = draw(st.sampled_from(["f16", "bf16", "f32"]))
    elif codec == "lut":
        params = params | {"size": draw(st.sampled_from([4, 8, 16]))}
    cols = st.one_of(st.integers(0, 70), st.sampled_from([95, 96, 97, 127, 128, 129, 255, 256, 257, 341]))
    return codec, params, (draw(st.integers(0, 4)), draw(cols))


def decode(codec: str, params: Params, shape: tuple[int, ...], parts: dict[str, bytes], family: str) -> np.ndarray:
    """Decode chunk by chunk; a value is compared by its bits."""
    segments = tuple(Segment(name, 0, len(data), "0" * 64) for name, data in parts.items())
    found = codec_of(TensorRecord("t", shape, "f32", codec, params, segments, error=MeasuredError(0.1, 0.5)))
    out = np.empty(math.prod(shape), np.float32)
    with using(family):
        for chunk in chunks_of(found, shape):
            part = part_of(found, shape, chunk, list(parts.values()))
            out[chunk.elements(Matrix.of(shape))] = decode_chunk(found, part, (chunk.rows, chunk.cols)).reshape(-1)
    return out.view(np.uint32)


@given(tensor=tensors(), seed=st.integers(0, 2**32), chunk=st.sampled_from([32, 96, 2**19]))
def test_both_readers_and_kernel_families_decode_random_bytes_alike(tensor: Any, seed: int, chunk: int) -> None:
    codec, params, shape = tensor
    parts = random_segments(codec, params, shape, seed, finite=True)
    record = {"params": params, "error": ERROR}
    expected = reference.decode(reference.Tensor("t", shape, "f32", codec, record, tuple(parts.items()), ""))
    assert expected.shape == shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", chunk)
        for family in FAMILIES:
            np.testing.assert_array_equal(decode(codec, params, shape, parts, family), expected.view(np.uint32).ravel())


@given(tensor=tensors(), seed=st.integers(0, 2**32), ones=st.booleans())
def test_random_bytes_are_refused_or_decode(tensor: Any, seed: int, ones: bool) -> None:
    codec, params, shape = tensor
    parts = random_segments(codec, params, shape, seed, finite=False)
    if ones:
        parts = {name: b"\xff" * len(data) for name, data in parts.items()}
    for family in FAMILIES:  # warnings are errors
        with suppress(FormatError):
            values = decode(codec, params, shape, parts, family).view(np.float32)
            assert Elements(F32, values).cast(F16).size == math.prod(shape)


# ---- encoders

OPTIONS = {
    "q4_1": ["", "search=naive", "search=best"],
    "q5_1": [""],
    "nlm": ["", "block=128", "block=64,optimize=max", "block=128,optimize=max"],
    "affine": ["", "group=row,bits=8", "group=32,bits=2,sym=false", "group=96,bits=3,scale=bf16"],
    "affine:scale=f32": ["", "sym=false,group=row", "bits=8,group=32"],
    "affine:scale=bf16": ["bits=8,sym=false"],
    "lut": ["", "fit=percentile", "fit=gauss", "scope=block,size=4", "scope=block,block=256,size=8"],
    "lut:scale=row": ["size=8", "size=4,fit=percentile", "fit=gauss"],
}
TYPES = [f"{a}{',' if ':' in a else ':'}{b}" if b else a for a, options in OPTIONS.items() for b in options]
LEAST = [type_ for type_ in TYPES if "fit" not in type_ and "size=4" not in type_ and "bits=2" not in type_]
WIDE = [type_ for type_ in TYPES if "scale=f32" in type_ or "scale=bf16" in type_]
every_type = pytest.mark.parametrize("type_", TYPES)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def save(path: Path, x: np.ndarray | Elements, type_: str, **options: Any) -> tuple[np.ndarray, TensorRecord]:
    """Return the values and the record of a file that both readers read alike."""
    path.unlink(missing_ok=True)
    if isinstance(x, np.ndarray):
        qformat.save_file({"w.0": x}, path, {"w.0": type_}, **options)
    else:  # numpy has no bfloat16
        convert(Checkpoint([ArrayTensor("w.0", x)]), path, Recipe.parse(None, {"w.0": type_}), **options)
    with qformat.safe_open(path) as file:
        values, info = file.get_tensor("w.0"), file.info("w.0")
    expected = reference.decode(reference.read(path.read_bytes()).tensors["w.0"])
    assert values.tobytes() == expected.tobytes()
    assert np.isfinite(values).all()
    return values, info


def refuses(path: Path, x: np.ndarray | Elements, type_: str, says: str) -> None:
    with pytest.raises(SourceError, match=rf"tensor 'w\.0' .*{says}"):
        save(path, x, type_)
    assert list(path.parent.iterdir()) == []


def check_error(x: np.ndarray, values: np.ndarray, info: TensorRecord) -> None:
    error = x.astype(np.float32).astype(np.float64) - values
    rmse, largest = math.sqrt(np.mean(np.square(error))), np.abs(error).max()
    assert info.error is not None
    assert info.error.rmse == pytest.approx(rmse, rel=1e-6, abs=1e-19)  # smaller ones do not count
    assert info.error.maximum == pytest.approx(largest, rel=1e-6, abs=1e-44)


@every_type
@pytest.mark.parametrize("cols", [1, 31, 33, 341])
def test_the_recorded_error_is_the_true_one(tmp_path: Path, type_: str, cols: int) -> None:
    doubles = np.random.default_rng(1).standard_normal((5, cols))  # are rounded to float32 first
    for x in (normal(5, cols), normal(5, cols) * np.float32(0.02) + 1, normal(5, cols).astype(np.float16), doubles):
        check_error(x, *save(tmp_path / "f.qf", x, type_))
    upper = Elements(BF16, (normal(5, cols).view(np.uint32) >> 16).astype(np.uint16))
    values, info = save(tmp_path / "f.qf", upper, type_)
    check_error(upper.to_f32(), values, info)
    assert values.tobytes() == save(tmp_path / "f.qf", upper.to_f32(), type_)[0].tobytes()


@every_type
def test_nan_and_infinity_are_refused_by_tensor_name(
    tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk in (1 << 19, 96):
        monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", chunk)
        for i, at in enumerate([(0, 0), (0, 340), (2, 320), (4, 0), (4, 340)]):
            bad = (np.nan, np.inf, -np.inf)[i % 3]
            x = normal(5, 341).astype([np.float32, np.float64, np.float16][i % 2 * (1 + i // 2 % 2)])
            x[at] = bad
            refuses(tmp_path / "f.qf", x, type_, "NaN or infinity")
        patterns = (normal(5, 341).view(np.uint32) >> 16).astype(np.uint16)
        patterns[4, 340] = 0xFF80
        refuses(tmp_path / "f.qf", Elements(BF16, patterns), type_, "NaN or infinity")
        refuses(tmp_path / "f.qf", np.full((2, 33), np.nan, np.float32), type_, "NaN or infinity")


@pytest.mark.parametrize("type_", ["q5_1", "nlm:block=128", "affine:group=row", "lut", "lut:scale=row,size=4"])
def test_nan_in_the_second_chunk_is_refused(tmp_path: Path, type_: str) -> None:
    for bad in (np.nan, -np.inf):
        x = np.resize(normal(1 << 12), (1100, 500))
        x[-1, -1] = bad
        refuses(tmp_path / "f.qf", x, type_, "NaN or infinity")


LARGE = {
    "1e20": normal(3, 341) * np.float32(1e20),
    "1e30": normal(3, 341) * np.float32(1e30),
    "1e38": np.clip(normal(3, 341), -3, 3) * np.float32(1e38),
    "one 1e30": np.where(np.arange(341) == 340, np.float32(1e30), normal(3, 341)),
    "largest": np.sign(normal(3, 341)) * np.finfo(np.float32).max,
    "a double": np.where(np.arange(341) == 340, 1e39, normal(3, 341).astype(np.float64)),
    "some doubles": normal(3, 341) * np.float64(1e300),
    "all largest": np.full((3, 341), np.finfo(np.float32).max, np.float32),
}


@every_type
@pytest.mark.parametrize("name", LARGE)
def test_large_values_are_refused_or_stored_faithfully(tmp_path: Path, type_: str, name: str) -> None:
    x, path = LARGE[name], tmp_path / "f.qf"
    clips = (
        type_ == "lut:fit=percentile" and name == "one 1e30"
    )  # one weight moves no percentile, and is lost on purpose
    if type_ in WIDE or clips:
        with suppress(SourceError):
            values, info = save(path, x, type_)
            assert clips or np.abs(x.astype(np.float64) - values).max() <= 0.4 * np.abs(x).max()
            check_error(x, values, info)
            return
    refuses(path, x, type_, "too large")


@every_type
def test_small_values_are_refused_or_stored_faithfully(tmp_path: Path, type_: str) -> None:
    for tiny in (1e-50, -5e-324):
        refuses(tmp_path / "f.qf", np.full((2, 33), tiny), type_, "too small")
    for x in (normal(3, 341) * np.float32(1e-30), np.full((2, 33), -1e-30, np.float32)):
        if type_ in WIDE:
            values, info = save(tmp_path / "f.qf", x, type_)
            assert np.abs(x.astype(np.float64) - values).max() <= 0.4 * np.abs(x).max()
            check_error(x, values, info)
        else:
            refuses(tmp_path / "f.qf", x, type_, "too small")
            assert np.abs(save(tmp_path / "f.qf", x, type_, allow_zeroed=True)[0]).max() < 1e-6
            (tmp_path / "f.qf").unlink()
    rows = normal(3, 341) * np.array([[1], [1e-30], [1]], np.float32)
    if type_.startswith("lut") and "scale=row" not in type_ and "block" not in type_:
        check_error(rows, *save(tmp_path / "f.qf", rows, type_))  # one codebook for all: some of it may be zero
    elif type_ not in WIDE:
        refuses(tmp_path / "f.qf", rows, type_, "too small")
    else:
        values, _ = save(tmp_path / "f.qf", rows, type_)
        assert 0.6 < np.abs(values[1]).max() / np.abs(rows[1]).max() < 1.4


@every_type
def test_zeros_equal_values_and_outliers_are_stored_well(tmp_path: Path, type_: str) -> None:
    path = tmp_path / "f.qf"
    for shape in ((3, 341), (1,), (4, 1)):
        for value in (0.0, -0.0, 0.3, -0.3, 1.0, 3e4, 1e-3):
            x = np.full(shape, value, np.float32)
            values, info = save(path, x, type_)
            check_error(x, values, info)
            assert np.abs(values - x).max() <= abs(value) * (0.25 if "gauss" in type_ else 0.004)
    mixed = np.where(np.arange(341) % 2, np.float32(-0.0), normal(3, 341))
    check_error(mixed, *save(path, mixed, type_))
    outlier = np.where(np.arange(1023).reshape(3, 341) == 400, np.float32(1e4), normal(3, 341) * np.float32(1e-3))
    check_error(outlier, *save(path, outlier, type_))
    assert type_ not in LEAST or save(path, outlier, type_)[0].reshape(-1)[400] == pytest.approx(1e4, rel=0.01)


# ---- chunks, threads, rows


@every_type
def test_bytes_and_values_do_not_depend_on_chunks_threads_and_rows(
    tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.qf"
    for x in (normal(7, 341), normal(3, 5, 33), normal(700)):
        results = []
        for chunk in (1 << 19, 96):
            monkeypatch.setattr("qformat.readers.decoder.CHUNK_ELEMENTS", chunk)
            monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", chunk)
            values, info = save(path, x, type_, jobs=1)
            check_error(x, values, info)
            data = path.read_bytes()
            save(path, x, type_, jobs=2)
            assert path.read_bytes() == data
            results.append((values.tobytes(), [segment.sha256 for segment in info.segments]))
            with qformat.safe_open(path, jobs=2) as file:
                assert file.get_tensor("w.0").tobytes() == values.tobytes()
                for rows in ([2, 0, 1, 2], slice(None), -1, [], slice(1, 3)) if x.ndim > 1 else ():
                    np.testing.assert_array_equal(file.get_rows("w.0", rows), values[rows])  # type: ignore[index]
        assert results[0] == results[1]
