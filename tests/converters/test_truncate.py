"""Files cut to a quality: the bytes of converting at that rate, and refusals."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.container.reader import ContainerReader
from qformat.converters.truncate import truncate
from qformat.errors import FormatError, QualityError, TargetError
from qformat.quality import Quality
from tests.helpers import layered
from tests.helpers.cli import nothing_at, valid
from tests.helpers.files import Draft, put


@pytest.mark.parametrize("bits", [2, 2.25, 3, 3.75, 5.5, 6, 8])
def test_truncating_to_a_rate_equals_converting_at_that_rate(bits, layered_qf, tmp_path):
    done = truncate(layered_qf, tmp_path / "cut.qf", Quality(bits=bits))
    expected = layered.write(tmp_path / "made.qf", f"scm:bpw={bits}", layered.model(0, big=True))
    assert (tmp_path / "cut.qf").read_bytes() == expected
    assert (done.before, done.after) == (layered_qf.stat().st_size, len(expected))
    with qformat.safe_open(tmp_path / "cut.qf") as f:
        assert f.root == done.root
        assert done.bpw == 8 * sum(f.info(n).nbytes for n in f.keys()) / sum(f.info(n).elements for n in f.keys())  # noqa: SIM118


@pytest.mark.parametrize("seed", [1, 2])
def test_truncating_other_models_equals_converting_at_that_rate(seed, tmp_path):
    layered.write(tmp_path / "whole.qf", "scm", layered.model(seed))
    for bits in layered.LADDER[seed::3]:
        truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=bits), overwrite=True)
        assert (tmp_path / "cut.qf").read_bytes() == layered.write(
            tmp_path / "made.qf", f"scm:bpw={bits}", layered.model(seed)
        ), bits


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (7, 9), (13, 17), (50, 60), (77, 80), (100, 257)])
def test_truncating_small_tensors_equals_converting_at_that_rate(rows, cols, tmp_path):
    rng = np.random.default_rng(rows)
    tensors = {
        "a": layered.elements("f32", rng.normal(size=(rows, cols)).astype(np.float32)),
        "b": layered.elements(
            "bf16", (rng.normal(size=(rows, cols)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)
        ),
    }
    layered.write(tmp_path / "whole.qf", "scm", tensors)
    for bits in (2, 2.5, 3.25, 4, 5.5, 7, 8):
        truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=bits), overwrite=True)
        assert (tmp_path / "cut.qf").read_bytes() == layered.write(tmp_path / "made.qf", f"scm:bpw={bits}", tensors), (
            bits
        )


def test_truncating_tensors_that_few_bits_hold_exactly_equals_converting_at_that_rate(tmp_path):
    layered.write(tmp_path / "whole.qf", "scm", layered.exact())
    truncate(tmp_path / "whole.qf", tmp_path / "cut.qf", Quality(bits=6))
    assert (tmp_path / "cut.qf").read_bytes() == layered.write(tmp_path / "made.qf", "scm:bpw=6", layered.exact())


def test_tensors_that_few_bits_hold_exactly_are_lossless_above_8_bits(tmp_path):
    layered.write(tmp_path / "whole.qf", "scm", layered.exact())
    for bits, lossless in ((6, False), (8, False), (30, True)):
        with qformat.safe_open(tmp_path / "whole.qf", quality=bits) as f:
            for name, source in layered.exact().items():
                read = f.get_tensor(name)
                assert not lossless or np.array_equal(read.astype(np.float32), source.to_f32())
                assert lossless or read.dtype == np.float32
                assert f._decoder(name).codec.lossless == lossless


def test_truncating_twice_equals_truncating_once(tmp_path):
    whole, tensors = tmp_path / "whole.qf", layered.model(4)
    for name in ("d.one", "d.two", "e.few", "k.small", "l.scalar"):  # with too few layers for a bound
        del tensors[name]
    layered.write(whole, "scm", tensors)
    first, second, third = (tmp_path / f"{name}.qf" for name in "123")
    for qualities in ((5, 3), ("max_rmse=0.005", "max_rmse=0.02"), (8, 2), (6, "max_abs=0.05"), (4, 4), (3, 6)):
        one, two = map(Quality.parse, qualities)
        truncate(whole, first, one, overwrite=True)
        truncate(first, second, two, overwrite=True)
        truncate(whole, third, Quality.parse(min(qualities, key=str)) if qualities == (3, 6) else two, overwrite=True)
        assert second.read_bytes() == third.read_bytes()
        valid(second)


def test_truncating_to_lossless_keeps_all_layers(layered_qf, tmp_path):
    for quality in ("lossless", 1000, "max_abs=0"):
        truncate(layered_qf, tmp_path / "x.qf", Quality.parse(quality), overwrite=True)
        if quality != "max_abs=0":  # some are exact before all layers
            assert (tmp_path / "x.qf").read_bytes() == layered_qf.read_bytes()
        valid(tmp_path / "x.qf")
        with qformat.safe_open(tmp_path / "x.qf") as cut, qformat.safe_open(layered_qf) as f:
            for name in f.keys():  # noqa: SIM118
                np.testing.assert_array_equal(cut.get_tensor(name), f.get_tensor(name))


def test_a_truncated_file_reads_like_the_whole_one_at_that_quality(layered_qf, tmp_path):
    for quality in (2.5, 4, "max_rmse=0.01", "mean_abs=0.003"):
        target = tmp_path / "x.qf"
        truncate(layered_qf, target, Quality.parse(quality), overwrite=True)
        valid(target)
        with qformat.safe_open(target) as cut, qformat.safe_open(layered_qf, quality=quality) as f:
            assert cut.keys() == f.keys()
            assert cut.metadata == f.metadata == layered.METADATA
            assert cut.assets() == f.assets() == sorted(layered.ASSETS)
            assert {name: cut.get_asset(name) for name in layered.ASSETS} == layered.ASSETS
            for name in f.keys():  # noqa: SIM118
                found, expected = cut.get_tensor(name), f.get_tensor(name)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.tobytes() == expected.tobytes()
                if name in layered.OTHERS:
                    assert [(s.name, s.sha256) for s in cut.info(name).segments] == [
                        (s.name, s.sha256) for s in f.info(name).segments
                    ]
                    assert cut.info(name).params == f.info(name).params
                else:
                    assert cut.info(name).range == f.info(name).range
                    assert cut.info(name).nbytes <= f.info(name).nbytes
        assert target.stat().st_size < layered_qf.stat().st_size / 2


# ---- refusals


def test_truncating_into_the_source_or_an_existing_file_is_refused(layered_qf, tmp_path):
    source = tmp_path / "s.qf"
    source.write_bytes(layered_qf.read_bytes())
    (tmp_path / "link.qf").symlink_to(source)
    os.link(source, tmp_path / "hard.qf")
    for name in ("s.qf", "link.qf", "hard.qf"):
        with pytest.raises(TargetError) as caught:
            truncate(source, tmp_path / name, Quality(bits=3), overwrite=True)
        assert "is a file of the checkpoint that is to be read, or a part of it; give another name" in str(caught.value)
        assert source.read_bytes() == layered_qf.read_bytes()
    (tmp_path / "there.qf").write_bytes(b"precious")
    with pytest.raises(TargetError, match="exists"):
        truncate(source, tmp_path / "there.qf", Quality(bits=3))
    assert (tmp_path / "there.qf").read_bytes() == b"precious"
    with pytest.raises(TargetError):
        truncate(source, tmp_path / "no" / "such" / "folder.qf", Quality(bits=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.qf", "link.qf", "s.qf", "there.qf"]


def test_truncating_files_that_do_not_reach_the_quality_is_refused(layered_qf, tmp_path):
    target = tmp_path / "x.qf"
    qformat.save_file({"w": layered.normal(4, 64), "b": layered.normal(3)}, tmp_path / "q4_0.qf", "q4_0")
    layered.write(tmp_path / "lossy.qf", "scm:bpw=4", {"a": layered.elements("f32", layered.normal(50, 60))})
    rate = r"(3\.9\d|4\.00) bits/weight"
    cases = [
        ("q4_0.qf", "3", r"q4_0.qf: holds no layered tensors \(type scm\)"),
        ("q4_0.qf", "lossless", "holds no layered tensors"),
        ("lossy.qf", "lossless", rf"tensor 'a': the file does not hold it losslessly; its last layer has {rate}"),
        ("lossy.qf", "max_abs=0.0001", rf"tensor 'a': no layer reaches max_abs=0.0001; the file holds it at {rate}"),
    ]
    for name, quality, message in cases:
        with pytest.raises(QualityError, match=message) as caught:
            truncate(tmp_path / name, target, Quality.parse(quality))
        assert "\n" not in str(caught.value)
        nothing_at(target)
    # a refused run leaves the old file
    target.write_bytes(b"old")
    with pytest.raises(QualityError):
        truncate(tmp_path / "lossy.qf", target, Quality.parse("lossless"), overwrite=True)
    assert target.read_bytes() == b"old"
    truncate(tmp_path / "lossy.qf", target, Quality.parse("3"), overwrite=True)
    valid(target)


def test_the_tensor_that_is_not_lossless_is_named(tmp_path):
    layered.write(
        tmp_path / "x.qf",
        "scm",
        {"a": layered.elements("f32", layered.normal(9, 9)), "b": layered.elements("f32", layered.normal(40, 50))},
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


def test_truncating_a_damaged_file_is_refused(layered_qf, tmp_path):
    source, target = tmp_path / "damaged.qf", tmp_path / "x.qf"
    with ContainerReader(layered_qf) as container:
        index = container.index
        asset = next(asset.segment for asset in index.assets)
        raw, scm = container.tensor("z.bias"), container.tensor("a.weight")
        end = container.trailer.index_offset
    places = [
        (asset.offset, "asset 'config.json'"),
        (raw.segments[0].offset, r"tensor 'z.bias', segment 'data' is damaged"),
        (scm.segments[0].offset, r"tensor 'a.weight', segment 'grid' is damaged"),
        (scm.segments[2].stop - 1, r"tensor 'a.weight', segment 'layer.2' is damaged"),
        (end + 3, "the index is damaged"),
        (9, "version|header"),
    ]
    for offset, message in places:
        flipped(layered_qf, source, offset)
        with pytest.raises(FormatError, match=message):
            truncate(source, target, Quality(bits=3))
        nothing_at(target)
    # damage in layers that are left out does not matter
    flipped(layered_qf, source, scm.segments[-1].offset)
    truncate(source, target, Quality(bits=3))
    truncate(layered_qf, tmp_path / "y.qf", Quality(bits=3))
    assert target.read_bytes() == (tmp_path / "y.qf").read_bytes()
    for size in (0, 10, 200, len(layered_qf.read_bytes()) - 1):
        source.write_bytes(layered_qf.read_bytes()[:size])
        with pytest.raises(FormatError):
            truncate(source, tmp_path / "z.qf", Quality(bits=3))
        nothing_at(tmp_path / "z.qf")


def test_truncating_a_file_with_unknown_parameters_is_refused(layered_qf, tmp_path):
    """Keys that nobody knows here are either kept or refused, as are tensors that need a newer version."""
    draft = Draft.of(layered_qf.read_bytes())
    put("tensors", "a.weight", "params", {"layers": 19, "lossless": True, "new": 1})(draft)
    (tmp_path / "new.qf").write_bytes(draft.pack())
    with pytest.raises(FormatError, match=r"tensor 'a.weight': codec scm: parameter 'new' is unknown"):
        truncate(tmp_path / "new.qf", tmp_path / "x.qf", Quality(bits=3))
    nothing_at(tmp_path / "x.qf")
