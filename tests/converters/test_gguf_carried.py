"""What of GGUF files is only carried: blocks with NaN, unknown types, split files, original shapes, files that are no models."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import load_file

from qformat import safe_open
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.gguf import open_gguf
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from tests.helpers.cli import run_all, run_cli
from tests.helpers.gguf import Draft, Entry, pair, random_blocks, store, string, write


def back(path: Path) -> bytes:
    export(path, path.with_suffix(".out"), "gguf", overwrite=True)
    return path.with_suffix(".out").read_bytes()


@pytest.mark.parametrize("name", ["q4_k", "mxfp4", "q4_0"])
def test_gguf_blocks_that_decode_to_nan_are_copied_and_named(tmp_path, name):
    blocks = random_blocks(name, 4, 8)
    if name == "mxfp4":
        blocks[1, 0] = 255  # an exponent
    else:
        blocks[1, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    source = write(tmp_path / "m.gguf", {"x.weight": (blocks, name), "y.weight": (random_blocks(name, 2, 8), name)})
    result = run_cli("convert", source, tmp_path / "m.qf")
    assert result.code == 0
    assert result.err == (
        "Warning: copied codes that decode to NaN or infinity: tensor 'x.weight'; make sure that it is not damaged\n"
    )
    assert back(tmp_path / "m.qf") == source.read_bytes()
    with safe_open(tmp_path / "m.qf") as file, np.errstate(all="ignore"):
        expected = dequantize(blocks, GGMLQuantizationType[name.upper()])
        assert np.array_equal(file.get_tensor("x.weight"), expected, equal_nan=True)
    with pytest.raises(SourceError, match=r"'x\.weight' holds NaN or infinity"):
        store(source, "q8_0")
    assert run_cli("convert", source, tmp_path / "n.qf", "-t", "bf16", "--allow-nonfinite").code == 0
    with safe_open(tmp_path / "n.qf") as file:
        assert (file.info("y.weight").codec, file.info("x.weight").nbytes) == ("bf16", blocks.nbytes)


UNKNOWN = [
    (Entry(type=42), "42 (q2_0 of newer versions of llama.cpp)"),
    (Entry(type=36), "36 (iq4_nl_4_4, which llama.cpp has removed, or i2_s of bitnet.cpp)"),
    (Entry(type=137), "137 (a type of ik_llama.cpp)"),
    (Entry(type=1000), "1000 (unknown here)"),
    (Entry(type=39, ne=(320, 2)), "39 with another size than that of mxfp4 (tl2 of bitnet.cpp?)"),
    (Entry(type=40, ne=(320, 2)), "40 with another size than that of nvfp4 (an older q1_0 of another fork?)"),
]


@pytest.mark.parametrize(("entry", "words"), UNKNOWN)
def test_gguf_tensors_of_unknown_types_are_only_carried(tmp_path, entry, words):
    source = tmp_path / "m.gguf"
    source.write_bytes(Draft(entries=[entry]).pack())
    checkpoint = open_gguf(source)
    assert checkpoint.quantized
    assert checkpoint.warnings == [
        f"m.gguf: tensor 't': of type {words}; stored as bytes, which only export --to gguf can use"
    ]
    path = store(source)
    assert back(path) == source.read_bytes()
    with safe_open(path) as file:
        assert file.get_tensor("t").tobytes() == bytes(64)
    with pytest.raises(SourceError, match=re.escape(f"tensor 't' is of type {words}: it can only stay as it is")):
        store(source, "q8_0")
    store(source)
    with pytest.raises(SourceError, match="tensor 't' is of a GGUF type that is not known here, and cannot be decoded"):
        export(path, tmp_path / "m.safetensors", "safetensors")


def split(folder: Path) -> list[Path]:
    """Write a GGUF file in four parts, the first one without tensors."""
    folder.mkdir()
    writer = GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2, small_first_shard=True)
    writer.add_block_count(2)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", np.full((3, 64), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def test_parts_of_a_split_gguf_file_are_joined(tmp_path):
    files = split(tmp_path / "m")
    assert [file.name for file in files] == [f"m-{i:05}-of-00004.gguf" for i in range(1, 5)]
    roots = set()
    for source in (tmp_path / "m", *files):
        checkpoint = open_checkpoint(source)
        assert checkpoint.warnings == []
        assert sorted(checkpoint.files) == files
        roots.add(convert(checkpoint, tmp_path / "m.qf", Recipe(), overwrite=True).root)
    assert len(roots) == 1
    (tmp_path / "whole.gguf").write_bytes(back(tmp_path / "m.qf"))
    whole = GGUFReader(tmp_path / "whole.gguf")
    assert {tensor.name: tensor.data.tolist() for tensor in whole.tensors} == {
        f"blk.{i}.ffn_up.weight": np.full((3, 64), i).tolist() for i in range(5)
    }
    assert [key for key in whole.fields if not key.startswith("GGUF.")] == ["general.architecture", "llama.block_count"]


def test_split_gguf_files_with_a_part_missing_or_strange_are_refused(tmp_path):
    files = split(tmp_path / "m")
    lost = files[2].read_bytes()
    files[2].unlink()
    for source in (tmp_path / "m", files[0], files[3]):
        with pytest.raises(
            SourceError, match=r"m-00003-of-00004\.gguf, another part of the split file, is missing beside it"
        ):
            open_checkpoint(source)
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(SourceError, match=r"m-00003-of-00004\.gguf: is not the part of m-00001-of-00004\.gguf"):
        open_checkpoint(files[0])
    files[2].write_bytes(lost)
    files[0].rename(tmp_path / "m" / "first.gguf")
    with pytest.raises(SourceError, match="is part 1 of 4 of a split GGUF file, but its name does not say so"):
        open_checkpoint(tmp_path / "m" / "first.gguf")


def shape_key(name: str, *shape: int) -> bytes:
    return pair(f"comfy.gguf.orig_shape.{name}", 9, struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *shape))


def test_original_shapes_of_comfyui_are_those_of_tensors(tmp_path):
    source = tmp_path / "m.gguf"
    values = np.arange(64, dtype=np.float32)
    draft = Draft(
        [shape_key("a", 4, 16), shape_key("b", 2, 8, 3, 2), shape_key("c", 2, 32), shape_key("d", 9)],
        [Entry("a", (64,), 0, 0), Entry("b", (96,), 8, 256), Entry("c", (64,), 8, 384), Entry("d", (8,), 0, 480)],
        values.tobytes() + bytes(256),
    )
    source.write_bytes(draft.pack())
    checkpoint = open_gguf(source)
    # rows of b cut its blocks; the key of d does not fit
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    assert shapes == {"a": (4, 16), "b": (96,), "c": (2, 32), "d": (8,)}
    (warning,) = checkpoint.warnings
    assert warning == (
        "m.gguf: tensor 'b' keeps the shape 96 of its blocks in GGUF; its own, 2x8x3x2, cuts them, and is that of exports to other "
        "formats"
    )
    path = store(source)
    assert back(path) == source.read_bytes()
    with safe_open(path) as file:
        assert np.array_equal(file.get_tensor("a"), values.reshape(4, 16))
    export(path, tmp_path / "m.safetensors", "safetensors")
    found = {name: tensor.shape for name, tensor in load_file(tmp_path / "m.safetensors").items()}
    assert found == {"a": (4, 16), "b": (2, 8, 3, 2), "c": (2, 32), "d": (8,)}


KINDS = [("general.type", "imatrix"), ("general.type", "adapter"), ("general.architecture", "controlvector")]


@pytest.mark.parametrize(("key", "kind"), KINDS)
def test_gguf_files_that_are_no_models_stay_as_they_are(tmp_path, key, kind):
    source = tmp_path / "m.gguf"
    draft = Draft([pair(key, 8, string(kind))], [Entry("x.weight", (64, 4), 0)], np.ones(256, np.float32).tobytes())
    source.write_bytes(draft.pack())
    plain, named = run_all(
        ["convert", source, tmp_path / "a.qf", "-t", "q4_0"],
        ["convert", source, tmp_path / "b.qf", "--tensor-type", "x.*=q8_0"],
    )
    assert plain.err == (
        f"Warning: m.gguf: is no model, but of the kind '{kind}': its numbers stay as they are unless --tensor-type names them\n"
    )
    assert named.code == 0
    for path, codec in (("a.qf", "f32"), ("b.qf", "q8_0")):
        with safe_open(tmp_path / path) as file:
            assert file.info("x.weight").codec == codec
