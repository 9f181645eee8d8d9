"""Qualities, files cut to one, and reading no more of a file than a quality needs."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.container.reader import ContainerReader
from qformat.container.verify import verify
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.truncate import truncate
from qformat.dtypes import DTYPES, Elements
from qformat.errors import FormatError, QualityError, TargetError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.quality import Quality
from qformat.readers.torch import load_file, load_model
from qformat.records import Layer, MeasuredError, Segment, TensorRecord
from tests.helpers.files import Draft, put

LADDER = (*(2 + number / 4 for number in range(17)), 7.0, 8.0)
METADATA = {"made by": "a test ⁂", "licence": "none"}
ASSETS = {"config.json": b'{"a": 1}', "tok/vocab.txt": b"".join(b"token %d\n" % (i % 9) for i in range(300))}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def elements(dtype: str, values: np.ndarray) -> Elements:
    return Elements(DTYPES[dtype], Elements(DTYPES["f32"], values).cast(DTYPES[dtype]))


# ---- what can be asked for


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Quality()),
        (3, Quality(bits=3)),
        (2.5, Quality(bits=2.5)),
        (np.float32(4.25), Quality(bits=4.25)),
        ("3.5", Quality(bits=3.5)),
        ("32", Quality(bits=32)),
        ("1e-3", Quality(bits=1e-3)),
        ("lossless", Quality(lossless=True)),
        ("max_rmse=0.01", Quality(metric="max_rmse", bound=0.01)),
        ("max_abs=5e-2", Quality(metric="max_abs", bound=0.05)),
        ("mean_abs=0", Quality(metric="mean_abs", bound=0)),
        (Quality(bits=2), Quality(bits=2)),
        (Quality(), Quality()),
    ],
)
def test_qualities_are_parsed(value, expected):
    assert Quality.parse(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", "x", "best", "Lossless", "lossless=true", "nan", "inf", "-inf", "-1", "0", "3 bits", "3,5"),
        *("max_rmse", "max_rmse=", "max_rmse=x", "max_rmse=-0.1", "max_rmse=nan", "max_rmse=inf", "rmse=0.1"),
        *("max_abs=0.1,mean_abs=0.1", "max_abs==0.1", "bpw=3", "MAX_ABS=0.1"),
        *(0, -2, math.nan, math.inf),
    ],
)
def test_malformed_qualities_are_refused_before_files_are_opened(value, tmp_path):
    with pytest.raises(QualityError) as caught:
        Quality.parse(value)
    message = str(caught.value)
    assert message.startswith(
        f"quality {str(value)!r}: give bits per weight such as 3.5, a bound such as max_rmse=0.01"
    )
    assert "lossless" in message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, qformat.QFormatError)
    with pytest.raises(QualityError):  # before anything is opened
        qformat.safe_open(tmp_path / "missing.qf", quality=value)
    with pytest.raises(QualityError):
        load_file(tmp_path / "missing.qf", quality=value)


@given(st.text(max_size=30))
def test_any_text_is_parsed_as_a_quality_or_refused(text):
    try:
        quality = Quality.parse(text)
    except QualityError as error:
        assert "give bits per weight" in str(error)  # noqa: PT017
    else:
        assert quality.lossless or quality.metric or (quality.bits is not None and quality.bits > 0)


# ---- what that means for a tensor


def record(*layers: tuple[int, float, float, float], lossless: int = 0, spread: float = 2.0) -> TensorRecord:
    """Return the record of 80 weights; bytes of each layer, its rmse, largest and mean error, and what the rest takes."""
    segments = [Segment("grid", 64, 10, "0" * 64)]
    for number, (nbytes, *errors) in enumerate(layers, 1):
        error = MeasuredError(errors[0], errors[1], errors[2])
        segments.append(Segment(f"layer.{number}", 128 * number, nbytes, "0" * 64, error))
    last = segments[-1].error
    assert last is not None
    error = None if lossless else MeasuredError(last.rmse, last.maximum)
    if lossless:
        segments.append(Segment("rest", 4096, lossless, "0" * 64))
    params = {"layers": len(layers), "lossless": bool(lossless)}
    return TensorRecord("a.b", (8, 10), "f32", "scm", params, tuple(segments), error=error, range=spread)


THREE = ((10, 0.4, 1.0, 0.3), (10, 0.2, 0.6, 0.1), (20, 0.04, 0.1, 0.02))


def count_of(quality: Any, of: TensorRecord) -> tuple[int, bool]:
    found = Quality.parse(quality).of(of)
    return int(found.params["layers"]), bool(found.params["lossless"])


def test_records_list_their_layers_with_sizes_and_errors():
    layers = record(*THREE, lossless=200).layers
    assert [layer.nbytes for layer in layers] == [20, 30, 50, 250]
    assert [layer.bpw for layer in layers] == [2, 3, 5, 25]
    assert layers[1] == Layer(30, 3.0, MeasuredError(0.2, 0.6, 0.1))
    assert layers[3].error == MeasuredError(0.0, 0.0, 0.0)
    assert [layer.bpw for layer in record(*THREE).layers] == [2, 3, 5]


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        (None, (3, True)),
        (2, (1, False)),
        (2.99, (1, False)),
        (3, (2, False)),
        (4.9, (2, False)),
        ("5", (3, False)),
        (24.9, (3, False)),
        (25, (3, True)),
        (1000, (3, True)),
        (1.9, (1, False)),  # the first layer is read even if it has more
        (1e-9, (1, False)),
        ("max_rmse=0.5", (1, False)),
        ("max_rmse=0.2", (1, False)),
        ("max_rmse=0.1999", (2, False)),
        ("max_rmse=0.1", (2, False)),
        ("max_abs=0.3", (2, False)),
        ("max_abs=0.05", (3, False)),
        ("max_abs=0.049", (3, True)),
        ("mean_abs=0.15", (1, False)),
        ("mean_abs=0.03", (3, False)),
        ("mean_abs=0", (3, True)),
        ("lossless", (3, True)),
    ],
)
def test_a_quality_selects_the_fewest_layers(quality, expected):
    assert count_of(quality, record(*THREE, lossless=200)) == expected


def test_a_quality_that_no_layer_reaches_is_refused():
    lossy = record(*THREE)
    with pytest.raises(QualityError) as caught:
        Quality.parse("max_rmse=0.01").of(lossy)
    assert str(caught.value) == (
        "tensor 'a.b': no layer reaches max_rmse=0.01; the file holds it at 5.00 bits/weight, with max_rmse=0.02"
    )
    with pytest.raises(
        QualityError, match=r"^tensor 'a.b': the file does not hold it losslessly; its last layer has 5.00"
    ):
        Quality.parse("lossless").of(lossy)
    assert count_of(1000, lossy) == count_of(None, lossy) == (3, False)


def test_error_bounds_of_constant_tensors_select_exact_layers():
    """0 over 0 is 0; else there is nothing to compare with, and as much is read as there is."""
    exact = record((10, 0.0, 0.0, 0.0), spread=0.0)
    assert count_of("max_abs=0", exact) == (1, False)
    rough = record((10, 0.1, 0.1, 0.1), (10, 0.0, 0.0, 0.0), spread=0.0)
    assert count_of("max_abs=100", rough) == (2, False)
    assert count_of("max_abs=100", record((10, 0.1, 0.1, 0.1), (10, 0.1, 0.1, 0.1), spread=0.0)) == (2, False)


def test_records_cut_to_fewer_layers_are_valid_records():
    whole = record(*THREE, lossless=200)
    assert whole.up_to(4) is whole.up_to(100) is whole
    three = whole.up_to(3)
    assert three.params == {"layers": 3, "lossless": False}
    assert three.error == MeasuredError(0.04, 0.1)
    assert three.segments == whole.segments[:4]
    one = whole.up_to(2).up_to(1)
    assert one == whole.up_to(1)
    assert (one.error, one.range, one.name, one.shape) == (MeasuredError(0.4, 1.0), 2.0, "a.b", (8, 10))
    lossy = record(*THREE)
    assert lossy.up_to(3) is lossy
    assert lossy.up_to(2).params == {"layers": 2, "lossless": False}


def test_qualities_do_not_change_tensors_without_layers():
    raw = TensorRecord("x", (3,), "f32", "f32", {}, (Segment("data", 64, 12, "0" * 64),))
    assert raw.layers == ()
    for quality in (2, "lossless", "max_abs=0", None):
        assert Quality.parse(quality).of(raw) is raw


# ---- files


def model(seed: int, *, big: bool = False) -> dict[str, Elements]:
    """Return layered tensors of many sizes."""
    rng = np.random.default_rng(seed)
    found = {
        "a.weight": elements("f32", normal(120, 90, seed=seed)),
        "b.bf16": elements("bf16", normal(90, 130, seed=seed + 1)),
        "c.f16": elements("f16", rng.laplace(0, 0.02, (70, 150)).astype(np.float32)),
        "d.one": elements("f32", normal(1)),
        "d.two": elements("f16", normal(1, 2)),
        "e.few": elements("f32", normal(5, 31)),
        "g.sparse": elements("f32", np.where(rng.random((60, 70)) < 0.4, 0, normal(60, 70)).astype(np.float32)),
        "i.levels": elements("f32", rng.integers(-40, 41, (64, 64)).astype(np.float32) * np.float32(0.3)),
        "j.tails": elements("f32", rng.standard_cauchy((64, 100)).astype(np.float32)),
        "k.small": elements("f32", normal(20, 15)),
        "l.scalar": Elements(DTYPES["f32"], np.array(-0.7, np.float32)),
    }
    if big:
        found["m.long"] = elements("f32", normal(2, 300_000, seed=seed))
    return found


def exact() -> dict[str, Elements]:
    """Return tensors that few bits hold losslessly."""
    rng = np.random.default_rng(0)
    return {
        "f.empty": elements("f32", normal(0, 4)),
        "h.zeros": elements("bf16", np.zeros((20, 20), np.float32)),
        "i.ternary": elements("f32", rng.integers(-1, 2, (64, 64)).astype(np.float32) * np.float32(0.3)),
    }


OTHERS = {
    "z.bias": elements("f32", normal(9)),
    "z.ids": Elements(DTYPES["i64"], np.arange(7)),
    "z.q4": elements("f32", normal(6, 64)),
    "z.raw": elements("f16", normal(4, 5)),
}


def write(path: Path, type_: str, tensors: Mapping[str, Elements], **overrides: str) -> bytes:
    """Store tensors as one type, and `OTHERS` as others."""
    sources = [ArrayTensor(name, x) for name, x in (dict(tensors) | OTHERS).items()]
    types = {"[a-y]*": type_, "z.q4": "q4_0", "z.raw": "lossless"} | overrides
    assets = {name: (lambda data=data: data) for name, data in ASSETS.items()}
    convert(Checkpoint(sources, assets), path, Recipe.parse(None, types), overwrite=True, metadata=METADATA)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with everything."""
    path = tmp_path_factory.mktemp("quality") / "whole.qf"
    write(path, "scm", model(0, big=True))
    return path


