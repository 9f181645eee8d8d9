"""Qualities, the layers they select, and reading tensors at a quality."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.errors import QualityError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.quality import Quality
from qformat.readers.torch import load_file, load_model
from qformat.records import Layer, MeasuredError, Segment, TensorRecord
from tests.helpers.layered import OTHERS, elements, model

# ---- parsing


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


# ---- records


def record(*layers: tuple[int, float, float, float], lossless: int = 0, spread: float = 2.0) -> TensorRecord:
    """Return the record of 80 weights; each layer is given as bytes, rmse, largest and mean error, `lossless` as bytes."""
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
    ("qualities", "expected"),
    [  # the first layer is read even if it has more than the 1.9 bits per weight
        ([2, 2.99, 1.9, 1e-9, "max_rmse=0.5", "max_rmse=0.2", "mean_abs=0.15"], (1, False)),
        ([3, 4.9, "max_rmse=0.1999", "max_rmse=0.1", "max_abs=0.3"], (2, False)),
        (["5", 24.9, "max_abs=0.05", "mean_abs=0.03"], (3, False)),
        ([None, 25, 1000, "max_abs=0.049", "mean_abs=0", "lossless"], (3, True)),
    ],
)
def test_a_quality_selects_the_fewest_layers(qualities, expected):
    for quality in qualities:
        assert count_of(quality, record(*THREE, lossless=200)) == expected, quality


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
    """An error of 0 meets any bound; others meet none, so that all layers are read."""
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


# ---- numpy


def test_lossy_layers_are_read_as_float32_and_lossless_tensors_in_their_dtype(layered_qf):
    for quality, lossless in ((3, False), ("max_abs=0.05", False), ("lossless", True), (None, True)):
        with qformat.safe_open(layered_qf, quality=quality) as f:
            for name, dtype in (("a.weight", "f32"), ("b.bf16", "bf16"), ("c.f16", "f16")):
                found = f.get_tensor(name)
                assert found.dtype == (np.float16 if lossless and dtype == "f16" else np.float32)
                assert f.get_rows(name, 0).dtype == found.dtype
                for other in (np.float16, np.float32, np.float64):
                    assert f.get_tensor(name, other).dtype == other
                    np.testing.assert_array_equal(f.get_tensor(name, other), found.astype(other))
                with pytest.raises(TypeError, match="cannot be given as int32"):
                    f.get_tensor(name, np.int32)


def test_a_quality_applies_to_each_tensor_and_errors_fall_with_it(layered_qf):
    source = model(0, big=True)["m.long"].data
    errors = []
    for bits in (1, 2, 3, 4, 5, 6, 8, 100):
        with qformat.safe_open(layered_qf, quality=bits) as f:
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
        with qformat.safe_open(layered_qf, quality=f"{metric}=0.004") as f:
            found = measure(f.get_tensor("m.long").astype(np.float64) - source)
            assert found <= 0.004 * (float(source.max()) - float(source.min())) * (1 + 1e-9)


def test_a_quality_does_not_change_root_and_records(layered_qf):
    with qformat.safe_open(layered_qf, quality=2) as f, qformat.safe_open(layered_qf) as g:
        assert f.root == g.root
        assert f.info("a.weight") == g.info("a.weight")
        assert json.dumps(f.info("a.weight").to_json()) == json.dumps(g.info("a.weight").to_json())
        assert re.fullmatch("[0-9a-f]{64}", f.root)


# ---- torch


def test_the_torch_reader_returns_tensors_at_a_quality(layered_qf):
    for quality in (2, "3.5", "max_rmse=0.01", None, "lossless"):
        loaded = load_file(layered_qf, quality=quality)
        with qformat.safe_open(layered_qf, quality=quality) as f:
            assert sorted(loaded) == f.keys()
            for name, tensor in loaded.items():
                info = f.info(name)
                assert (
                    str(tensor.dtype).removeprefix("torch.")
                    == {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i64": "int64"}[info.dtype]
                )
                expected = torch.from_numpy(f.get_tensor(name)).to(tensor.dtype)
                assert torch.equal(tensor, expected), name
        with layered_qf.open("rb") as file:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(file, quality=quality).items())
    as_double = load_file(layered_qf, quality=2, dtype=torch.float64)["a.weight"]
    assert as_double.dtype == torch.float64
    assert torch.equal(as_double, load_file(layered_qf, quality=2)["a.weight"].double())


def test_lossless_torch_tensors_equal_the_source(layered_qf):
    loaded = load_file(layered_qf, quality="lossless")
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
    refused_without_changes(tmp_path / "net.qf", "good", "give bits per weight")


def refused_without_changes(path: Path, quality: Any, message: str) -> None:
    """Assert that load_model refuses a quality and leaves the model as it was."""
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(QualityError, match=message):
        load_model(net, path, quality=quality)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_torch_readers_refuse_qualities_that_the_file_does_not_reach(tmp_path):
    tensors = {name: tensor.detach().float().numpy() for name, tensor in Net().state_dict().items()}
    qformat.save_file(tensors, tmp_path / "net.qf", "scm:bpw=3")
    for quality, message in (
        ("lossless", "does not hold it losslessly"),
        ("max_abs=1e-6", "no layer reaches max_abs=1e-06"),
    ):
        with pytest.raises(QualityError, match=rf"tensor 'one.weight': .*{message}"):
            load_file(tmp_path / "net.qf", quality=quality)
        refused_without_changes(tmp_path / "net.qf", quality, f"tensor 'one.weight': .*{message}")
