"""What is exported: judged by the libraries that read it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from qformat import safe_open
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.gguf import open_gguf
from qformat.dtypes import DTYPES, F32, Elements, from_array
from qformat.errors import FormatError, QualityError, SourceError, TargetError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.readers.torch import TORCH_DTYPES, load_file
from tests.helpers.cli import invoke
from tests.helpers.gguf import Draft, pair, random_blocks, store, string, u32, write

RNG = np.random.default_rng(0)
W = RNG.normal(size=(70, 64)).astype(np.float32)


def q(path: Path, tensors: dict[str, Any], types: Any = None, *, assets: Any = None, **kwargs: Any) -> Path:
    recipe = Recipe.parse(None, types) if isinstance(types, dict) else Recipe.parse(types)
    sources = [ArrayTensor(name, x if isinstance(x, Elements) else from_array(x)) for name, x in tensors.items()]
    readers = {name: data.__bytes__ for name, data in (assets or {}).items()}
    convert(Checkpoint(sources, readers), path, recipe, overwrite=True, **kwargs)
    return path


def as_(array: Any, dtype: str) -> Elements:
    return Elements(DTYPES[dtype], Elements(F32, array).cast(DTYPES[dtype]))


# --- safetensors -------------------------------------------------------------------------------------------------------------


def test_unquantized_tensors_are_exported_with_their_dtype(tmp_path):
    tensors = {
        "f32": W,
        "f16": W.astype(np.float16),
        "f64": W.astype(np.float64),
        "bf16": as_(W, "bf16"),
        "i8": np.arange(-5, 6, dtype=np.int8),
        "u16": np.arange(3, dtype=np.uint16),
        "bool": np.array([True, False, True]),
        "scalar": np.asarray(np.float32(3.5)),
        "none": np.zeros((0, 4), np.float32),
        "nan": np.array([np.nan, np.inf], np.float32),
    }
    path = q(tmp_path / "a.qf", tensors, allow_nonfinite=True, metadata={"who": "me"})
    result = export(path, tmp_path / "a.safetensors", "safetensors")
    assert all(tensor.copied for tensor in result.tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    expected = load_file(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        if name not in ("scalar", "none"):
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "type_", ["q4_0", "q8_0:coded=true", "nlm", "affine", "lut", "levels", "ternary", "bf16", "scm:bpw=4"]
)
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_quantized_tensors_are_exported_with_their_original_or_the_given_dtype(tmp_path, type_, source):
    path = q(tmp_path / "a.qf", {"w": as_(W, source), "v": as_(W[0], source)}, {"w": type_})
    export(path, tmp_path / "a.safetensors", "safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with safe_open(path) as file:
        values = torch.from_numpy(file.get_tensor("w", np.float32))
    dtype = torch.bfloat16 if type_ == "bf16" else TORCH_DTYPES[source]
    assert found["w"].dtype == dtype
    assert torch.equal(found["w"], values.to(dtype))
    for name in ("f32", "f16", "bf16"):
        export(path, tmp_path / "a.safetensors", "safetensors", dtype=name, overwrite=True)
        found = safetensors.torch.load_file(tmp_path / "a.safetensors")
        stored = torch.bfloat16 if type_ == "bf16" else TORCH_DTYPES[name]  # numbers are not rounded again
        assert torch.equal(found["w"], values.to(stored))
        assert found["v"].dtype == TORCH_DTYPES[source]


def test_lossless_tensors_are_exported_bit_for_bit(tmp_path):
    tensors = {dtype: as_(W, dtype) for dtype in ("f32", "f16", "bf16")}
    nan = {"nan": np.full((2, 3), np.nan, np.float32)}
    path = q(tmp_path / "a.qf", tensors | nan, "lossless", allow_nonfinite=True)
    export(path, tmp_path / "a.safetensors", "safetensors", dtype="f16")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, elements in tensors.items():
        assert found[name].view(torch.uint8).numpy().tobytes() == elements.data.tobytes()
    assert torch.isnan(found["nan"]).all()


def test_layered_tensors_are_exported_at_a_quality(tmp_path):
    path = q(tmp_path / "a.qf", {"w": W}, "scm")
    export(path, tmp_path / "a.safetensors", "safetensors", quality=3)
    with safe_open(path, quality=3) as file:
        assert np.array_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors")["w"], file.get_tensor("w"))
    with pytest.raises(QualityError):
        export(q(tmp_path / "b.qf", {"w": W}), tmp_path / "b.safetensors", "safetensors", quality=3)


def test_exported_bytes_of_many_chunks_do_not_depend_on_jobs(tmp_path):
    tensors = {f"w{i}": RNG.normal(size=(3000, 500)).astype(np.float32) for i in range(3)}
    path = q(tmp_path / "a.qf", tensors | {"long": np.ones((1, 1_100_000), np.float32)}, "q4_1")
    for jobs in (1, 4):
        export(path, tmp_path / f"{jobs}.safetensors", "safetensors", jobs=jobs)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    found = safetensors.numpy.load_file(tmp_path / "1.safetensors")
    with safe_open(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            assert np.array_equal(found[name], file.get_tensor(name))


def test_values_too_large_or_small_for_the_exported_dtype_are_refused(tmp_path):
    path = q(tmp_path / "a.qf", {"w": np.full((2, 32), 1e6, np.float32)}, "q8_0")
    with pytest.raises(SourceError, match="'w' holds values too large for f16; choose another --dtype"):
        export(path, tmp_path / "a.safetensors", "safetensors", dtype="f16")
    path = q(tmp_path / "a.qf", {"w": np.full((2, 32), 1e-9, np.float32)}, "affine:scale=f32")
    with pytest.raises(SourceError, match="'w' holds values too small for f16"):
        export(path, tmp_path / "a.safetensors", "safetensors", dtype="f16")
    assert sorted(tmp_path.iterdir()) == [path]


def test_tensor_names_that_safetensors_excludes_are_refused(tmp_path):
    path = q(tmp_path / "a.qf", {"__metadata__": W})
    with pytest.raises(SourceError, match=r"'__metadata__' cannot be in a \.safetensors file"):
        export(path, tmp_path / "x", "safetensors")


def test_types_that_an_export_cannot_hold_are_refused(tmp_path):
    path = q(tmp_path / "a.qf", {"w": W})
    for to, *types in (("safetensors", "q8_0"), ("gguf", "q4_0:coded=true", "nlm"), ("hf", "i8", "xx")):
        for type_ in types:
            with pytest.raises(TypeSpecError):
                export(path, tmp_path / "x", to, dtype=type_)


# --- care with the target ----------------------------------------------------------------------------------------------------


def test_the_modes_of_exported_files_follow_the_umask(tmp_path):
    path = q(tmp_path / "a.qf", {"w": W}, assets={"config.json": b"{}"})
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            export(path, tmp_path / "a.safetensors", "safetensors", overwrite=True)
            export(path, tmp_path / "hf", "hf", overwrite=True)
        finally:
            os.umask(before)
        for file in ("a.safetensors", "hf/model.safetensors", "hf/config.json"):
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o666 & ~mask
        assert stat.S_IMODE((tmp_path / "hf").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_an_existing_export_is_not_replaced_without_force(tmp_path, to):
    path = q(tmp_path / "a.qf", {"w": W})
    export(path, tmp_path / "out", to)
    with pytest.raises(TargetError, match="exists already; use --force"):
        export(path, tmp_path / "out", to)
    export(path, tmp_path / "out", to, overwrite=True)
    with pytest.raises(TargetError, match="is a file of the checkpoint that is to be read, or a part of it"):
        export(path, path, to, overwrite=True)
    with pytest.raises(TargetError, match="does not exist"):
        export(path, tmp_path / "no" / "out", to)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.qf", "out"]


def test_a_directory_with_other_files_is_not_replaced_by_an_export(tmp_path):
    path = q(tmp_path / "a.qf", {"w": W})
    out = tmp_path / "out"
    export(path, out, "hf", shard_size=100)
    export(path, out, "hf", overwrite=True)  # other shards
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"holds thesis\.txt, which would be lost"):
        export(path, out, "hf", overwrite=True)
    with pytest.raises(TargetError, match="is a directory"):
        export(path, out, "safetensors", overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(TargetError, match="is not a directory"):
        export(path, q(tmp_path / "b.qf", {"w": W}), "hf", overwrite=True)


@pytest.mark.parametrize("to", ["safetensors", "hf", "gguf"])
def test_exporting_a_damaged_file_leaves_no_files(tmp_path, to):
    source = write(tmp_path / "m.gguf", {"x": (random_blocks("q4_0", 40, 4), "q4_0")})
    path = store(source) if to == "gguf" else q(tmp_path / "a.qf", {"x": W}, "q4_0", assets={"config.json": b"{}"})
    with safe_open(path) as file:
        at = file.info("x").segments[0].offset
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((FormatError, SourceError), match="'x', segment 'blocks' is damaged"):
        export(path, tmp_path / "out", to)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_the_workspace_of_a_killed_export_is_reused(tmp_path, to):
    path = q(tmp_path / "a.qf", {f"w{i}": W for i in range(4)})
    code = f"""if True:
        import time
        from pathlib import Path
        from qformat.converters.exports.export import export
        wait = lambda n: (print(1, flush=True), time.sleep(99))
        export(Path({str(path)!r}), Path({str(tmp_path / "out")!r}), {to!r}, progress=wait)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(TargetError, match="another process is writing it"):
            export(path, tmp_path / "out", to)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
    export(path, tmp_path / "out", to)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.qf", "out"]