def valid(path: Path) -> None:
    (report,) = verify([str(path)], jobs=1)
    assert report.ok, report


def nothing_at(target: Path) -> None:
    assert not os.path.lexists(target)
    assert not os.path.lexists(f"{target}.partial")


@pytest.mark.parametrize("bits", [2, 2.25, 3, 3.75, 5.5, 6, 8])
def test_truncating_to_a_rate_equals_converting_at_that_rate(bits, whole, tmp_path):
    done = truncate(whole, tmp_path / "cut.qf", Quality(bits=bits))
    expected = write(tmp_path / "made.qf", f"scm:bpw={bits}", model(0, big=True))
    assert (tmp_path / "cut.qf").read_bytes() == expected
    assert (done.before, done.after) == (whole.stat().st_size, len(expected))
    with qformat.safe_open(tmp_path / "cut.qf") as f:
        assert f.root == done.root
        assert done.bpw == 8 * sum(f.info(n).nbytes for n in f.keys()) / sum(f.info(n).elements for n in f.keys())  # noqa: SIM118


@pytest.mark.parametrize("seed", [1, 2])
def test_truncating_other_models_equals_converting_at_that_rate(seed, tmp_path):
    write(tmp_path / "whole.qf", "scm", model(seed))
    for bits in LADDER[seed::3]:
        truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=bits), overwrite=True)
        assert (tmp_path / "cut.qf").read_bytes() == write(tmp_path / "made.qf", f"scm:bpw={bits}", model(seed)), bits


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (7, 9), (13, 17), (50, 60), (77, 80), (100, 257)])
def test_truncating_small_tensors_equals_converting_at_that_rate(rows, cols, tmp_path):
    rng = np.random.default_rng(rows)
    tensors = {
        "a": elements("f32", rng.normal(size=(rows, cols)).astype(np.float32)),
        "b": elements("bf16", (rng.normal(size=(rows, cols)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)),
    }
    write(tmp_path / "whole.qf", "scm", tensors)
    for bits in (2, 2.5, 3.25, 4, 5.5, 7, 8):
        truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=bits), overwrite=True)
        assert (tmp_path / "cut.qf").read_bytes() == write(tmp_path / "made.qf", f"scm:bpw={bits}", tensors), bits


