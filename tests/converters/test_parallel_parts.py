"""Parts of what several processes saved, and pieces of files, are refused with the way to a whole checkpoint."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.parallel_parts import format_of
from qformat.errors import SourceError


def refused(path: Path, root: Path | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    return message.replace(str(root or path), "DIR")


def part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"w": torch.ones(2, 2)}, path)
    else:
        torch.save({"w": torch.ones(2, 2)}, path)
    return path


ZERO = "join them with the script that DeepSpeed puts beside them: python zero_to_fp32.py CHECKPOINT_FOLDER merged"
BRIDGE = "export the model to the Hugging Face layout with the tool that wrote it, such as Megatron Bridge"
PARTS = {
    "model-rank-0-part-0.safetensors": ("vLLM's sharded state", "use the checkpoint that it was made from"),
    "model_world_size_8_rank_3.pt": (
        "verl",
        "join them with python -m verl.model_merger merge --backend fsdp --local_dir DIR --target_dir merged",
    ),
    "layer_02-model_00-model_states.pt": (
        "GPT-NeoX and pipelines of DeepSpeed",
        "convert them with tools/ckpts/convert_neox_to_hf.py of GPT-NeoX",
    ),
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": ("DeepSpeed ZeRO", ZERO),
    "zero_pp_rank_0_mp_rank_00_model_states.pt": ("DeepSpeed ZeRO", ZERO),
    "mp_rank_00_model_states.pt": ("DeepSpeed", ZERO),
    "model_optim_rng.pt": ("Megatron-LM", BRIDGE),
    "rank0.safetensors": ("TensorRT-LLM", "use the checkpoint that it was made from"),
    "checkpoint_last-model_part-0-shard0.pt": (
        "fairseq and metaseq",
        "join them with metaseq's consolidate_fsdp_shards, or FairScale's consolidate_shard_weights",
    ),
    "model_tp0_pp0.pt": ("InternEvo and Colossal-AI", "convert them with the tools of InternEvo"),
    "pytorch_model_fsdp_rank0.bin": (
        "one process of a parallel run",
        "join them with the tool that wrote them, or save the model again as a whole",
    ),
    "weights.tp_rank_01.pt": (
        "one process of a parallel run",
        "join them with the tool that wrote them, or save the model again as a whole",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_refused_alone_and_in_their_folder(name: str, tmp_path: Path) -> None:
    path = part(tmp_path / "in" / name)
    writer, advice = PARTS[name]
    assert refused(path, tmp_path / "in") == f"DIR/{name}: is one part of a model, in the format of {writer}; {advice}"
    says = f"DIR: holds parts of a model, in the format of {writer}: {name}; {advice}"
    assert refused(tmp_path / "in") == refused(tmp_path, tmp_path / "in") == says


@pytest.mark.parametrize(
    "name",
    [
        "lora-rank-32.safetensors",
        "style_rank4.safetensors",
        "pytorch_model_fsdp.bin",
        "ranker.pt",
        "shard.pt",
        "frank0lin.pt",
    ],
)
def test_other_names_are_no_signs_of_parts(name: str) -> None:
    assert format_of(name) is None


def test_megatron_folders_are_refused_at_every_level(tmp_path: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        file = part(tmp_path / "run" / "release" / rank / "model_optim_rng.pt")
    says = f"holds parts of a model, in the format of Megatron-LM: mp_rank_00, mp_rank_01; {BRIDGE}"
    assert refused(tmp_path / "run", tmp_path) == f"DIR/run/release: {says}"
    assert refused(tmp_path / "run" / "release", tmp_path) == f"DIR/run/release: {says}"
    assert "Megatron-LM" in refused(file.parent)
    assert "is one part of a model, in the format of Megatron-LM" in refused(file)
    assert "Megatron-LM" in refused(file.rename(file.with_name("renamed.pt")))


def test_a_file_of_deepspeed_that_says_it_is_the_only_part_is_read(tmp_path: Path) -> None:
    value = {"module": {"a.w": torch.ones(3, 3)}, "mp_world_size": 1, "dp_world_size": 4}
    torch.save(value, tmp_path / "mp_rank_00_model_states.pt")
    assert [t.name for t in open_checkpoint(tmp_path / "mp_rank_00_model_states.pt").tensors] == ["a.w"]
    torch.save(value | {"mp_world_size": 2}, tmp_path / "mp_rank_00_model_states.pt")
    assert "is one part of a model, in the format of DeepSpeed" in refused(tmp_path / "mp_rank_00_model_states.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    dcp.save({"model": {"w": torch.ones(2, 3)}}, checkpoint_id=str(folder), no_dist=True)
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
    parts = "holds parts of a model, in the format of PyTorch's distributed checkpoints (DCP, FSDP)"
    says = f"{parts}: .metadata, __0_0.distcp; join them with {command}"
    assert refused(folder.parent, tmp_path / "none") == f"{folder}: {says}"
    assert refused(folder, tmp_path / "none") == f"{folder}: {says}"
    assert command in refused(folder / "__0_0.distcp", tmp_path / "none")
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert [t.name for t in open_checkpoint(tmp_path / "model.pt").tensors] == ["w"]
    # Megatron's own, beside whose parts there is a file of other values
    torch.save({"iteration": 1, "rng_state": [{"torch_rng_state": torch.get_rng_state()}]}, folder / "common.pt")
    assert refused(folder) == (
        "DIR: holds parts of a model, in the format of PyTorch's distributed checkpoints (DCP, FSDP), of Megatron-LM or NeMo: "
        f".metadata, __0_0.distcp; {BRIDGE}"
    )


def test_a_header_that_says_the_file_holds_a_part_of_each_tensor_is_refused(tmp_path: Path) -> None:
    sharding = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [32, 0]}})}
    save_file({"w": torch.ones(2, 2)}, tmp_path / "any.safetensors", metadata=sharding)
    says = (
        "holds a part of each tensor (DCP_SHARDING_INFO in its header), as PyTorch's HuggingFaceStorageWriter saves them; join "
        "them with torch.distributed.checkpoint's consolidate_safetensors_files, or save with enable_consolidation=True"
    )
    assert refused(tmp_path / "any.safetensors") == f"DIR: {says}"
    assert refused(tmp_path) == f"DIR/any.safetensors: {says}"


@pytest.mark.parametrize(
    "names",
    [("m.gguf.part1of2", "m.gguf.part2of2"), ("m.gguf-split-a", "m.gguf-split-b"), ("m.gguf.partaa", "m.gguf.partab")],
)
def test_pieces_of_a_file_are_refused_with_the_command_that_joins_them(names: tuple[str, str], tmp_path: Path) -> None:
    whole = part(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "whole.pt").unlink()
    for name, data in zip(names, (whole[:700], whole[700:]), strict=True):
        (tmp_path / name).write_bytes(data)
    command = f"cat {tmp_path / names[0]} {tmp_path / names[1]} > {tmp_path / 'm.gguf'}"
    says = f"is a piece of a file that was cut; join the pieces: {command}"
    assert refused(tmp_path, tmp_path / "none") == f"{tmp_path}: {names[0]} {says}"
    assert refused(tmp_path / names[1], tmp_path / "none") == f"{tmp_path / names[1]}: {says}"
    subprocess.run(["sh", "-c", command], check=True)
    assert [tensor.name for tensor in open_checkpoint(tmp_path / "m.gguf").tensors] == ["w"]


def test_parts_in_metas_layout_are_refused_alone(tmp_path: Path) -> None:
    one = part(tmp_path / "consolidated.00.pth")
    assert [tensor.name for tensor in open_checkpoint(one).tensors] == ["w"]
    for path in (part(tmp_path / "consolidated.01.pth"), one):
        assert refused(path) == "DIR: holds a part of each tensor, in Meta's layout; give its directory, with all parts"


def test_old_parts_below_whole_weights_do_not_matter(tmp_path: Path) -> None:
    part(tmp_path / "any.safetensors")
    part(tmp_path / "old" / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
    (tmp_path / "any.safetensors").unlink()
    assert "DeepSpeed ZeRO" in refused(tmp_path)


def test_placeholders_without_elements_are_refused(tmp_path: Path) -> None:
    state = OrderedDict((f"l.{i}.weight", torch.empty(0)) for i in range(4)) | {"norm.bias": torch.ones(3)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    says = (
        "no elements in tensor 'l.0.weight' and 3 more, which DeepSpeed's ZeRO-3 leaves in place of weights; join them with python "
        "zero_to_fp32.py CHECKPOINT_FOLDER merged, or save with stage3_gather_16bit_weights_on_model_save"
    )
    assert refused(tmp_path) == f"DIR: {says}"
    assert refused(tmp_path / "pytorch_model.bin") == f"DIR: {says}"
    save_file({"a": torch.empty(0, 3), "b": torch.empty(0)}, tmp_path / "x.safetensors")
    assert refused(tmp_path / "x.safetensors") == "DIR: holds no weights: none of its 2 tensors has an element"


@pytest.mark.parametrize(
    "value", [{"cpu": torch.get_rng_state()}, {"rng_state": [{"torch_rng_state": torch.get_rng_state()}]}]
)
def test_the_state_of_random_numbers_is_no_checkpoint(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "rng_state.pth")
    says = "holds no weights, but the state of random number generators; give the file with the model's weights"
    assert refused(tmp_path / "rng_state.pth") == f"DIR: {says}"


def test_the_state_of_an_optimizer_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert "holds no tensors that have names" in refused(tmp_path / "optimizer.pt")