def test_a_folder_with_the_name_of_the_workspace_of_an_export_is_kept(tmp_path):
    path = q(tmp_path / "a.qf", {"w": W})
    partial = tmp_path / "out.partial"
    partial.mkdir()
    export(path, tmp_path / "out", "hf")  # an empty one is nobody's loss
    partial.mkdir()
    (partial / "x").write_text("mine")
    with pytest.raises(TargetError, match="is not the workspace of an interrupted run"):
        export(path, tmp_path / "out", "hf", overwrite=True)
    assert (partial / "x").read_text() == "mine"


# --- gguf --------------------------------------------------------------------------------------------------------------------


def natural_blocks(name: str, rows: int, cols: int) -> np.ndarray[Any, Any]:
    """Return rows of blocks whose values are no larger than weights are."""
    if name != "q6_k":
        return quantize(RNG.normal(size=(rows, cols)).astype(np.float32), GGMLQuantizationType[name.upper()])
    blocks = random_blocks(name, rows, cols // 256)
    blocks.reshape(-1, 210)[:, -2:] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks


def gguf_source(path: Path) -> dict[str, Any]:
    tensors = {
        "token_embd.weight": (natural_blocks("q8_0", 50, 128), "q8_0"),
        "a.weight": (natural_blocks("q4_1", 60, 256), "q4_1"),
        "b.weight": (natural_blocks("q6_k", 40, 256), "q6_k"),
        "norm.weight": (RNG.normal(size=37).astype(np.float32), "f32"),
        "c.weight": (RNG.normal(size=(5, 96)).astype(np.float16), "f16"),
    }
    write(path, tensors)
    return tensors


def read(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    reader = GGUFReader(path)
    return reader, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> np.ndarray[Any, Any]:
    return dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(
    ("type_", "dtype", "kinds", "file_type"),
    [
        ("q4_0", None, "Q4_0 Q4_0 Q4_0 F32 Q4_0", 2),
        ("q5_1:coded=true", None, "Q5_1 Q5_1 Q5_1 F32 Q5_1", 9),
        ("nlm", None, "F16 F16 F16 F32 F16", 1),
        ("scm:bpw=4", "bf16", "BF16 BF16 BF16 F32 BF16", 32),
        ("affine", "q8_0", "Q8_0 Q8_0 Q8_0 F32 Q8_0", 7),
        ("lossless", "q8_0", "Q8_0 Q8_0 Q8_0 F32 Q8_0", 7),
        ("bf16", "q8_0", "Q8_0 Q8_0 Q8_0 F32 Q8_0", 7),
        ("bf16", None, "BF16 BF16 BF16 F32 BF16", 32),
        ("lut", "q4_0:search=naive", "Q4_0 Q4_0 Q4_0 F32 Q4_0", 2),
    ],
)
def test_gguf_exports_of_other_types_have_the_stored_values(tmp_path, type_, dtype, kinds, file_type):
    tensors = gguf_source(tmp_path / "m.gguf")
    path = store(tmp_path / "m.gguf", type_)
    export(path, tmp_path / "out.gguf", "gguf", dtype=dtype)
    reader, found = read(tmp_path / "out.gguf")
    assert list(found) == list(tensors)
    assert " ".join(tensor.tensor_type.name for tensor in found.values()) == kinds
    assert reader.fields["general.file_type"].contents() == file_type
    assert reader.fields["tokenizer.ggml.tokens"].contents() == [f"tok{i}" for i in range(1000)]
    assert (tmp_path / "out.gguf").stat().st_size % 32 == 0
    before = read(tmp_path / "m.gguf")[1]
    with safe_open(path) as file:
        for name, tensor in found.items():
            assert list(tensor.shape) == list(before[name].shape)
            stored = file.get_tensor(name, np.float32)
            made_of_numbers = type_ in ("lossless", "bf16") and dtype is not None and stored.ndim > 1
            if file.info(name).codec in ("nlm", "affine", "lut", "scm") or made_of_numbers:
                spread = float(np.abs(stored).max())
                assert np.abs(values(tensor) - stored).max() <= spread / (8 if "Q4" in kinds else 100)
            else:
                assert np.array_equal(values(tensor), stored)
    # and it is a file that comes back itself
    again = store(tmp_path / "out.gguf")
    export(again, tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize("make", [natural_blocks, lambda name, rows, cols: random_blocks(name, rows, cols // 32)])
def test_entropy_coded_blocks_are_exported_to_gguf_bit_for_bit(tmp_path, make):
    tensors = {name: (make(name, 700, 960), name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}
    source = write(tmp_path / "m.gguf", tensors)
    path = tmp_path / "m.qf"
    recipe = Recipe.parse(None, [f"{name}={name}:coded=true" for name in tensors])
    convert(open_gguf(source), path, recipe)
    with safe_open(path) as file:
        for name, (blocks, _) in tensors.items():
            info = file.info(name)
            assert dict(info.params) == {"coded": True}
            assert (info.error.rmse, info.error.maximum) == (0, 0)
            expected = dequantize(blocks, GGMLQuantizationType[name.upper()])
            assert np.array_equal(file.get_tensor(name), expected)
    export(path, tmp_path / "out.gguf", "gguf")
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
    if make is natural_blocks:
        assert path.stat().st_size < 0.97 * source.stat().st_size


def test_gguf_exports_of_mostly_the_same_type_keep_the_file_type(tmp_path):
    gguf_source(tmp_path / "m.gguf")
    path = tmp_path / "m.qf"
    convert(open_gguf(tmp_path / "m.gguf"), path, Recipe.parse(None, ["b.weight=nlm"]))
    export(path, tmp_path / "out.gguf", "gguf", dtype="q5_0")
    reader, found = read(tmp_path / "out.gguf")
    assert reader.fields["general.file_type"].contents() == 2
    assert [tensor.tensor_type for tensor in found.values()][2] == GGMLQuantizationType.Q5_0


def test_gguf_exports_of_rows_that_do_not_fill_blocks_are_refused_or_stored_as_f16(tmp_path):
    source = write(tmp_path / "m.gguf", {"x.weight": (RNG.normal(size=(4, 33)).astype(np.float32), "f32")})
    path = store(source, "nlm")
    with pytest.raises(SourceError, match=r"'x\.weight' has rows of 33 elements.*q8_0; use --dtype f16"):
        export(path, tmp_path / "out.gguf", "gguf", dtype="q8_0")
    export(path, tmp_path / "out.gguf", "gguf")
    assert read(tmp_path / "out.gguf")[1]["x.weight"].tensor_type.name == "F16"
    # q4_0 fills up such rows, which GGUF does not
    export(store(source, "q4_0"), tmp_path / "out.gguf", "gguf", overwrite=True)
    assert read(tmp_path / "out.gguf")[1]["x.weight"].tensor_type.name == "F16"


KEPT = {
    "position_embd.weight": (16, 64),
    "token_types.weight": (2, 64),
    "blk.0.ssm_conv1d.weight": (64, 32),
    "blk.0.ssm_a": (64, 32),
    "blk.0.ffn_gate_inp.weight": (4, 64),
    "blk.0.time_mix_w1.weight": (64, 64),
    "blk.0.time_mix_lerp_x.weight": (1, 1, 64),
    "dec.blk.0.attn_rel_b.weight": (32, 32),
    "altup_proj.weight": (64, 64),
    "v.patch_embd.weight": (64, 3, 14, 32),
    "blk.0.attn_q_norm.weight": (4, 64),
}


@pytest.mark.parametrize(
    ("type_", "dtype"), [("q4_0", None), ("bf16", None), ("nlm", None), (None, "q8_0"), (None, "f16")]
)
def test_types_for_all_tensors_of_a_gguf_file_spare_what_llama_cpp_reads_as_floats(tmp_path, type_, dtype):
    shapes = KEPT | {"token_embd.weight": (16, 64), "blk.0.ffn_up_exps.weight": (2, 8, 64)}
    arrays = {name: (RNG.normal(size=shape).astype(np.float32), "f32") for name, shape in shapes.items()}
    path = store(write(tmp_path / "m.gguf", arrays), type_)
    for source in (path, tmp_path / "again.qf"):
        if source != path:
            convert(open_checkpoint(path), source, Recipe.parse(type_))
        export(source, tmp_path / "out.gguf", "gguf", dtype=dtype, overwrite=True)
        found = read(tmp_path / "out.gguf")[1]
        kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
        expected = "F16" if type_ == "nlm" else (type_ or dtype or "").upper()
        assert kinds == dict.fromkeys(KEPT, "F32") | dict.fromkeys(shapes.keys() - KEPT.keys(), expected)
        assert all(np.array_equal(found[name].data, arrays[name][0]) for name in KEPT)


def test_a_type_for_a_named_tensor_of_a_gguf_file_overrules_what_llama_cpp_reads_as_floats(tmp_path):
    arrays = {
        name: (RNG.normal(size=KEPT[name]).astype(np.float32), "f32") for name in ("token_types.weight", "blk.0.ssm_a")
    }
    source, path = write(tmp_path / "m.gguf", arrays), tmp_path / "m.qf"
    convert(open_gguf(source), path, Recipe.parse("q8_0", ["token_types.weight=q8_0", "*.ssm_a=nlm"]))
    export(path, tmp_path / "out.gguf", "gguf")
    found = read(tmp_path / "out.gguf")[1]
    assert {name: tensor.tensor_type.name for name, tensor in found.items()} == {
        "token_types.weight": "Q8_0",
        "blk.0.ssm_a": "F32",
    }


def test_codes_that_a_dtype_does_not_change_are_named(tmp_path):
    gguf_source(tmp_path / "m.gguf")
    result = export(store(tmp_path / "m.gguf"), tmp_path / "out.gguf", "gguf", dtype="q8_0")
    message = "tensor 'a.weight' and 1 more: stays q4_1, since --dtype does not encode the codes of a GGUF type again"
    assert result.warnings == [message]


def test_names_that_llama_cpp_does_not_read_are_named(tmp_path):
    names = ["v" * 63, "w" * 64, "x" * 1000]
    source = write(tmp_path / "m.gguf", dict.fromkeys(names, (W, "f32")))
    result = export(store(source), tmp_path / "out.gguf", "gguf")
    assert result.warnings == [f"tensor {names[1]!r} and 1 more: llama.cpp reads no names of more than 63 bytes"]
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
    with pytest.raises(SourceError) as caught:
        store(write(tmp_path / "n.gguf", {"y" * 1100: (W, "f32")}))
    assert str(caught.value) == f"tensor name {'y' * 40!r}... is 1100 bytes, more than 1024"


def test_gguf_exports_keep_large_alignments(tmp_path):
    source = tmp_path / "m.gguf"
    keys = [u32("general.alignment", 1 << 20), pair("general.name", 8, string("x"))]
    source.write_bytes(Draft(keys, alignment=1 << 20).pack())
    convert(open_gguf(source), tmp_path / "m.qf", Recipe.parse(None, ["t=f32"]))
    export(tmp_path / "m.qf", tmp_path / "out.gguf", "gguf")
    assert (tmp_path / "out.gguf").stat().st_size == 2 << 20


def test_gguf_exports_of_files_without_gguf_metadata_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"cannot become a GGUF file: there is no config\.json"):
        export(q(tmp_path / "a.qf", {"w": W}), tmp_path / "a.gguf", "gguf")


def test_gguf_exports_with_metadata_of_other_tensors_are_refused(tmp_path):
    gguf_source(tmp_path / "m.gguf")
    with safe_open(store(tmp_path / "m.gguf")) as file:
        asset = file.get_asset("model.gguf-header")
    name = {"model.gguf-header": asset}
    for tensors in ({"a.weight": W}, {}):
        with pytest.raises(SourceError, match="does not fit the tensors"):
            export(q(tmp_path / "a.qf", tensors, assets=name), tmp_path / "a.gguf", "gguf")
    for broken in (b"", asset[:100], asset[:-1] + b"x", b"x" + asset):
        path = q(tmp_path / "a.qf", {"a.weight": W}, assets={"model.gguf-header": broken})
        with pytest.raises(SourceError):
            export(path, tmp_path / "a.gguf", "gguf")


# --- hf ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, dtype="float32")
    path = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("shard_size", [5_000_000_000, 50_000])
def test_transformers_loads_an_exported_directory(llama, tmp_path, shard_size):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "m.qf"
    convert(open_checkpoint(llama), path, Recipe.parse("q8_0"))
    result = export(path, tmp_path / "out", "hf", shard_size=shard_size)
    assert not result.warnings
    assert {name: (tmp_path / "out" / name).stat().st_size for name in result.files} == result.files
    assert ("model.safetensors" in result.files) == (shard_size > 10**6)
    assert (tmp_path / "out" / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    if "model.safetensors" not in result.files:
        weights = [file for file in result.files if file.endswith(".safetensors")]
        assert len(weights) > 3
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
        assert set(index["weight_map"].values()) == set(weights)
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values())
    stored = load_file(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    # and it converts again, to the same
    convert(open_checkpoint(tmp_path / "out"), tmp_path / "again.qf", Recipe.parse("q8_0:coded=true"))


def test_the_quantization_config_is_left_out_of_an_exported_directory(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"bits": 4}, "name": "Ä"}
    assets = {"config.json": json.dumps(config).encode(), "sub/config.json": b"[1]"}
    path = q(tmp_path / "a.qf", {"w": W}, assets=assets)
    result = export(path, tmp_path / "out", "hf")
    assert "quantization_config is left out" in result.warnings[0]
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {"model_type": "llama", "name": "Ä"}
    assert (tmp_path / "out" / "sub" / "config.json").read_bytes() == b"[1]"


def test_exports_to_unusable_directories_are_refused_or_give_a_warning(tmp_path):
    result = export(q(tmp_path / "a.qf", {"w": W}), tmp_path / "out", "hf")
    assert "holds no config.json" in result.warnings[0]
    gguf_source(tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="was made from a GGUF file"):
        export(store(tmp_path / "m.gguf"), tmp_path / "gguf", "hf")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(SourceError, match="has the name of a file of weights"):
            export(q(tmp_path / "a.qf", {"w": W}, assets={name: b""}), tmp_path / "x", "hf")
    assert not (tmp_path / "gguf").exists()


NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "diffusion_pytorch_model.safetensors": ({"config.json": {"_diffusers_version": "0.30"}}, "diffusion_pytorch_model.safetensors"),
    "adapter_model.safetensors": ({"adapter_config.json": {"peft_type": "LORA"}}, "adapter_model.safetensors"),
    "open_clip_model.safetensors": ({"open_clip_config.json": {}}, "open_clip_model.safetensors"),
    "consolidated.safetensors": ({"params.json": {}}, "consolidated.safetensors"),
    "diffusion_pytorch_model.fp16.safetensors": ({"config.json": {}}, "diffusion_pytorch_model.fp16.safetensors"),
    "pytorch_lora_weights.safetensors": ({}, "pytorch_lora_weights.safetensors"),
    "pytorch_model.bin": ({"config.json": {}}, "model.safetensors"),
    "diffusion_pytorch_model.bin": ({"config.json": {}}, "diffusion_pytorch_model.safetensors"),
    "open_clip_pytorch_model.bin": ({"open_clip_config.json": {}}, "open_clip_model.safetensors"),
    "model.safetensors": ({"config.json": {}}, "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_have_the_name_that_they_had(tmp_path, name):
    files, expected = NAMES[name]
    source, path = tmp_path / "source", tmp_path / "a.qf"
    source.mkdir()
    tensors = {"w": torch.randn(4, 64)}
    if name.endswith(".bin"):
        torch.save(tensors, source / name)
    else:
        safetensors.torch.save_file(tensors, source / name, metadata={"format": "pt", "made by": "us"})
    for file, values_ in files.items():
        (source / file).write_text(json.dumps(values_))
    convert(open_checkpoint(source), path, Recipe())
    for _ in range(2):  # and such a directory may be replaced
        result = export(path, tmp_path / "out", "hf", overwrite=True)
        assert set(result.files) == {expected, *files}
        assert not result.warnings
    with safetensors.safe_open(tmp_path / "out" / expected, "pt") as file:
        assert file.metadata() == {"format": "pt"} | ({} if name.endswith(".bin") else {"made by": "us"})
    export(path, tmp_path / "o.safetensors", "safetensors")
    with safetensors.safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert "qformat.weights_name" not in file.metadata()


@pytest.mark.parametrize(
    ("assets", "single"),
    [
        ({"adapter_config.json": b"{}", "config.json": b"{}"}, "adapter_model.safetensors"),
        ({"config.json": b'{"_diffusers_version": "0.30"}'}, "diffusion_pytorch_model.safetensors"),
        ({"config.json": b"{"}, "model.safetensors"),
        ({"params.json": b"{}"}, "consolidated.safetensors"),
    ],
)
def test_files_beside_the_weights_give_them_their_name(tmp_path, assets, single):
    for name in (None, "../x.safetensors", ".x.safetensors", "x.bin"):
        metadata = {} if name is None else {"qformat.weights_name": name}
        result = export(
            q(tmp_path / "a.qf", {"w": W}, assets=assets, metadata=metadata), tmp_path / "out", "hf", overwrite=True
        )
        assert set(result.files) == {single, *assets}


def test_shards_have_the_names_that_their_library_looks_for(tmp_path):
    tensors = {"a": W, "b": W}
    for name, files in {
        "diffusion_pytorch_model": ["diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002"],
        "model.fp16": ["model.fp16-00001-of-00002", "model.fp16-00002-of-00002"],
        "adapter_model": ["adapter_model"],
    }.items():
        path = q(tmp_path / "a.qf", tensors, metadata={"qformat.weights_name": f"{name}.safetensors"})
        result = export(path, tmp_path / name, "hf", shard_size=W.nbytes)
        stem, *variant = name.split(".")
        index = [".".join((f"{stem}.safetensors.index", *variant, "json"))] if len(files) > 1 else []
        assert sorted(result.files) == sorted([*(f"{file}.safetensors" for file in files), *index])


def test_the_dtype_of_a_configuration_follows_the_one_that_is_asked_for(tmp_path):
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "name": "a"}
    path = q(tmp_path / "a.qf", {"w": W}, "q8_0", assets={"config.json": json.dumps(config).encode()})
    assert export(path, tmp_path / "same", "hf").warnings == []
    assert json.loads((tmp_path / "same" / "config.json").read_bytes()) == config
    result = export(path, tmp_path / "out", "hf", dtype="f16")
    assert result.warnings == ["torch_dtype of config.json was 'bfloat16' and is 'float16' now, as --dtype says"]
    expected = {"torch_dtype": "float16", "text_config": {"dtype": "float16"}, "name": "a"}
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == expected


def test_scales_of_activations_go_with_the_configuration_of_quantization(tmp_path):
    config = json.dumps({"quantization_config": {"quant_method": "fp8"}}).encode()
    tensors = {"a.weight": W, "a.input_scale": np.ones(1, np.float32), "b.scale": np.ones(3, np.float32)}
    result = export(q(tmp_path / "a.qf", tensors, assets={"config.json": config}), tmp_path / "out", "hf")
    assert "tensor 'a.input_scale' only scales activations: left out" in result.warnings
    assert set(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")) == {"a.weight", "b.scale"}
    export(q(tmp_path / "a.qf", tensors, assets={"config.json": b"{}"}), tmp_path / "all", "hf")
    assert set(safetensors.numpy.load_file(tmp_path / "all" / "model.safetensors")) == tensors.keys()


# --- command line ------------------------------------------------------------------------------------------------------------


def test_the_export_command_reports_results_and_refusals(tmp_path):
    gguf_source(tmp_path / "m.gguf")
    path = store(tmp_path / "m.gguf")
    invoke("export", path, tmp_path / "o.gguf", "--to", "gguf")
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    result = invoke("export", path, tmp_path / "o.safetensors", "--to", "safetensors", "--json", "-t", "f16")
    report = json.loads(result.stdout)
    assert (report["tensors"], report["copied"]) == (5, 2)
    assert report["bytes"] == (tmp_path / "o.safetensors").stat().st_size
    assert "left out" in result.stderr
    for arguments, code, message in (
        (["--to", "gguf"], 1, "exists already"),
        (["--to", "gguf", "-f", "-t", "i8"], 2, "an export to gguf can hold"),
        (["--to", "hf", "--shard-size", "big"], 2, "is not a size"),
        ([], 2, "Missing option '--to'"),
    ):
        assert message in invoke("export", path, tmp_path / "o.gguf", *arguments, code=code).output
    assert "no.qf" in invoke("export", tmp_path / "no.qf", tmp_path / "x", "--to", "gguf", code=1).output
