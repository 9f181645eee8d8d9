"""Dtypes of safetensors files that have no numbers here: their bytes are stored, and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformat import safe_open
from qformat.converters.sources.safetensors import opaque_entries
from tests.helpers.cli import invoke


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """Write a safetensors file in the order of the library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensors(**others: tuple[str, list[int], bytes]) -> dict[str, tuple[str, list[int], bytes]]:
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype("<f4")
    return {"w": ("F32", [32, 32], weight.tobytes()), **others}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_tensors_of_dtypes_without_numbers_are_stored_as_bytes_and_come_back(tmp_path, dtype):
    count = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}.get(dtype, 8)
    source = write(tmp_path / "a.safetensors", tensors(x=(dtype, [2, 8], bytes(range(2 * count)))))
    output = invoke("convert", source, tmp_path / "a.qf").stderr
    assert f"a.safetensors: tensor 'x': of dtype {dtype}, whose numbers are not known here; stored as bytes" in output
    with safe_open(tmp_path / "a.qf") as file:
        assert (file.info("x").codec, file.info("w").codec) == ("u8", "f32")
        assert file.get_tensor("x").tolist() == np.arange(2 * count).reshape(2, count).tolist()
    invoke("export", tmp_path / "a.qf", tmp_path / "b.safetensors", "--to", "safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()
    message = invoke("convert", source, tmp_path / "b.qf", "-t", "q4_0", code=1).stderr
    assert f"tensor 'x' is of dtype {dtype}, which is stored as bytes: it can only stay as it is" in message
    invoke("convert", source, tmp_path / "b.qf", "--tensor-type", "w=q4_0")
    with safe_open(tmp_path / "b.qf") as file:
        assert (file.info("x").codec, file.info("w").codec) == ("u8", "q4_0")


def test_complex_numbers_are_stored_as_bytes_beside_quantized_weights(tmp_path):
    numbers = (np.arange(8) + 1j).astype("<c8")
    source = write(tmp_path / "a.safetensors", {"freqs": ("C64", [2, 4], numbers.tobytes()), **tensors()})
    invoke("convert", source, tmp_path / "a.qf")
    with safe_open(tmp_path / "a.qf") as file:
        assert (file.info("freqs").codec, file.info("w").codec) == ("u8", "q4_0")
        assert file.get_tensor("freqs").view("<c8").tolist() == numbers.reshape(2, 4).tolist()


def test_exponents_are_numbers(tmp_path):
    source = write(tmp_path / "a.safetensors", tensors(x=("F8_E8M0", [4], bytes([0, 126, 127, 254]))))
    invoke("convert", source, tmp_path / "a.qf")
    with safe_open(tmp_path / "a.qf") as file:
        assert (file.info("x").dtype, file.info("x").codec) == ("f8_e8m0", "f8_e8m0")
        assert file.get_tensor("x").tolist() == [2.0**-127, 0.5, 1.0, 2.0**127]
    invoke("export", tmp_path / "a.qf", tmp_path / "b.safetensors", "--to", "safetensors")
    assert b'"F8_E8M0"' in (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "[", '["F4"]', '["F4",3]', '["F32",[1]]', '["F4",[-1]]', '["F4",[true]]', "[" * 99999]
)
def test_statements_of_dtypes_that_are_damaged_are_ignored(text):
    assert opaque_entries({"safetensors.dtype.x": text, "other": "[]"}) == {}
