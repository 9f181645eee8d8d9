"""Tensors that are quantized already: their codes are taken as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qformat import safe_open
from qformat.codecs.affine import Affine
from qformat.codecs.registry import parse_type
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.request import Request
from qformat.dtypes import from_array
from qformat.errors import SourceError
from qformat.kernels import load
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import TensorRecord, type_string
from tests.helpers.quantized import Codes


def affine(rows: int, cols: int, group: int, bits: int = 4, *, sym: bool = False, seed: int = 0) -> tuple[Codes, Any]:
    """Return a tensor whose columns are in groups in no order, and its values."""
    rng = np.random.default_rng(seed)
    count = -(-cols // group)
    places = rng.permutation(np.arange(cols) // group).astype("<u4")
    scales = rng.normal(size=(rows, count)).astype(np.float16)
    zeros = np.full((rows, count), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (rows, count))
    codes = rng.integers(0, 1 << bits, (rows, cols))
    filled = np.pad(codes, ((0, 0), (0, -cols % 32))).astype(np.uint8)
    packed = np.zeros(filled.size * bits // 8, np.uint8)
    load("packing").pack(filled.reshape(-1), packed, bits)
    codec = Affine(bits, group, sym, "f16", act_order=True)
    own = () if sym else (zeros.astype(np.uint8).tobytes(),)
    values = scales.astype(np.float32)[:, places] * (codes - zeros[:, places]).astype(np.float32)
    return Codes("w", (rows, cols), codec, (scales.tobytes(), *own, places.tobytes(), packed.tobytes())), values


def kind(record: TensorRecord) -> str:
    return type_string(record.codec, record.params)


def store(tensors: list[Any], path: Any, type_: str | None = None) -> Any:
    convert(Checkpoint(tensors), path, Recipe.parse(type_), overwrite=True)
    return path


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("cols", "group"), [(96, 32), (70, 17), (33, 64), (5, 1)])
def test_affine_codes_with_groups_in_any_order_are_copied(tmp_path, bits, sym, cols, group):
    tensor, values = affine(7, cols, group, bits, sym=sym)
    with safe_open(store([tensor], tmp_path / "a.qf")) as file:
        info = file.info("w")
        assert np.array_equal(file.get_tensor("w"), values)
        assert np.array_equal(file.get_rows("w", [5, 2, 3]), values[[5, 2, 3]])
    assert kind(info) == f"affine:act_order=true,bits={bits},group={group},scale=f16,sym={str(sym).lower()}"
    assert (info.error.rmse, info.error.maximum) == (0, 0)


def test_affine_codes_of_several_chunks_are_copied(tmp_path):
    for rows, cols in ((3000, 512), (2, 600_001)):
        tensor, values = affine(rows, cols, 128)
        with safe_open(store([tensor], tmp_path / "a.qf")) as file:
            assert np.array_equal(file.get_tensor("w"), values)


def test_affine_kernels_for_groups_in_any_order_give_identical_results():
    tensor, values = affine(9, 70, 12, 3)
    scales, zeros, places, codes = tensor.segments
    where = np.frombuffer(zeros, np.uint8), np.frombuffer(places, "<u4"), np.frombuffer(codes, np.uint8)
    for family in ("numba", "numpy"):
        out = np.empty((9, 70), np.float32)
        kernels = __import__(f"qformat.kernels.{family}.affine", fromlist=["x"])
        kernels.dequantize_mapped(np.frombuffer(scales, np.float16).astype(np.float32), *where, out, 3)
        assert np.array_equal(out, values)


@pytest.mark.parametrize("id_", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "affine", "nlm", "lut"])
def test_segments_of_every_unchunked_codec_are_copied(tmp_path, id_):
    values = np.random.default_rng(1).normal(size=(11, 128)).astype(np.float32)
    first = store([ArrayTensor("w", from_array(values))], tmp_path / "first.qf", id_)
    with safe_open(first) as file:
        record = file.info("w")
        decoded = file.get_tensor("w")
    data = first.read_bytes()
    segments = tuple(data[s.offset : s.stop] for s in _segments(first))
    tensor = Codes("w", (11, 128), parse_type(kind(record)), segments)
    for wanted in (None, kind(record)):
        again = store([tensor], tmp_path / "again.qf", wanted)
        copied = again.read_bytes()
        assert tuple(copied[s.offset : s.stop] for s in _segments(again)) == segments
        with safe_open(again) as file:
            assert np.array_equal(file.get_tensor("w"), decoded)
            assert file.info("w").error.rmse == 0


def _segments(path: Any) -> Any:
    from qformat.container.reader import ContainerReader

    with ContainerReader(path) as container:
        return container.tensors[0].segments


def test_quantized_tensors_convert_to_another_type_by_value(tmp_path):
    tensor, values = affine(8, 64, 32)
    with safe_open(store([tensor], tmp_path / "a.qf", "q8_0")) as file:
        assert kind(file.info("w")).startswith("q8_0")
        assert 0 < np.abs(file.get_tensor("w") - values).max() < 0.1
    with safe_open(store([tensor], tmp_path / "a.qf", "f32")) as file:
        assert np.array_equal(file.get_tensor("w"), values)


def test_quantized_tensors_that_decode_to_infinity_are_refused(tmp_path):
    tensor, _ = affine(4, 64, 32)
    scales = np.full((4, 2), np.inf, np.float16).tobytes()
    broken = Codes("w", tensor.shape, tensor.codec, (scales, *tensor.segments[1:]))
    with pytest.raises(SourceError, match="holds NaN or infinity"):
        store([broken], tmp_path / "a.qf")


def test_quantized_tensors_naming_a_missing_group_are_refused(tmp_path):
    tensor, _ = affine(4, 64, 32)
    scales, zeros, _, codes = tensor.segments
    places = np.full(64, 2, "<u4").tobytes()
    with pytest.raises(SourceError, match="a column is in group 2 of 2"):
        store([Codes("w", tensor.shape, tensor.codec, (scales, zeros, places, codes))], tmp_path / "a.qf")
    assert not (tmp_path / "a.qf").exists()


@pytest.mark.parametrize(
    "type_", ["q4_0", "q4_1:coded=true", "affine:sym=false", "nlm", "ternary", "levels", "lossless", "scm", "bf16"]
)
def test_a_container_without_a_type_is_copied_byte_for_byte(tmp_path, type_):
    values = np.random.default_rng(4).normal(size=(300, 96)).astype(np.float32)
    first, again = tmp_path / "first.qf", tmp_path / "again.qf"
    convert(Checkpoint([ArrayTensor(name, from_array(values)) for name in ("v", "w")]), first, Recipe.parse(type_))
    checkpoint, recipe = Request(str(first)).open()
    assert bool(checkpoint.warnings) == (type_ == "bf16")
    size = convert(checkpoint, again, recipe, dry_run=True).nbytes
    convert(checkpoint, again, recipe)
    assert again.stat().st_size == size
    if type_ == "bf16":  # floats, which are stored as the default type
        assert again.stat().st_size < first.stat().st_size
    else:
        assert again.read_bytes() == first.read_bytes()


def test_a_container_cut_into_shards_joins_to_the_same_bytes(tmp_path):
    values = np.random.default_rng(4).normal(size=(300, 96)).astype(np.float32)
    first, cut, joined = (tmp_path / f"{name}.qf" for name in ("first", "cut", "joined"))
    convert(Checkpoint([ArrayTensor(name, from_array(values)) for name in "abc"]), first, Recipe.parse("scm:bpw=3"))
    for source, output, size in ((first, cut, 12_000), (cut, joined, None)):
        checkpoint, recipe = Request(str(source)).open()
        convert(checkpoint, output, recipe, shard_size=size)
    assert len(list(tmp_path.glob("cut-*"))) == 3
    assert joined.read_bytes() == first.read_bytes()


def test_encoder_options_of_the_same_type_requantize_a_container(tmp_path):
    values = np.random.default_rng(4).normal(size=(300, 96)).astype(np.float32)
    path, sparse = tmp_path / "a.qf", tmp_path / "b.qf"
    convert(Checkpoint([ArrayTensor("w", from_array(values))]), path, Recipe.parse("ternary"))
    checkpoint, recipe = Request(str(path), type="ternary:sparsity=0.9").open()
    convert(checkpoint, sparse, recipe, allow_zeroed=True)
    with safe_open(sparse) as file:
        assert (file.get_tensor("w") == 0).mean() >= 0.9
