"""Which files of a directory are taken: the weights by their names, the small files by a rule, and a word for everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qformat.converters.sources import assets
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.weight_files import weight_name
from qformat.errors import SourceError
from qformat.pipeline.source import Checkpoint
from tests.helpers.checkpoints import weights
from tests.helpers.cli import invoke

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path, files: Mapping[str, Sequence[str]], **more: str) -> Path:
    """Write files that hold tensors of these names; the values are the same wherever a name stands."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: weights(len(name), 4, 8) for name in names}
        if file.endswith(".safetensors"):
            save_file(arrays, folder / file)
        else:
            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / file)
    for name, text in ({"config.json": "{}"} | more).items():
        (folder / name).write_text(text)
    return folder


def index(**places: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": places})


def taken(checkpoint: Checkpoint) -> list[str]:
    return sorted(tensor.name for tensor in checkpoint.tensors)


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    return message.replace(str(path), "DIR")


WHICH = {
    "index beside the file that it lists": (
        {"model.safetensors": "a", "mtp.safetensors": "b"},
        {INDEX: index(a="model.safetensors", b="mtp.safetensors")},
        "ab",
        [],
    ),
    "file that the index does not list": (
        {"model.safetensors": "a", "mtp.safetensors": "b"},
        {INDEX: index(a="model.safetensors")},
        "a",
        ["not taken along: mtp.safetensors"],
    ),
    "single file that the index does not list": (
        {"model.safetensors": "x", ONE: "a", TWO: "b"},
        {INDEX: index(a=ONE, b=TWO)},
        "ab",
        ["not taken along: model.safetensors"],
    ),
    "second file without an index": (
        {"model.safetensors": "a", "model-mtp.safetensors": "b"},
        {},
        "a",
        ["not taken along: model-mtp.safetensors"],
    ),
    "numbered shard and another file": (
        {"model-00001-of-00001.safetensors": "a", "mtp.safetensors": "b"},
        {},
        "a",
        ["not taken along: mtp.safetensors"],
    ),
    "files of torch beside safetensors, adapter, state of training": (
        {
            "model.safetensors": "a",
            "pytorch_model.bin": "a",
            "adapter_model.bin": "b",
            "optimizer.pt": "c",
            "sub/y.pt": "d",
        },
        {"pytorch_model.bin.index.json": index(a="pytorch_model.bin")},
        "a",
        ["not taken along: adapter_model.bin, optimizer.pt, pytorch_model.bin, pytorch_model.bin.index.json, sub/y.pt"],
    ),
    "variant beside the weights": (
        {"model.fp16.safetensors": "x", "model.safetensors": "a"},
        {},
        "a",
        ["not taken along: model.fp16.safetensors"],
    ),
    "variant alone": (
        {"model.fp16.safetensors": "a"},
        {},
        "a",
        ["the variant 'fp16' is taken, there is no other: model.fp16.safetensors"],
    ),
    "variant of safetensors before one of torch": (
        {"pytorch_model.fp16.bin": "x", "model.fp16.safetensors": "a"},
        {},
        "a",
        [
            "the variant 'fp16' is taken, there is no other: model.fp16.safetensors",
            "not taken along: pytorch_model.fp16.bin",
        ],
    ),
    "safetensors and torch file of the same other name, and a variant": (
        {"x.safetensors": "a", "x.ckpt": "b", "x.fp16.safetensors": "c"},
        {},
        "a",
        ["not taken along: x.ckpt, x.fp16.safetensors"],
    ),
    "open_clip's names": (
        {"open_clip_model.safetensors": "a", "open_clip_pytorch_model.bin": "b"},
        {},
        "a",
        ["not taken along: open_clip_pytorch_model.bin"],
    ),
    "index of another name": (
        {"x-00001-of-00001.safetensors": "ab", "y.pt": "c"},
        {"x.safetensors.index.json": index(a="x-00001-of-00001.safetensors")},
        "a",
        ["x.safetensors.index.json does not list tensor 'b': left out", "not taken along: y.pt"],
    ),
}


@pytest.mark.parametrize("name", WHICH)
def test_the_files_that_are_not_taken_are_named_once(name: str, tmp_path: Path) -> None:
    files, more, tensors, warnings = WHICH[name]
    checkpoint = open_checkpoint(write(tmp_path / "m", files, **more))
    assert taken(checkpoint) == list(tensors)
    assert list(checkpoint.warnings) == warnings
    assert set(checkpoint.assets) == {"config.json"}


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", [f"{STEM}.fp16-0000{{}}-of-00002.", f"{STEM}-0000{{}}-of-00002.fp16."])
@pytest.mark.parametrize("list_name", ["{}.index.fp16.json", "{}.fp16.index.json"])
def test_variants_may_stand_in_any_place_of_names(suffix: str, shard: str, list_name: str, tmp_path: Path) -> None:
    one, two = (shard.format(number) + suffix for number in (1, 2))
    list_name = list_name.format(f"{STEM}.{suffix}")
    source = write(tmp_path / "m", {one: "a", two: "b"}, **{list_name: index(a=one, b=two)})
    said = f"the variant 'fp16' is taken, there is no other: {list_name}"
    checkpoint = open_checkpoint(source)
    assert (taken(checkpoint), list(checkpoint.warnings), set(checkpoint.assets)) == (
        ["a", "b"],
        [said],
        {"config.json"},
    )
    # the index itself can be given; and the advice for one shard leads to all of them
    checkpoint = open_checkpoint(source / list_name)
    assert (taken(checkpoint), list(checkpoint.warnings), set(checkpoint.assets)) == (["a", "b"], [], {"config.json"})
    assert (
        open_checkpoint(source / one).warnings[0] == f"{one} is one shard of 2: give its directory for the whole model"
    )
    # the weights without a variant come first, and then the index of the variant is the way
    write(source, {f"{STEM}.{suffix}": "z"})
    assert taken(open_checkpoint(source)) == ["z"]
    assert open_checkpoint(source / one).warnings[0] == f"{one} is one shard of 2: give {list_name} for the whole model"


@pytest.mark.parametrize(
    ("name", "single", "numbers"),
    [
        ("model.safetensors", "model.safetensors", (1, 1)),
        ("model-00002-of-00003.safetensors", "model.safetensors", (2, 3)),
        ("model_2-of-3.safetensors", "model.safetensors", (2, 3)),
        ("model.02-of-03.bin", "model.bin", (2, 3)),
        ("Qwen2.5-7B-00002-of-00003.safetensors", "Qwen2.5-7B.safetensors", (2, 3)),
        ("model.safetensors.index.json", "model.safetensors", None),
        ("a.b.bin.index.json", "a.b.bin", None),
        ("vocab.index.json", None, None),
        ("config.json", None, None),
        ("index.json", None, None),
    ],
)
def test_names_of_weights_are_taken_apart(name: str, single: str | None, numbers: tuple[int, int] | None) -> None:
    found = weight_name(name)
    assert (found and found.single) == single
    if found:
        assert found.is_index is (numbers is None)
        assert numbers is None or (found.number, found.total) == numbers


def test_an_index_of_lost_shards_names_the_file_to_use_instead(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.safetensors": "a"}, **{INDEX: index(a=ONE)})
    assert refused(source) == (
        f"DIR: shard {ONE} is missing, though {INDEX} lists it; download it again, or remove {INDEX} to convert model.safetensors"
    )
    (source / INDEX).unlink()
    assert taken(open_checkpoint(source)) == ["a"]


def test_several_weights_without_usual_names_are_refused_and_each_can_be_given(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.fp16.safetensors": "a", "model.ema.safetensors": "b"})
    assert refused(source) == (
        "DIR: holds several variants of the weights, and none without one: model.ema.safetensors, model.fp16.safetensors; give one "
        "of them"
    )
    checkpoint = open_checkpoint(source / "model.fp16.safetensors")
    assert taken(checkpoint) == ["a"]
    assert list(checkpoint.warnings) == [
        "only the tensors of model.fp16.safetensors are taken, without config.json and what else is beside it"
    ]
    shards = write(tmp_path / "s", {f"{stem}-00001-of-00001.safetensors": "a" for stem in ("x", "y")})
    assert refused(shards) == (
        "DIR: holds shards of several checkpoints, and no index: x-00001-of-00001.safetensors, y-00001-of-00001.safetensors; give "
        "a directory for each"
    )


@pytest.mark.parametrize("pattern", ["model_{}-of-2.safetensors", "x.0{}-of-02.bin"])
def test_numbers_of_shards_may_be_spelled_otherwise(pattern: str, tmp_path: Path) -> None:
    one, two = pattern.format(1), pattern.format(2)
    source = write(tmp_path / "m", {one: "a", two: "b"})
    checkpoint = open_checkpoint(source)
    assert taken(checkpoint) == ["a", "b"]
    assert list(checkpoint.warnings) == [f"no index lists the tensors of the 2 shards {one} to {two}; all are taken"]
    (source / one).unlink()
    assert refused(source) == f"DIR: shard {one} is missing; download it again"


def test_files_that_differ_in_a_number_are_not_recommended_as_whole_models(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"part_1.pt": "a", "part_2.pt": "b"})
    assert refused(source) == (
        "DIR: holds several files with weights, and none has a usual name: part_1.pt, part_2.pt; give one of them if each is a "
        "whole model, or join them to one file if they are parts"
    )


def test_weights_of_other_frameworks_are_named_where_there_are_no_others(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {})
    (source / "flax_model.msgpack").write_bytes(b"x")
    (source / "tf_model.h5").write_bytes(b"x")
    assert refused(source) == (
        "DIR: holds no weights that can be read, but flax_model.msgpack, tf_model.h5, of another framework; save the model with "
        "safetensors or torch"
    )


def test_a_directory_of_container_files_is_refused_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "m.qf").write_bytes(b"")
    assert refused(tmp_path) == "DIR: holds no checkpoint of another tool; give the .qf file itself: m.qf"


def test_pieces_of_files_beside_weights_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"any.safetensors": "a"}, **{"b.gguf.part1of2": "x"})
    checkpoint = open_checkpoint(source)
    assert (taken(checkpoint), list(checkpoint.warnings)) == (["a"], ["not taken along: b.gguf.part1of2"])