def test_truncating_tensors_that_few_bits_hold_exactly_equals_converting_at_that_rate(tmp_path):
    write(tmp_path / "whole.qf", "scm", exact())
    truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=6))
    assert (tmp_path / "cut.qf").read_bytes() == write(tmp_path / "made.qf", "scm:bpw=6", exact())


def test_tensors_that_few_bits_hold_exactly_are_lossless_above_8_bits(tmp_path):
    write(tmp_path / "whole.qf", "scm", exact())
    for bits, lossless in ((6, False), (8, False), (30, True)):
        with qformat.safe_open(tmp_path / "whole.qf", quality=bits) as f:
            for name, source in exact().items():
                read = f.get_tensor(name)
                assert not lossless or np.array_equal(read.astype(np.float32), source.to_f32())
                assert lossless or read.dtype == np.float32
                assert f._decoder(name).codec.lossless == lossless


def test_truncating_twice_equals_truncating_once(tmp_path):
    whole, tensors = tmp_path / "whole.qf", model(4)
    for name in ("d.one", "d.two", "e.few", "k.small", "l.scalar"):  # with too few layers for a bound
        del tensors[name]
    write(whole, "scm", tensors)
    first, second, third = (tmp_path / f"{name}.qf" for name in "123")
    for qualities in ((5, 3), ("max_rmse=0.005", "max_rmse=0.02"), (8, 2), (6, "max_abs=0.05"), (4, 4), (3, 6)):
        one, two = map(Quality.parse, qualities)
        truncate(whole, first, one, overwrite=True)
        truncate(first, second, two, overwrite=True)
        truncate(whole, third, Quality.parse(min(qualities, key=str)) if qualities == (3, 6) else two, overwrite=True)
        assert second.read_bytes() == third.read_bytes()
        valid(second)


