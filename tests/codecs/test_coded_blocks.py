"""``coded=true``: the same blocks in fewer bytes; and properties that chunked tensors of all types share."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import qformat
from qformat.codecs.layout import Chunk
from qformat.codecs.registry import codec_of, parse_type
from qformat.dtypes import F32, from_array
from qformat.errors import FormatError
from qformat.readers.torch import load_file
from tests.helpers.cli import invoke
from tests.helpers.codecs import chunks_of, encode, segment_lengths
from tests.helpers.files import Draft, segment
from tests.helpers.hostile import bounded_memory, compare_readers
from tests.helpers.kernels import FAMILIES, every_family, using

BLOCKS = ("q4_0", "q4_0:search=exact", "q4_1", "q5_0", "q5_1", "q8_0", "nlm", "nlm:block=64", "nlm:block=128")
CHUNKED = ("q4_0:coded=true", "q5_1:coded=true", "ternary:scale=tensor", "levels:n=7,scale=group,group=64", "lossless")
SHAPES = {
    "a": (40, 96),
    "odd": (7, 341),
    "vector": (50,),
    "one": (1, 1),
    "none": (0, 64),
    "long": (2, 600_000),
    "deep": (8, 5, 3),
}
every_block = pytest.mark.parametrize("type_", BLOCKS)
every_chunked = pytest.mark.parametrize("type_", CHUNKED)


def coded(type_: str) -> str:
    return f"{type_}{',' if ':' in type_ else ':'}coded=true"


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A small file of each chunked type."""
    folder = tmp_path_factory.mktemp("chunked")
    found = {}
    for number, type_ in enumerate(CHUNKED):
        path = folder / f"{number}.qf"
        some = {name: array for name, array in tensors().items() if name in ("a", "odd", "none")}
        some["two"] = np.sign(np.arange(600_001) % 1000).astype(np.float32)  # two chunks of few bytes
        qformat.save_file(some, path, {"*": type_})
        found[type_] = path.read_bytes()
    return found


@every_block
def test_entropy_coded_blocks_decode_to_the_uncoded_ones(type_, tmp_path):
    paths = [tmp_path / "uncoded.qf", tmp_path / "coded.qf"]
    for path, chosen in zip(paths, (type_, coded(type_)), strict=True):
        qformat.save_file(tensors(), path, {"*": chosen})
    with qformat.safe_open(paths[0]) as uncoded, qformat.safe_open(paths[1]) as small:
        for name, shape in SHAPES.items():
            info, other = uncoded.info(name), small.info(name)
            assert (info.codec, info.encoder, info.error) == (other.codec, other.encoder, other.error)
            assert other.params == {**info.params, "coded": True}
            np.testing.assert_array_equal(uncoded.get_tensor(name), small.get_tensor(name))
            if len(shape) > 1 and shape[0]:
                rows = [shape[0] - 1, 0]
                np.testing.assert_array_equal(small.get_rows(name, rows), uncoded.get_tensor(name)[rows])
        assert small.info("long").nbytes < uncoded.info("long").nbytes
    state = [load_file(path) for path in paths]
    assert all((state[0][name] == state[1][name]).all() for name in SHAPES)


@every_block
def test_entropy_coded_blocks_have_the_histograms_of_the_uncoded_ones(type_):
    array = from_array(np.random.default_rng(1).normal(size=(50, 100)).astype(np.float32))
    counts = []
    for codec in (parse_type(type_), parse_type(coded(type_))):
        encoded = encode(codec, array)
        assert (encoded.entropy > 0) == ("lengths" in segment_lengths(codec, (50, 100)))
        counts.append(codec.histograms(encoded.parts, Chunk(0, 50, 0, 100)))
    assert counts[0].keys() == counts[1].keys()
    for name in counts[0]:
        np.testing.assert_array_equal(counts[0][name], counts[1][name])


def test_entropy_coded_minilm_takes_less_than_one_percent_above_its_entropy(minilm):
    types = ("-tq4_0:search=naive,coded=true", "-tq4_1:search=naive,coded=true", "-tq8_0:coded=true", "-tq4_0")
    found = invoke("quantize-stats", minilm, "--include", "layer.0", "--json", "-", *types)
    totals = {total["type"]: total for total in json.loads(found.stdout)["totals"]}
    for type_, most in (("q4_0", 4.2), ("q4_1", 4.6), ("q8_0", 8.1)):
        total = next(total for name, total in totals.items() if name.startswith(type_) and total["entropy"])
        assert total["entropy"] < total["bpw"] < 1.01 * total["entropy"]
        assert total["bpw"] < most
    assert totals["q4_0"]["entropy"] is None


# ---- records


@pytest.mark.parametrize("value", [False, 1, "true", None])
def test_coded_is_true_in_a_record_or_absent(value, tmp_path):
    qformat.save_file({"x": np.ones((2, 32), np.float32)}, tmp_path / "x.qf", "q4_0:coded=true")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        record = f.info("x")
    assert "lengths" in segment_lengths(codec_of(record), (2, 32))
    with pytest.raises(FormatError, match="coded has an impossible value"):
        codec_of(replace(record, params={"coded": value}))
    with pytest.raises(FormatError, match="needs segments"):
        codec_of(replace(record, params={}))
    qformat.save_file({"x": np.ones((2, 32), np.float32)}, tmp_path / "y.qf", "q4_0:coded=false")
    with qformat.safe_open(tmp_path / "y.qf") as f:
        assert f.info("x").params == {}