def test_the_hub_cache_itself_is_refused_with_its_models(tmp_path: Path) -> None:
    cached(tmp_path / "models--x--y", {"r1": "a"})
    assert refused(tmp_path) == "DIR: is the cache of the hub; give one of its models: models--x--y"


def test_the_only_weights_given_alone_advise_their_directory(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"any.safetensors": "a"})
    assert list(open_checkpoint(source / "any.safetensors").warnings) == [
        "only the tensors of any.safetensors are taken; give its directory to include config.json and tokenizer"
    ]
    assert "config.json" in open_checkpoint(source).assets


# ---- hub cache


def cached(root: Path, revisions: Mapping[str, str], main: str | None = None) -> Path:
    """Make a folder of the hub's cache with a tensor in each revision."""
    (root / "blobs").mkdir(parents=True)
    for revision, tensor in revisions.items():
        snapshot = root / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            blob = root / "blobs" / f"{revision}-{name}"
            if name.endswith(".json"):
                blob.write_text("{}")
            else:
                save_file({tensor: weights(0, 4)}, blob)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize(
    ("revisions", "main"), [({"r1": "a"}, None), ({"r1": "a", "r2": "b"}, "r1"), ({"r1": "a"}, "lost")]
)
def test_a_folder_of_the_hub_cache_is_its_main_snapshot(
    revisions: dict[str, str], main: str | None, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(cached(tmp_path / "models--x--y", revisions, main))
    assert taken(checkpoint) == ["a"]
    assert list(checkpoint.warnings) == []
    assert set(checkpoint.assets) == {"config.json", "tokenizer.json"}


def test_a_folder_of_the_hub_cache_without_a_choice_is_refused(tmp_path: Path) -> None:
    root = cached(tmp_path / "models--x--y", {"r1": "a", "r2": "b"}, "../../other")
    assert refused(root) == (
        "DIR: is a folder of the hub's cache with 2 snapshots; give one of them: DIR/snapshots/r1, DIR/snapshots/r2"
    )
    assert taken(open_checkpoint(root / "snapshots" / "r2")) == ["b"]
    (tmp_path / "e" / "snapshots").mkdir(parents=True)
    (tmp_path / "e" / "blobs").mkdir()
    assert refused(tmp_path / "e") == "DIR: is a folder of the hub's cache without a snapshot; download the model again"


def test_dangling_links_are_named(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "models--x--y", {"r1": "a"}) / "snapshots" / "r1"
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / "models--x--y" / "blobs" / f"r1-{name}").unlink()
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.warnings) == [
        "left out, links to files that are not there: config.json, tokenizer.json; download them again"
    ]
    (tmp_path / "models--x--y" / "blobs" / "r1-model.safetensors").unlink()
    says = "is a link to ../../blobs/r1-model.safetensors, where there is no file; download it again"
    assert refused(snapshot) == f"DIR/model.safetensors: {says}"
    assert refused(snapshot / "model.safetensors") == f"DIR: {says}"