def test_truncating_to_lossless_keeps_all_layers(whole, tmp_path):
    for quality in ("lossless", 1000, "max_abs=0"):
        truncate(whole, tmp_path / "x.qf", Quality.parse(quality), overwrite=True)
        if quality != "max_abs=0":  # some are exact before all layers
            assert (tmp_path / "x.qf").read_bytes() == whole.read_bytes()
        valid(tmp_path / "x.qf")
        with qformat.safe_open(tmp_path / "x.qf") as cut, qformat.safe_open(whole) as f:
            for name in f.keys():  # noqa: SIM118
                np.testing.assert_array_equal(cut.get_tensor(name), f.get_tensor(name))


def test_a_truncated_file_reads_like_the_whole_one_at_that_quality(whole, tmp_path):
    for quality in (2.5, 4, "max_rmse=0.01", "mean_abs=0.003"):
        target = tmp_path / "x.qf"
        truncate(whole, target, Quality.parse(quality), overwrite=True)
        valid(target)
        with qformat.safe_open(target) as cut, qformat.safe_open(whole, quality=quality) as f:
            assert cut.keys() == f.keys()
            assert cut.metadata == f.metadata == METADATA
            assert cut.assets() == f.assets() == sorted(ASSETS)
            assert {name: cut.get_asset(name) for name in ASSETS} == ASSETS
            for name in f.keys():  # noqa: SIM118
                found, expected = cut.get_tensor(name), f.get_tensor(name)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.tobytes() == expected.tobytes()
                if name in OTHERS:
                    assert [(s.name, s.sha256) for s in cut.info(name).segments] == [
                        (s.name, s.sha256) for s in f.info(name).segments
                    ]
                    assert cut.info(name).params == f.info(name).params
                else:
                    assert cut.info(name).range == f.info(name).range
                    assert cut.info(name).nbytes <= f.info(name).nbytes
        assert target.stat().st_size < whole.stat().st_size / 2


# ---- what cannot be truncated