@every_chunked
def test_a_small_file_claiming_large_chunked_tensors_is_refused_in_little_memory(type_, tmp_path):
    codec = parse_type(type_)
    shape = (500_000, 256)
    lengths = segment_lengths(codec, shape)
    content = {name: bytes(length if length is not None else 1000) for name, length in lengths.items()}
    record = {
        "name": "x",
        "shape": list(shape),
        "dtype": "f32",
        "codec": codec.id,
        "params": dict(codec.params()),
        "segments": [segment(name, data) for name, data in content.items()],
    }
    if not codec.is_lossless(F32):
        record["error"] = {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}
    path = tmp_path / "x.qf"
    path.write_bytes(Draft(tensors=[record]).pack())
    with bounded_memory(8 << 20), qformat.safe_open(path) as f, pytest.raises(FormatError, match="needs segments"):
        f.get_tensor("x")
    compare_readers(path, path.read_bytes())


@every_chunked
def test_chunk_lengths_that_do_not_fit_the_chunks_are_refused(type_, files, tmp_path):
    for change in ("sum", "shift", "huge"):
        draft = Draft.of(files[type_])
        record = next(tensor for tensor in draft.index["tensors"] if tensor["name"] == "two")
        place = record["segments"][1]
        start = place["offset"] - len(draft.header)
        lengths = np.frombuffer(draft.body[start : start + place["length"]], "<u4").copy()
        assert lengths.size == 2
        first, second = lengths.tolist()
        lengths[:] = {"sum": [first, second + 1], "shift": [first + 1, second - 1], "huge": [2**32 - 1] * 2}[change]
        _put(draft, place, lengths.tobytes())
        path = tmp_path / "x.qf"
        package, _ = compare_readers(path, draft.pack())
        assert ("tensor", "two") in package.errors
        with qformat.safe_open(path) as f:
            with pytest.raises(FormatError, match="'two' is damaged"):
                f.get_tensor("two")
            f.get_tensor("a")


def _put(draft: Draft, record: dict, content: bytes) -> None:
    """Put other bytes into a segment."""
    start = record["offset"] - len(draft.header)
    draft.body = draft.body[:start] + content + draft.body[start + len(content) :]
    record["sha256"] = hashlib.sha256(content).hexdigest()


# ---- conversion


@every_chunked
def test_a_dry_run_predicts_the_size_of_entropy_coded_files(type_, tmp_path):
    save_file({name: array for name, array in tensors().items() if array.size}, tmp_path / "x.safetensors")
    common = ["convert", tmp_path / "x.safetensors", tmp_path / "x.qf", "-t", type_, "--json"]
    predicted = json.loads(invoke(*common, "--dry-run").stdout)
    assert not (tmp_path / "x.qf").exists()
    written = json.loads(invoke(*common).stdout)
    assert predicted["bytes"] == written["bytes"] == (tmp_path / "x.qf").stat().st_size
    assert predicted["bpw"] == written["bpw"]
    assert predicted["root_sha256"] is None
    shown = json.loads(invoke("inspect", tmp_path / "x.qf", "--json").stdout)
    assert shown["total"]["bpw"] == written["bpw"]
    invoke("verify", tmp_path / "x.qf")


@pytest.mark.parametrize("type_", [*CHUNKED, *(coded(type_) for type_ in ("q4_1:search=naive", "q5_0", "q8_0", "nlm"))])
def test_entropy_coded_bytes_do_not_depend_on_kernels_and_threads(type_, tmp_path):
    some = {name: array for name, array in tensors().items() if name != "long"}
    for family in FAMILIES:
        with using(family):
            qformat.save_file(some, tmp_path / f"{family}.qf", {"*": type_})
    assert (tmp_path / "numba.qf").read_bytes() == (tmp_path / "numpy.qf").read_bytes()
    for jobs in (1, 4):
        qformat.save_file(tensors(), tmp_path / f"{jobs}.qf", {"*": type_}, jobs=jobs)
    assert (tmp_path / "1.qf").read_bytes() == (tmp_path / "4.qf").read_bytes()


@pytest.mark.parametrize(("size", "header"), [(22, 2), (24, 4)])
@every_family
@given(seed=st.integers(0, 2**32 - 1))
def test_five_bit_codes_round_trip_through_unpack_and_pack(family, size, header, seed):
    kernels = importlib.import_module(f"qformat.kernels.{family}.codes_5")
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(rng.integers(1, 20)), size)).astype(np.uint8)
    guarded = np.full(32 * len(blocks) + 64, 77, np.uint8)
    kernels.unpack(blocks.reshape(-1), size, header, guarded[:-64])
    assert (guarded[-64:] == 77).all()
    fifth = np.unpackbits(blocks[:, header : header + 4], axis=1, bitorder="little")
    nibbles = blocks[:, header + 4 :]
    expected = np.hstack([nibbles & 15, nibbles >> 4]) + 16 * fifth
    np.testing.assert_array_equal(guarded[:-64].reshape(-1, 32), expected)
    again = np.zeros((len(blocks) + 1, size), np.uint8)
    again[:-1, :header] = blocks[:, :header]
    kernels.pack(guarded[:-64], again[:-1].reshape(-1), size, header)
    np.testing.assert_array_equal(again[:-1], blocks)
    assert not again[-1].any()


@every_chunked
def test_the_number_of_chunks_is_computed_from_the_shape(type_):
    codec = parse_type(type_)
    for shape in [*SHAPES.values(), (3, 524_288), (3, 524_289), (1_000_000, 1), (1, 1_048_576)]:
        assert segment_lengths(codec, shape)["lengths"] == 4 * len(chunks_of(codec, shape))
    assert segment_lengths(codec, (1 << 60, 3))["lengths"] > 1 << 40
