"""Signs that files are parts of what several processes saved together, or pieces of one file; a part is never taken for the whole.

To support another format, add a row. The names of tensors and their shapes do not show that something is missing, so names of files
and folders have to.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qformat.converters.sources.files import WEIGHTS
from qformat.converters.sources.listing import Folder
from qformat.converters.sources.weight_files import weight_sets
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import is_remote

_SHOWN = 3
# How far parts are looked for in folders
_DEEPEST = 3
_MOST_FOLDERS = 100


class Format(NamedTuple):
    """A format of parts.

    Attributes
    ----------
    name
        What writes it.
    pattern
        Matches names of its files, or of its folders.
    advice
        How to get a whole checkpoint; ``{folder}`` stands for the folder of the parts.
    proof
        Whether the content of a single file can show that there are no other parts.
    """

    name: str
    pattern: re.Pattern[str]
    advice: str
    proof: bool = False


def _format(name: str, pattern: str, advice: str, *, proof: bool = False) -> Format:
    return Format(name, re.compile(pattern), advice, proof)


_ZERO = "join them with the script that DeepSpeed puts beside them: python zero_to_fp32.py CHECKPOINT_FOLDER merged"
_BRIDGE = "export the model to the Hugging Face layout with the tool that wrote it, such as Megatron Bridge"
_AGAIN = "use the checkpoint that it was made from"

_RANK = re.compile(r"(mp|tp)_rank_[0-9]+(_[0-9]+)*")  # folders

_FORMATS = (
    _format(
        "PyTorch's distributed checkpoints (DCP, FSDP)",
        r"__[0-9]+_[0-9]+\.distcp|\.metadata",
        "join them with python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt",
    ),
    _format(
        "PyTorch's sharded safetensors (HuggingFaceStorageWriter)",
        r"shard-[0-9]+-.+\.safetensors",
        "join them with torch.distributed.checkpoint's consolidate_safetensors_files, or save with enable_consolidation=True",
    ),
    _format("vLLM's sharded state", r"model-rank-[0-9]+-part-[0-9]+\.safetensors", _AGAIN),
    _format(
        "verl",
        r"(model|optim|extra_state)_world_size_[0-9]+_rank_[0-9]+\.pt",
        "join them with python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir merged",
    ),
    _format("DeepSpeed ZeRO", r"(\w+_)?zero_pp_rank_[0-9]+_mp_rank_[0-9]+(_\w+)?_states\.pt", _ZERO),
    _format(
        "GPT-NeoX and pipelines of DeepSpeed",
        r"layer_[0-9]+-model_[0-9]+-model_states\.pt",
        "convert them with tools/ckpts/convert_neox_to_hf.py of GPT-NeoX",
    ),
    _format(
        "DeepSpeed", r"mp_rank_[0-9]+(_\w+)?_model_states\.pt|expert_[0-9]+_mp_rank_[0-9]+_\w+\.pt", _ZERO, proof=True
    ),
    _format("Megatron-LM", rf"{_RANK.pattern}|distrib_optim\.pt|model_optim_rng\.pt", _BRIDGE),
    _format("NeMo", r".+\.nemo", "unpack it with tar -xf, and convert model_weights.ckpt if that is in it"),
    _format("TensorRT-LLM", r"rank[0-9]+\.(safetensors|engine)", _AGAIN),
    _format(
        "fairseq and metaseq",
        r".+-model_part-[0-9]+.*\.pt|.+-shard[0-9]+\.pt",
        "join them with metaseq's consolidate_fsdp_shards, or FairScale's consolidate_shard_weights",
    ),
    _format(
        "InternEvo and Colossal-AI",
        r"model(_\w+)?_tp[0-9]+(_\w+)?_pp[0-9]+.*\.pt",
        "convert them with the tools of InternEvo",
    ),
    _format(
        "one process of a parallel run",
        r"(?i)(.*[._-])?(tp|pp|mp|dp|ep|fsdp|sharded|world_size[_-]?[0-9]+)[._-]rank[._-]?[0-9]+([._-].*)?|"
        r"(.*[._-])?rank[._-]?0+([._-].*)?",
        "join them with the tool that wrote them, or save the model again as a whole",
    ),
)
_META = re.compile(r"consolidated\.([0-9]+)\.pth")
# A file in pieces: made-up.gguf.part1of2, made-up.gguf-split-a, made-up.gguf.partaa, made-up.gguf.001
_PIECE = re.compile(r"(.+?\.\w+?)[.-](?:(?:part|split)[.-]?([0-9]+of[0-9]+|[0-9]+|[a-z]{1,2})|([0-9]{3}))")


def format_of(name: str) -> Format | None:
    """Return the format of parts to which a file or folder belongs by its name."""
    return next((each for each in _FORMATS if each.pattern.fullmatch(name)), None)


def whole_of_piece(name: str) -> str | None:
    """Return the name of the file of weights of which a file is a piece, by its name."""
    piece = _PIECE.fullmatch(name)
    return piece[1] if piece and Path(piece[1]).suffix in WEIGHTS else None


def check_file(path: Path) -> Format | None:
    """Raise `SourceError` if a file is a part by its name, or by that of its folder.

    Returns the format of a file whose content may show that there are no other parts.
    """
    if whole := whole_of_piece(path.name):
        raise SourceError(f"{path}: {_joining(path, whole)}")
    if (meta := _META.fullmatch(path.name)) and (int(meta[1]) or _others(path)):
        raise SourceError(f"{path}: holds a part of each tensor, in Meta's layout; give its directory, with all parts")
    absolute = path if is_remote(path) else path.absolute()
    found = format_of(path.name) or (format_of(absolute.parent.name) if _RANK.fullmatch(absolute.parent.name) else None)
    if found is None or found.proof:
        return found
    raise part_error(path, found)


def _others(path: Path) -> bool:
    """Return whether there are other parts of Meta's layout beside a file."""
    return path.with_name("consolidated.01.pth").exists()