def test_truncating_into_the_source_or_an_existing_file_is_refused(whole, tmp_path):
    source = tmp_path / "s.qf"
    source.write_bytes(whole.read_bytes())
    (tmp_path / "link.qf").symlink_to(source)
    os.link(source, tmp_path / "hard.qf")
    for name in ("s.qf", "link.qf", "hard.qf"):
        with pytest.raises(TargetError) as caught:
            truncate(source, tmp_path / name, Quality(bits=3), overwrite=True)
        assert "is the file that is to be read, or a part of it; give another name" in str(caught.value)
        assert source.read_bytes() == whole.read_bytes()
    (tmp_path / "there.qf").write_bytes(b"precious")
    with pytest.raises(TargetError, match="exists"):
        truncate(source, tmp_path / "there.qf", Quality(bits=3))
    assert (tmp_path / "there.qf").read_bytes() == b"precious"
    with pytest.raises(TargetError):
        truncate(source, tmp_path / "no" / "such" / "folder.qf", Quality(bits=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.qf", "link.qf", "s.qf", "there.qf"]


def test_truncating_files_that_do_not_reach_the_quality_is_refused(whole, tmp_path):
    target = tmp_path / "x.qf"
    qformat.save_file({"w": normal(4, 64), "b": normal(3)}, tmp_path / "plain.qf", "q4_0")
    write(tmp_path / "lossy.qf", "scm:bpw=4", {"a": elements("f32", normal(50, 60))})
    cases = [
        ("plain.qf", "3", r"plain.qf: holds no layered tensors \(type scm\)"),
        ("plain.qf", "lossless", "holds no layered tensors"),
        (
            "lossy.qf",
            "lossless",
            r"tensor 'a': the file does not hold it losslessly; its last layer has (3\.9\d|4\.00) bits/weight",
        ),
        (
            "lossy.qf",
            "max_abs=0.0001",
            r"tensor 'a': no layer reaches max_abs=0.0001; the file holds it at (3\.9\d|4\.00) bits/w",
        ),
    ]
    for name, quality, message in cases:
        with pytest.raises(QualityError, match=message) as caught:
            truncate(tmp_path / name, target, Quality.parse(quality))
        assert "\n" not in str(caught.value)
        nothing_at(target)
    # what is replaced stays if it is not to be
    target.write_bytes(b"old")
    with pytest.raises(QualityError):
        truncate(tmp_path / "lossy.qf", target, Quality.parse("lossless"), overwrite=True)
    assert target.read_bytes() == b"old"
    truncate(tmp_path / "lossy.qf", target, Quality.parse("3"), overwrite=True)
    valid(target)


def test_the_tensor_that_is_not_lossless_is_named(tmp_path):
    write(
        tmp_path / "x.qf",
        "scm",
        {"a": elements("f32", normal(9, 9)), "b": elements("f32", normal(40, 50))},
        b="scm:bpw=3",
    )
    with pytest.raises(QualityError, match="tensor 'b': the file does not hold it losslessly"):
        truncate(tmp_path / "x.qf", tmp_path / "y.qf", Quality(lossless=True))
    nothing_at(tmp_path / "y.qf")
    with qformat.safe_open(tmp_path / "x.qf", quality="lossless") as f:
        assert f.get_tensor("a").shape == (9, 9)
        with pytest.raises(QualityError, match="tensor 'b'"):
            f.get_tensor("b")


def flipped(source: Path, target: Path, offset: int) -> None:
    data = bytearray(source.read_bytes())
    data[offset] ^= 1
    target.write_bytes(data)


def test_truncating_a_damaged_file_is_refused(whole, tmp_path):
    source, target = tmp_path / "damaged.qf", tmp_path / "x.qf"
    with ContainerReader(whole) as container:
        index = container.index
        asset = next(asset.segment for asset in index.assets)
        raw, layered = container.tensor("z.bias"), container.tensor("a.weight")
        end = container.trailer.index_offset
    places = [
        (asset.offset, "asset 'config.json'"),
        (raw.segments[0].offset, r"tensor 'z.bias', segment 'data' is damaged"),
        (layered.segments[0].offset, r"tensor 'a.weight', segment 'grid' is damaged"),
        (layered.segments[2].stop - 1, r"tensor 'a.weight', segment 'layer.2' is damaged"),
        (end + 3, "the index is damaged"),
        (9, "version|header"),
    ]
    for offset, message in places:
        flipped(whole, source, offset)
        with pytest.raises(FormatError, match=message):
            truncate(source, target, Quality(bits=3))
        nothing_at(target)
    # what is left out may be damaged
    flipped(whole, source, layered.segments[-1].offset)
    truncate(source, target, Quality(bits=3))
    truncate(whole, tmp_path / "y.qf", Quality(bits=3))
    assert target.read_bytes() == (tmp_path / "y.qf").read_bytes()
    for size in (0, 10, 200, len(whole.read_bytes()) - 1):
        source.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(FormatError):
            truncate(source, tmp_path / "z.qf", Quality(bits=3))
        nothing_at(tmp_path / "z.qf")


def test_truncating_a_file_with_unknown_parameters_is_refused(whole, tmp_path):
    """Keys that nobody knows here are either kept or refused, as are tensors that need a newer version."""
    draft = Draft.of(whole.read_bytes())
    put("tensors", "a.weight", "params", {"layers": 19, "lossless": True, "new": 1})(draft)
    (tmp_path / "new.qf").write_bytes(draft.pack())
    with pytest.raises(FormatError, match=r"tensor 'a.weight': codec scm: parameter 'new' is unknown"):
        truncate(tmp_path / "new.qf", tmp_path / "x.qf", Quality(bits=3))
    nothing_at(tmp_path / "x.qf")


# ---- file objects


class Counting(io.RawIOBase):
    """Bytes that note which of them are read."""

    def __init__(self, data: bytes, *, most: int | None = None, end: int | None = None) -> None:
        self.data, self.most, self.end = data, most, len(data) if end is None else end
        self.at = 0
        self.spans: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: len(self.data)}[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = len(view) if self.most is None else min(len(view), self.most)
        part = self.data[self.at : min(self.end, self.at + wanted)]
        view[: len(part)] = part
        self.spans.append((self.at, self.at + len(part)))
        self.at += len(part)
        return len(part)

    @property
    def touched(self) -> np.ndarray:
        found = np.zeros(len(self.data), bool)
        for start, stop in self.spans:
            found[start:stop] = True
        return found


def read_all(source: Any, quality: Any = None) -> dict[str, tuple[Any, ...]]:
    with qformat.safe_open(source, quality=quality) as f:
        assets = {name: f.get_asset(name) for name in f.assets()}
        assert assets == ASSETS
        arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def test_only_the_needed_ranges_of_a_file_object_are_read(whole):
    file = Counting(whole.read_bytes())
    with ContainerReader(whole) as container:
        index = (container.trailer.index_offset, len(file.data))
        with qformat.safe_open(file, quality=2) as f:
            after_opening = file.touched
            assert not after_opening[64 : index[0]].any()
            assert after_opening[:64].all()
            assert after_opening[index[0] :].all()
            for name in f.keys():  # noqa: SIM118
                before = len(file.spans)
                f.get_tensor(name)
                needed = Quality(bits=2).of(container.tensor(name)).segments
                start, stop = needed[0].offset, needed[-1].stop
                for span in file.spans[before:]:
                    assert start <= span[0] <= span[1] <= stop
                assert len(file.spans) - before <= 2  # segments follow each other, so one range will do
                assert all(file.touched[s.offset : s.stop].all() for s in needed)
    assert file.touched.sum() < 0.12 * len(file.data)
    assert not file.closed


@pytest.mark.parametrize("quality", [2, 3.5, "max_rmse=0.01", "lossless", None])
def test_file_objects_read_like_the_path(quality, whole, tmp_path):
    data = whole.read_bytes()
    expected = read_all(whole, quality)
    for source in (io.BytesIO(data), Counting(data), Counting(data, most=1000), io.BufferedReader(Counting(data))):
        assert read_all(source, quality) == expected
        assert not source.closed
    with whole.open("rb") as file:
        file.seek(77)
        assert read_all(file, quality) == expected
        assert not file.closed
    for mode in ("rb", "r+b"):
        with (tmp_path / "copy.qf").open("wb") as file:
            file.write(data)
        with (tmp_path / "copy.qf").open(mode, buffering=0) as raw:
            assert read_all(raw, quality) == expected
    assert read_all(str(whole), quality) == expected


def test_rows_and_metadata_are_read_from_file_objects(whole):
    file = io.BytesIO(whole.read_bytes())
    with qformat.safe_open(file, quality=3) as f, qformat.safe_open(whole, quality=3) as g:
        assert f.root == g.root
        assert f.metadata == METADATA
        assert f.info("a.weight") == g.info("a.weight")
        for name in ("a.weight", "m.long", "z.q4", "z.raw"):
            assert f.get_rows(name, [1, 0]).tobytes() == g.get_rows(name, [1, 0]).tobytes()
        assert f.get_tensor("z.bias", copy=False).tobytes() == OTHERS["z.bias"].data.tobytes()
        with pytest.raises(KeyError):
            f.get_tensor("nothing")


def test_fsspec_files_are_read(whole):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.pipe("/models/whole.qf", whole.read_bytes())
    try:
        with fs.open("/models/whole.qf", "rb") as file:
            assert read_all(file, 3) == read_all(whole, 3)
            assert {n: t.shape for n, t in load_file(file, quality=2).items()}["a.weight"] == (120, 90)
            assert not file.closed
        fs.pipe("/models/short.qf", whole.read_bytes()[:-1])
        with fs.open("/models/short.qf", "rb") as file, pytest.raises(FormatError, match=r"short\.qf"):
            qformat.safe_open(file)
    finally:
        fs.rm("/models", recursive=True)


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_reads_of_file_objects_are_continued(most, tmp_path):
    write(tmp_path / "x.qf", "scm", {"a": elements("f32", normal(20, 30))})
    file = Counting((tmp_path / "x.qf").read_bytes(), most=most)
    assert read_all(file, 4) == read_all(tmp_path / "x.qf", 4)
    assert max(stop - start for start, stop in file.spans) <= most


def test_file_objects_that_end_early_are_refused(whole):
    data = whole.read_bytes()
    with ContainerReader(whole) as container:
        segment = container.tensor("m.long").segments[3]
        index = container.trailer.index_offset
    for end in (0, 30, 64, index - 1, index + 5, len(data) - 1):
        file = Counting(data, end=end)
        with pytest.raises(FormatError) as caught:
            qformat.safe_open(file)
        assert "\n" not in str(caught.value)
        assert not file.closed
    for size in (0, 1, 63, 200, len(data) // 2, len(data) - 1):
        with pytest.raises(FormatError):
            qformat.safe_open(io.BytesIO(data[:size]))
    file = Counting(data)
    with qformat.safe_open(file, quality=4, verify=False) as f:
        file.end = segment.offset + 5
        assert f.get_tensor("a.weight").shape == (120, 90)
        with pytest.raises(FormatError, match="the file became shorter while it was read"):
            f.get_tensor("m.long")
        with pytest.raises(FormatError):
            f.get_rows("m.long", 0)


def test_damage_in_file_objects_is_found(whole):
    with ContainerReader(whole) as container:
        at = container.tensor("a.weight").segments[2].offset
    data = bytearray(whole.read_bytes())
    data[at] ^= 1
    with qformat.safe_open(io.BytesIO(data)) as f:
        with pytest.raises(FormatError, match=r"tensor 'a.weight', segment 'layer.2' is damaged"):
            f.get_tensor("a.weight")
        assert f.get_tensor("b.bf16").shape == (90, 130)
    with qformat.safe_open(io.BytesIO(data), quality=2) as f:
        assert f.get_tensor("a.weight").shape == (120, 90)


def test_os_errors_of_file_objects_are_passed_on(whole):
    class Broken(Counting):
        def readinto(self, buffer: Any) -> int:
            if 64 < self.at < 20_000:
                raise OSError(5, "the network is gone")
            return super().readinto(buffer)

    with qformat.safe_open(Broken(whole.read_bytes())) as f, pytest.raises(OSError, match="the network is gone"):
        f.get_tensor("a.weight")


def open_descriptors() -> set[str]:
    """Return the files that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:  # the directory's own
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_opened_files_are_closed_and_given_file_objects_stay_open(whole, tmp_path):
    path = tmp_path / "mine.qf"
    path.write_bytes(whole.read_bytes())
    with qformat.safe_open(path, quality=2) as f:
        assert str(path) in open_descriptors()
        f.get_tensor("a.weight")
    assert str(path) not in open_descriptors()
    load_file(path, quality=2)
    assert str(path) not in open_descriptors()
    truncate(path, tmp_path / "cut.qf", Quality(bits=3))
    assert str(path) not in open_descriptors()
    with pytest.raises(QualityError):
        qformat.safe_open(path, quality="best")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        qformat.safe_open(path)
    assert str(path) not in open_descriptors()
    with whole.open("rb") as file:
        with qformat.safe_open(file, quality=2) as f:
            f.get_tensor("a.weight")
        assert file.seek(0) == 0
        assert file.read(4) == b"\x89QFM"
        load_file(file)
        assert not file.closed
        with qformat.safe_open(file) as f:  # once more
            assert f.get_tensor("d.one").shape == (1,)


# ---- torch


def test_the_torch_reader_returns_tensors_at_a_quality(whole):
    for quality in (2, "3.5", "max_rmse=0.01", None, "lossless"):
        loaded = load_file(whole, quality=quality)
        with qformat.safe_open(whole, quality=quality) as f:
            assert sorted(loaded) == f.keys()
            for name, tensor in loaded.items():
                info = f.info(name)
                assert (
                    str(tensor.dtype).removeprefix("torch.")
                    == {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i64": "int64"}[info.dtype]
                )
                expected = torch.from_numpy(f.get_tensor(name)).to(tensor.dtype)
                assert torch.equal(tensor, expected), name
        with whole.open("rb") as file:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(file, quality=quality).items())
    as_double = load_file(whole, quality=2, dtype=torch.float64)["a.weight"]
    assert as_double.dtype == torch.float64
    assert torch.equal(as_double, load_file(whole, quality=2)["a.weight"].double())


def test_lossless_torch_tensors_equal_the_source(whole):
    loaded = load_file(whole, quality="lossless")
    for name, source in (model(0, big=True) | OTHERS).items():
        if name == "z.q4":
            continue
        assert loaded[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() == source.data.tobytes()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(40, 50)
        self.two = torch.nn.Linear(50, 30, dtype=torch.bfloat16)


def test_load_model_loads_a_model_at_a_quality(tmp_path):
    torch.manual_seed(0)
    source = Net()
    tensors = [
        ArrayTensor(
            name, elements("bf16" if tensor.dtype == torch.bfloat16 else "f32", tensor.detach().float().numpy())
        )
        for name, tensor in source.state_dict().items()
    ]
    convert(Checkpoint(tensors), tmp_path / "net.qf", Recipe.parse("scm"))
    errors = []
    for quality in (2, 4, 6, None):
        net = Net()
        with (tmp_path / "net.qf").open("rb") as file:
            for given in (tmp_path / "net.qf", file):
                assert load_model(net, given, quality=quality) == ([], [])
                loaded = load_file(tmp_path / "net.qf", quality=quality)
                for name, tensor in net.state_dict().items():
                    assert tensor.dtype == loaded[name].dtype
                    assert torch.equal(tensor, loaded[name])
        errors.append(float((net.one.weight - source.one.weight).detach().abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2] > errors[3] == 0
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(QualityError, match="give bits per weight"):
        load_model(net, tmp_path / "net.qf", quality="good")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_load_model_leaves_the_model_unchanged_if_the_quality_is_not_reached(tmp_path):
    torch.manual_seed(0)
    tensors = {name: tensor.detach().float().numpy() for name, tensor in Net().state_dict().items()}
    qformat.save_file(tensors, tmp_path / "net.qf", "scm:bpw=3")
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(QualityError, match="does not hold it losslessly"):
        load_model(net, tmp_path / "net.qf", quality="lossless")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_torch_reader_refuses_qualities_that_the_file_does_not_reach(tmp_path):
    tensors = {name: tensor.detach().float().numpy() for name, tensor in Net().state_dict().items()}
    qformat.save_file(tensors, tmp_path / "net.qf", "scm:bpw=3")
    for quality, message in (
        ("lossless", "does not hold it losslessly"),
        ("max_abs=1e-6", "no layer reaches max_abs=1e-06"),
    ):
        with pytest.raises(QualityError, match=rf"tensor 'one.weight': .*{message}"):
            load_file(tmp_path / "net.qf", quality=quality)
        with pytest.raises(QualityError, match=rf"tensor 'one.weight': .*{message}"):
            load_model(Net(), tmp_path / "net.qf", quality=quality)


# ---- numpy


def test_lossy_layers_are_read_as_float32_and_lossless_tensors_in_their_dtype(whole):
    for quality, lossless in ((3, False), ("max_abs=0.05", False), ("lossless", True), (None, True)):
        with qformat.safe_open(whole, quality=quality) as f:
            for name, dtype in (("a.weight", "f32"), ("b.bf16", "bf16"), ("c.f16", "f16")):
                found = f.get_tensor(name)
                assert found.dtype == (np.float16 if lossless and dtype == "f16" else np.float32)
                assert f.get_rows(name, 0).dtype == found.dtype
                for other in (np.float16, np.float32, np.float64):
                    assert f.get_tensor(name, other).dtype == other
                    np.testing.assert_array_equal(f.get_tensor(name, other), found.astype(other))
                with pytest.raises(TypeError, match="cannot be given as int32"):
                    f.get_tensor(name, np.int32)


def test_a_quality_applies_to_each_tensor_and_errors_fall_with_it(whole):
    source = model(0, big=True)["m.long"].data
    errors = []
    for bits in (1, 2, 3, 4, 5, 6, 8, 100):
        with qformat.safe_open(whole, quality=bits) as f:
            errors.append(float(np.sqrt(np.mean((f.get_tensor("m.long").astype(np.float64) - source) ** 2))))
            for name in ("a.weight", "m.long"):
                used = Quality(bits=bits).of(f.info(name))
                assert used.nbytes * 8 / used.elements <= max(bits, f.info(name).layers[0].bpw)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == errors[1] > errors[2]
    assert errors[-1] == 0
    for metric, measure in (
        ("max_rmse", lambda e: np.sqrt(np.mean(e**2))),
        ("max_abs", lambda e: np.abs(e).max()),
        ("mean_abs", lambda e: np.abs(e).mean()),
    ):
        with qformat.safe_open(whole, quality=f"{metric}=0.004") as f:
            found = measure(f.get_tensor("m.long").astype(np.float64) - source)
            assert found <= 0.004 * (float(source.max()) - float(source.min())) * (1 + 1e-9)


def test_a_quality_does_not_change_root_and_records(whole):
    with qformat.safe_open(whole, quality=2) as f, qformat.safe_open(whole) as g:
        assert f.root == g.root
        assert f.info("a.weight") == g.info("a.weight")
        assert json.dumps(f.info("a.weight").to_json()) == json.dumps(g.info("a.weight").to_json())
        assert re.fullmatch("[0-9a-f]{64}", f.root)
