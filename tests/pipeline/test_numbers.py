"""What a type for all tensors leaves alone: numbers that are not weights, and tensors that it would make larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.codecs.registry import parse_type
from qformat.converters.arrays import ArrayTensor
from qformat.dtypes import from_array
from qformat.pipeline.numbers import unlike_weights
from tests.helpers.cli import run_cli

NOISE = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
MASK = np.triu(np.ones((64, 64), np.float32), 1)


@pytest.mark.parametrize(
    ("array", "type_", "because"),
    [
        (NOISE, "q4_0", ""),
        (NOISE[:1], "q4_0", ""),
        (np.arange(77, dtype=np.float16)[None], "q4_0", "whole numbers only"),
        (np.tril(np.ones((1, 1, 64, 64), np.float32)), "q8_0", "whole numbers only"),
        (np.arange(77, dtype=np.float32)[None], "f16", "whole numbers only"),
        (np.arange(77, dtype=np.float32)[None], "f64", ""),  # which changes nothing
        (np.append(np.zeros(5000), 0.5).astype(np.float32)[None], "q4_0", ""),
        (np.full((1, 64), np.nan, np.float32), "q4_0", ""),
        (MASK * -1e4, "q4_0", "a mask"),
        (np.where(MASK > 0, -np.inf, 0).astype(np.float32), "q4_0", "a mask"),
        (np.where(MASK > 0, np.finfo(np.float32).min, 0), "bf16", "a mask"),
        (np.sign(NOISE), "ternary", ""),  # ternary weights
        (np.zeros((64, 64), np.float32), "q4_0", ""),
        (NOISE[:, :4].astype(np.float16), "q4_0", "it would be larger"),
        (NOISE[:, :4].astype(np.float16), "f32", ""),  # as is said
        (NOISE[:, :9].astype(np.float16), "q4_0", ""),
        (np.empty((0, 4), np.float32), "q4_0", ""),
    ],
)
def test_numbers_that_are_not_weights_are_recognized(array: Any, type_: str, because: str) -> None:
    assert unlike_weights(ArrayTensor("x", from_array(array)), parse_type(type_)) == because


def test_few_elements_of_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = ArrayTensor("x", from_array(np.ones((1, 1 << 20), np.float32) * 0.5))
    counts = []
    read = tensor.read
    monkeypatch.setattr(tensor, "read", lambda part: counts.append(part.stop - part.start) or read(part))
    assert not unlike_weights(tensor, parse_type("q4_0"))
    assert sum(counts) == 128


def test_numbers_that_are_not_weights_are_kept_and_said_in_one_line(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "position_ids": np.arange(77, dtype=np.float16)[None],
        "more_ids": np.arange(77, dtype=np.float16)[None],
        "lora_up": NOISE[:, :4].astype(np.float16),
        "weight": NOISE,
    }
    save_file(tensors, tmp_path / "m.safetensors")
    result = run_cli("convert", tmp_path / "m.safetensors", tmp_path / "m.qf")
    assert result.err == (
        "Warning: kept as in the source, unless --tensor-type names it: tensor 'lora_up' (it would be larger), 'more_ids' and 1 "
        "more (whole numbers only)\n"
    )
    with qformat.safe_open(tmp_path / "m.qf") as file:
        codecs = {name: file.info(name).codec for name in file.keys()}  # noqa: SIM118  not a dict
        assert codecs == {"lora_up": "f16", "more_ids": "f16", "position_ids": "f16", "weight": "q4_0"}
        assert np.array_equal(file.get_tensor("position_ids"), tensors["position_ids"])
    named = run_cli("convert", tmp_path / "m.safetensors", tmp_path / "n.qf", "--tensor-type", "*_ids=q8_0")
    assert named.code == 0
    with qformat.safe_open(tmp_path / "n.qf") as file:
        assert file.info("position_ids").codec == "q8_0"