def part_error(path: Path, found: Format) -> SourceError:
    """Return the error for a file that is a part in some format."""
    return SourceError(f"{path}: is one part of a model, in the format of {found.name}; {_advice(found, path.parent)}")


def check_folder(folder: Folder, depth: int = 0) -> None:
    """Raise `SourceError` if a folder without whole weights, or a folder in it, holds parts."""
    absolute = folder.path if is_remote(folder.path) else folder.path.absolute()
    names = [entry.name for entry in folder.entries if entry.kind in ("file", "folder")]
    kinds = {name: found for name in names if (found := format_of(name)) and _is_weights(name, folder)}
    if kinds:
        # of several signs the most specific one, which is the first of the table
        chosen = min(kinds.values(), key=_FORMATS.index)
        _refuse(folder.path, chosen, [name for name, found in kinds.items() if found is chosen], names)
    own = format_of(absolute.name)
    if own and _RANK.fullmatch(absolute.name):
        _refuse(folder.path, own, [absolute.name], names)
    if weight_sets(folder.files):
        return
    for name in names:
        if whole := whole_of_piece(name):
            raise SourceError(f"{folder.path}: {name} {_joining(folder.path / name, whole)}")
    for entry in folder.folders[:_MOST_FOLDERS] if depth < _DEEPEST else ():
        check_folder(Folder(entry.path), depth + 1)


def _is_weights(name: str, folder: Folder) -> bool:
    suffix = Path(name).suffix
    return (
        suffix in (*WEIGHTS, ".distcp", ".nemo", ".engine")
        or name == ".metadata"
        or folder.path.joinpath(name).is_dir()
    )


def _refuse(path: Path, format_: Format, own: Sequence[str], names: Sequence[str]) -> None:
    megatron = format_ is _FORMATS[0] and not {"common.pt", "metadata.json"}.isdisjoint(names)
    advice = _BRIDGE if megatron else _advice(format_, path)
    writer = f"{format_.name}, of Megatron-LM or NeMo" if megatron else format_.name
    raise SourceError(
        f"{path}: holds parts of a model, in the format of {writer}: {', '.join(own[:_SHOWN])}{and_more(own, _SHOWN)}; {advice}"
    )


def _advice(format_: Format, folder: Path) -> str:
    return format_.advice.format(folder=shlex.quote(str(folder)))


def _joining(path: Path, whole: str) -> str:
    """Return how to join the pieces of a file, in the order of their names."""
    pieces = [entry.path for entry in Folder(path.parent).files]
    own = [piece for piece in pieces if (match := _PIECE.fullmatch(piece.name)) and match[1] == whole]
    order = sorted(own, key=lambda piece: [int(n) for n in re.findall("[0-9]+", piece.name[len(whole) :])] or [0])
    names = " ".join(shlex.quote(str(piece)) for piece in order)
    return (
        f"is a piece of a file that was cut; join the pieces: cat {names} > {shlex.quote(str(path.with_name(whole)))}"
    )
