"""Checkpoints behind URLs, through fsspec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_safetensors

import qformat
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError
from qformat.files import identity, source_path
from qformat.pipeline.recipe import Recipe
from tests.helpers.cli import invoke


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(3)
    tensors = {f"layer.{i}.weight": rng.normal(size=(48, 64)).astype(np.float32) for i in range(4)}
    for number in (1, 2):
        own = dict(list(tensors.items())[2 * number - 2 : 2 * number])
        save_safetensors(own, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {f"layer.{i}.weight": f"model-0000{i // 2 + 1}-of-00002.safetensors" for i in range(4)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def upload(files: Any, folder: Path) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe(f"/bucket/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return "memory://bucket"


def stored(source: Path, output: Path, kind: str | None = "q4_0") -> bytes:
    convert(open_checkpoint(source), output, Recipe.parse(kind), overwrite=True)
    return output.read_bytes()


def test_a_remote_model_folder_converts_like_a_local_one(model, memory, tmp_path):
    url = upload(memory, model)
    assert stored(source_path(url), tmp_path / "a.qf") == stored(model, tmp_path / "b.qf")
    with qformat.safe_open(tmp_path / "a.qf") as file:
        assert file.assets() == ["1_Pooling/config.json", "config.json", "tokenizer.json"]


def save_torch(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.arange(4096.0).reshape(64, 64)}}, path)


def save_legacy(path: Path) -> None:
    torch.save({"w": torch.arange(4096.0).reshape(64, 64)}, path, _use_new_zipfile_serialization=False)


def save_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.arange(4096, dtype=np.float32).reshape(64, 64))
    blocks = gguf.quants.quantize(np.arange(4096, dtype=np.float32).reshape(64, 64), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_container(path: Path) -> None:
    qformat.save_file({"w": np.arange(4096, dtype=np.float32).reshape(64, 64)}, path, "scm")


def save_single(path: Path) -> None:
    save_safetensors({"w": np.arange(4096, dtype=np.float16).reshape(64, 64)}, path)


@pytest.mark.parametrize("save", [save_torch, save_legacy, save_gguf, save_container, save_single])
def test_remote_files_of_each_format_convert_like_local_ones(memory, tmp_path, save):
    path = tmp_path / "file.bin"
    save(path)
    memory.pipe("/file.bin", path.read_bytes())
    url = source_path("memory://file.bin")
    assert stored(url, tmp_path / "a.qf", None) == stored(path, tmp_path / "b.qf", None)


@pytest.mark.parametrize("save", [save_torch, save_legacy, save_gguf, save_container, save_single])
@pytest.mark.parametrize("length", [0, 5, 600, -1])
def test_truncated_remote_files_are_refused(memory, tmp_path, save, length):
    path = tmp_path / "file.bin"
    save(path)
    memory.pipe("/file.bin", path.read_bytes()[:length])
    with pytest.raises(SourceError):
        stored(source_path("memory://file.bin"), tmp_path / "a.qf")
    assert not (tmp_path / "a.qf").exists()


def test_missing_remote_files_are_refused(memory, tmp_path):
    with pytest.raises(SourceError, match="memory://nothing: there is no such file or directory"):
        open_checkpoint(source_path("memory://nothing"))
    memory.pipe("/folder/readme.txt", b"")
    with pytest.raises(SourceError, match="memory://folder: holds no weights"):
        open_checkpoint(source_path("memory://folder"))
    with pytest.raises(SourceError, match="what://is/this: cannot be opened"):
        source_path("what://is/this")


def test_a_remote_file_that_disappears_is_named(model, memory, tmp_path):
    checkpoint = open_checkpoint(source_path(upload(memory, model)))
    memory.rm("/bucket/model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        convert(checkpoint, tmp_path / "m.qf", Recipe.parse("q4_0"))
    assert not (tmp_path / "m.qf").exists()


def test_only_the_needed_ranges_of_remote_files_are_read(model, memory, monkeypatch):
    url = upload(memory, model)
    read = []
    real = type(memory).cat_file
    monkeypatch.setattr(
        type(memory),
        "cat_file",
        lambda self, path, start=None, end=None: read.append(end - start) or real(self, path, start, end),
    )
    checkpoint = open_checkpoint(source_path(url))
    tensor = next(tensor for tensor in checkpoint.tensors if tensor.name == "layer.1.weight")
    tensor.read(slice(64, 128))
    assert read == [256]


def test_commands_take_urls(model, tmp_path):
    url = f"file://{model}"
    for name, source in (("a.qf", url), ("b.qf", model)):
        invoke("convert", source, tmp_path / name)
    assert (tmp_path / "a.qf").read_bytes() == (tmp_path / "b.qf").read_bytes()
    invoke("quantize-stats", url, "-t", "q4_0")
    invoke("convert", "memory://nothing", tmp_path / "c.qf", code=1)


def test_the_identity_of_a_url_includes_more_than_its_address():
    class Web:
        info = staticmethod(lambda path: {"name": path, "size": 5, "ETag": etags[-1]})
        ukey = staticmethod(lambda path: path)  # as fsspec has it for HTTP

    class Url:
        name, path, fs = "m.bin", "http://x/m.bin", Web

    etags = ["a"]
    first = identity(Url())  # type: ignore[arg-type]
    etags.append("b")
    assert first
    assert identity(Url()) != first  # type: ignore[arg-type]


def test_a_server_that_forbids_missing_files_is_handled(model, memory, monkeypatch):
    upload(memory, model)
    files = type(memory)
    find = files._open

    def forbid(self, path, *args, **kwargs):
        try:
            return find(self, path, *args, **kwargs)
        except FileNotFoundError:
            raise RuntimeError("403, message='Forbidden'") from None

    monkeypatch.setattr(files, "_open", forbid)
    assert len(open_checkpoint(source_path("memory://bucket/model-00001-of-00002.safetensors")).tensors) == 2