# ---- files to take along

SMALL = (
    "source.spm", "bpe.codes", "qwen.tiktoken", "sentencepiece.bpe.model", "vocab.bpe", "merges.txt", "tokenizer.vocab",
    "params.yaml", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    "1_Pooling/vocab.txt", "0_WordEmbeddings/wordembedding_config.json", "custom/deep/modeling_x.py",
)  # fmt: skip


def test_small_files_are_taken_along_whatever_their_names(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.safetensors": "a"})
    for name in SMALL:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    for hidden in (".gitattributes", ".git/config", "__pycache__/x.pyc", "m.qf.partial/journal"):
        (source / hidden).parent.mkdir(exist_ok=True)
        (source / hidden).write_text("x")
    checkpoint = open_checkpoint(source)
    assert list(checkpoint.warnings) == []
    assert {name: read() for name, read in checkpoint.assets.items() if name != "config.json"} == {
        name: name.encode() for name in SMALL
    }


def test_weights_are_known_by_content_and_folders_with_weights_are_left(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.safetensors": "a", "2_Dense/model.safetensors": "b", "onnx/model.pt": "c"})
    write(source / "2_Dense", {})
    (source / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (source / "backup").write_bytes((source / "model.safetensors").read_bytes())
    (source / "flax_model.msgpack").write_bytes(b"x")
    (source / "onnx" / "notes.txt").write_text("x")
    checkpoint = open_checkpoint(source)
    (warning,) = checkpoint.warnings
    assert warning == (
        "not taken along: backup, flax_model.msgpack, 2_Dense/model.safetensors, onnx/model.pt; nor the other files in their "
        "folders (1)"
    )
    assert set(checkpoint.assets) == {"2_Dense/config.json", "config.json", "modules.json"}


def test_a_file_with_the_name_of_a_part_of_the_source_does_not_replace_it(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "step": 3}, tmp_path / "x.pt")
    (tmp_path / "checkpoint.json").write_text("other")
    checkpoint = open_checkpoint(tmp_path)
    assert json.loads(checkpoint.assets["checkpoint.json"]()) == {"step": 3}
    assert list(checkpoint.warnings) == ["checkpoint.json has the name of what is stored of the weights: left out"]


def test_links_are_followed_inside_a_directory_only(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    source = write(tmp_path / "m", {"model.safetensors": "a"}, **{"real.txt": "x"})
    (source / "inside.txt").symlink_to("real.txt")
    (source / "notes.txt").symlink_to("../secret")
    (source / "memory.txt").symlink_to("/proc/self/mem")
    (source / "folder").symlink_to(tmp_path)
    os.mkfifo(source / "pipe.txt")
    checkpoint = open_checkpoint(source)
    assert set(checkpoint.assets) == {"config.json", "inside.txt", "real.txt"}
    assert list(checkpoint.warnings) == [
        "left out, links that lead out of the directory: memory.txt, notes.txt, folder; copy the files themselves there",
        "left out, no regular files: pipe.txt",
    ]


def test_too_large_files_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(
        tmp_path / "m", {"model.safetensors": "a"}, **{"large.txt": "x" * 50, "small.txt": "x" * 10, "z.txt": "x" * 10}
    )
    monkeypatch.setattr(assets, "MAX_BYTES", 40)
    monkeypatch.setattr(assets, "MAX_TOTAL", 15)
    checkpoint = open_checkpoint(source)
    assert set(checkpoint.assets) == {"config.json", "small.txt"}
    assert list(checkpoint.warnings) == [
        "left out, too large (more than 0 MiB, or 0 MiB and 1000 files together): large.txt, z.txt"
    ]
    monkeypatch.setattr(assets, "MAX_FILES", 2)
    (source / "sub").mkdir()
    (source / "sub" / "y.txt").write_text("")
    assert open_checkpoint(source).warnings[0].endswith(": large.txt, z.txt, sub")
    (source / "small.txt").write_text("x" * 100)
    with pytest.raises(SourceError, match=r"small\.txt: has grown beyond 0 MiB while it was read"):
        checkpoint.assets["small.txt"]()


def test_a_directory_of_one_gguf_file_takes_its_small_files_along(tmp_path: Path) -> None:
    import gguf

    for name in ("m-F16.gguf", "mmproj-m.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_tensor("a.weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (tmp_path / "README.md").write_text("x")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.assets) == {"README.md", "model.gguf-header"}
    assert list(checkpoint.warnings) == ["not taken along: mmproj-m.gguf"]


# ---- several models, or none


def test_a_pipeline_is_refused_with_the_folders_to_convert(tmp_path: Path) -> None:
    file = "diffusion_pytorch_model.safetensors"
    source = write(tmp_path / "m", {f"transformer/{file}": "a", f"vae/{file}": "b", "one.safetensors": "c"})
    (source / "model_index.json").write_text("{}")
    assert refused(source) == (
        "DIR: is a pipeline of several models (model_index.json): convert each of its folders: transformer, vae; one.safetensors "
        "beside them can be given alone"
    )
    assert taken(open_checkpoint(source / "vae")) == ["b"]
    assert taken(open_checkpoint(source / "one.safetensors")) == ["c"]


def test_folders_with_weights_are_named_where_there_are_none(tmp_path: Path) -> None:
    source = write(tmp_path / "run", {"checkpoint-5/model.safetensors": "a", "checkpoint-9/model.safetensors": "b"})
    assert (
        refused(source)
        == "DIR: holds no weights itself, but folders with weights: checkpoint-5, checkpoint-9; give one of them"
    )
    assert taken(open_checkpoint(source / "checkpoint-9")) == ["b"]


def test_a_folder_of_a_trainer_converts_with_one_line(tmp_path: Path) -> None:
    source = write(tmp_path / "checkpoint-500", {"model.safetensors": "a"}, **{"trainer_state.json": "{}"})
    names = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    zero = [
        f"global_step500/{name}" for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    ]
    (source / "global_step500").mkdir()
    for name in (*names, *zero):
        torch.save({"state": {}, "param_groups": []}, source / name)
    result = invoke("convert", source, tmp_path / "m.qf", "-t", "f32")
    assert result.stderr == f"Warning: not taken along: {', '.join(names + zero)}\n"


def test_many_shards_and_tensors_open_in_linear_time(tmp_path: Path) -> None:
    count, each = 200, 50
    files = {
        f"model-{i:05}-of-{count:05}.safetensors": [f"w.{i}.{j}" for j in range(each)] for i in range(1, count + 1)
    }
    places = {name: file for file, names in files.items() for name in names}
    (tmp_path / "m").mkdir()
    for file, names in files.items():
        save_file({name: np.ones(1, np.float32) for name in names}, tmp_path / "m" / file)
    (tmp_path / "m" / INDEX).write_text(index(**places))
    assert len(open_checkpoint(tmp_path / "m").tensors) == count * each
