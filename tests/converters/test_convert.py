"""The main job on real weights and on checkpoints of every shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qformat
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe


def hf_directory(path: Path, tensors: dict[str, np.ndarray], shards: list[list[str]] | None = None) -> Path:
    """Write a checkpoint, in one file or in shards that hold the given names in the given order."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "test"}')
    if shards is None:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def make(source: Path, target: Path, recipe: Recipe | None = None, **options) -> bytes:
    convert(open_checkpoint(source), target, recipe or Recipe.parse("q4_0"), overwrite=True, **options)
    return target.read_bytes()


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "model.embed.weight": rng.standard_normal((1500, 500)).astype(np.float16),
        **{f"model.layers.{i}.w": rng.standard_normal((80, 64 + i)).astype(np.float32) for i in range(12)},
        "model.norm.weight": rng.standard_normal(64).astype(np.float32),
        "position_ids": np.arange(64).reshape(1, 64),
    }


def test_a_converted_minilm_has_its_tensors_and_files(minilm, minilm_qf):
    source = load_file(minilm / "model.safetensors")
    with qformat.safe_open(minilm_qf) as f:
        assert f.keys() == sorted(source)
        for name, array in source.items():
            assert f.get_tensor(name).shape == array.shape
            if array.ndim < 2 or array.dtype == np.int64:
                np.testing.assert_array_equal(f.get_tensor(name), array)
        assert {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"} <= set(f.assets())
        for name in f.assets():
            assert f.get_asset(name) == (minilm / name).read_bytes()


def test_converted_bytes_do_not_depend_on_jobs_kernels_or_the_environment(minilm, minilm_qf, tmp_path):
    expected = minilm_qf.read_bytes()
    assert make(minilm, tmp_path / "a.qf", jobs=1) == expected
    assert make(minilm, tmp_path / "b.qf", jobs=5) == expected
    env = os.environ | {"QFORMAT_KERNELS": "numpy", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "qformat", "convert", str(minilm), str(tmp_path / "c.qf")]
    subprocess.run(command, env=env, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "c.qf").read_bytes() == expected


def test_converted_bytes_do_not_depend_on_the_shards_of_the_source(weights, tmp_path):
    names = list(weights)
    expected = make(hf_directory(tmp_path / "single", weights), tmp_path / "a.qf")
    for i, shards in enumerate([[names[:5], names[5:]], [names[::-2], names[-2::-2]], [[name] for name in names]]):
        source = hf_directory(tmp_path / f"shards{i}", weights, shards)
        assert make(source, tmp_path / f"{i}.qf", jobs=i + 1) == expected


def test_a_single_safetensors_file_is_converted(weights, tmp_path):
    save_file(weights, tmp_path / "any name.safetensors")
    make(tmp_path / "any name.safetensors", tmp_path / "x.qf")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert set(f.keys()) == set(weights)
        assert f.assets() == []


def test_symbolic_links_of_the_hub_cache_are_followed(weights, tmp_path):
    real = hf_directory(tmp_path / "blobs", weights)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert make(snapshot, tmp_path / "a.qf") == make(real, tmp_path / "b.qf")


@pytest.mark.parametrize("type_", ["q4_0", "bf16", "f16", "f32"])
def test_a_dry_run_of_convert_predicts_the_exact_size(minilm, tmp_path, type_):
    recipe = Recipe.parse(type_, ["*word_embeddings*=f16", "*LayerNorm.bias=q4_0"])
    checkpoint = open_checkpoint(minilm)
    target = tmp_path / "x.qf"
    predicted = convert(checkpoint, target, recipe, dry_run=True)
    assert not target.exists()
    assert list(tmp_path.iterdir()) == []
    done = convert(checkpoint, target, recipe)
    assert predicted.nbytes == done.nbytes == target.stat().st_size
    assert predicted.bpw == done.bpw


def test_the_last_matching_pattern_of_a_recipe_decides_the_type(weights, tmp_path):
    recipe = Recipe.parse("q4_0", ["*layers*=f16", "*.1?.w=bf16", "model.norm.weight=q4_0"])
    make(hf_directory(tmp_path / "x", weights), tmp_path / "x.qf", recipe)
    with qformat.safe_open(tmp_path / "x.qf") as f:
        codec = {name: f.info(name).codec for name in f.keys()}  # noqa: SIM118
    assert codec["model.layers.9.w"] == "f16"
    assert codec["model.layers.10.w"] == codec["model.layers.11.w"] == "bf16"
    assert codec["model.embed.weight"] == codec["model.norm.weight"] == "q4_0"
    assert codec["position_ids"] == "i64"


def test_numbers_of_every_safetensors_dtype_are_kept_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    from qformat.readers.torch import TORCH_DTYPES, load_file

    patterns = torch.arange(-120, 120, dtype=torch.int8).repeat(8)
    tensors = {}
    for name, dtype in TORCH_DTYPES.items():
        tensors[name] = (patterns > 0) if dtype is torch.bool else patterns.clone().view(dtype)
        if dtype.is_floating_point:
            tensors[name] = torch.nan_to_num(tensors[name].double(), 1.0, 2.0, -2.0).to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "all.safetensors")
    make(tmp_path / "all.safetensors", tmp_path / "x.qf")
    loaded = load_file(tmp_path / "x.qf")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].view(torch.uint8).equal(tensor.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_conversion_does_not_grow_with_the_checkpoint(tmp_path):
    """Peak memory of a whole conversion, for checkpoints of one tensor each, zeros in a sparse file."""
    script = (
        "import sys; from qformat.cli import cli; cli(sys.argv[1:], standalone_mode=False);"
        # not ru_maxrss, in which the parent's memory counts
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for megabytes in (50, 1500):
        source = tmp_path / f"{megabytes}.safetensors"
        shape = [megabytes * 500, 1000]
        header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, megabytes * 10**6]}}).encode()
        with source.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + megabytes * 10**6)
        command = [sys.executable, "-c", script, "convert", str(source), str(tmp_path / "x.qf"), "--force"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] < peaks[0] + 60e6
    assert peaks[1] < 600e6


def test_chunks_of_narrow_rows_count_the_padding():
    from qformat.codecs.layout import CHUNK_ELEMENTS, Matrix

    for chunk in Matrix(1 << 20, 1).chunks(32):
        assert chunk.rows * 32 <= CHUNK_ELEMENTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metadata": {"step": 3}}, "metadata must be strings"),
        ({"metadata": {"a": "\ud800"}}, "metadata must be strings"),
        ({"assets": {"../x": b""}}, "not a plain relative path"),
        ({"tensors": {"w": [1.0]}}, "tensor 'w'"),
        ({"tensors": {"w": np.array(["text"])}}, "arrays of str"),
        ({"tensors": {"": np.ones(3)}}, "tensor name ''"),
        ({"tensors": {"w": np.ones((1,) * 17)}}, "17 dimensions"),
        ({"tensors": {"w": np.array([np.nan])}}, "holds NaN"),
    ],
)
def test_save_file_refuses_what_a_file_cannot_hold(tmp_path, arguments, message):
    from qformat.errors import SourceError

    with pytest.raises(SourceError) as caught:
        qformat.save_file(**({"tensors": {}, "path": tmp_path / "x.qf"} | arguments))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_container_writer_refuses_assets_out_of_order():
    from qformat.container.partial import NullTarget
    from qformat.container.writer import ContainerWriter

    writer = ContainerWriter(NullTarget())
    writer.asset("b", b"")
    with pytest.raises(ValueError, match="order"):
        writer.asset("a", b"x")
