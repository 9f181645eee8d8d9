"""Names of training wrappers are left out by one rule for every kind of source, and other names are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.wrappers import plain_names
from tests.helpers.checkpoints import weights


def save_one(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    save_file(dict(arrays), folder / "any.safetensors")
    return folder / "any.safetensors"


def save_directory(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    save_file(dict(arrays), folder / "model.safetensors")
    return folder


def save_torch(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "any.pt")
    return folder / "any.pt"


def save_shards(arrays: Mapping[str, np.ndarray], folder: Path, *, with_torch: bool = False) -> Path:
    stem, suffix = ("pytorch_model", ".bin") if with_torch else ("model", ".safetensors")
    places = {}
    for number, (name, array) in enumerate(arrays.items(), 1):
        file = f"{stem}-{number:05}-of-{len(arrays):05}{suffix}"
        if with_torch:
            torch.save({name: torch.from_numpy(array)}, folder / file)
        else:
            save_file({name: array}, folder / file)
        places[name] = file
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def save_torch_shards(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    return save_shards(arrays, folder, with_torch=True)


SOURCES = [save_one, save_directory, save_torch, save_shards, save_torch_shards]


@pytest.mark.parametrize("save", SOURCES)
@pytest.mark.parametrize(
    ("names", "plain", "said"),
    [
        (("_orig_mod.a.w", "_orig_mod.b"), ("a.w", "b"), "_orig_mod"),
        (("module._orig_mod.a", "module._orig_mod.b"), ("a", "b"), "_orig_mod, module"),
        (("layers.0._orig_mod.w", "head.w"), ("layers.0.w", "head.w"), "_orig_mod"),
        (("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.w", "c"), ("a.b.w", "c"), None),
    ],
)
def test_names_of_wrappers_are_left_out_and_said(
    save: Callable[[Mapping[str, np.ndarray], Path], Path],
    names: tuple[str, ...],
    plain: tuple[str, ...],
    said: str | None,
    tmp_path: Path,
) -> None:
    arrays = {name: weights(seed, 4, 8) for seed, name in enumerate(names)}
    checkpoint = open_checkpoint(save(arrays, tmp_path))
    read = {tensor.name: tensor.read(slice(0, 32)).data.tobytes() for tensor in checkpoint.tensors}
    assert read == {new: arrays[old].tobytes() for old, new in zip(names, plain, strict=True)}
    said = said or "_checkpoint_wrapped_module, _fsdp_wrapped_module"
    changed = [name for name in names if name not in plain]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    assert list(checkpoint.warnings) == [
        f"{said} of training wrappers left out of names: {changed[0]!r} is {plain[names.index(changed[0])]!r} here{more}"
    ]


@pytest.mark.parametrize("save", [save_one, save_torch])
def test_the_counter_of_an_averaged_model_goes_into_the_metadata(
    save: Callable[[Mapping[str, np.ndarray], Path], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save({"module.w": weights(0, 4), "n_averaged": np.array(7)}, tmp_path))
    assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
    assert checkpoint.metadata["n_averaged"] == "7"
    assert list(checkpoint.warnings) == [
        "module of training wrappers left out of names: 'module.w' is 'w' here",
        "'n_averaged', the counter of an averaged model, is stored in the metadata",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("module.w", "modules.w", "n_averaged"),
        ("module.w", "head.w"),
        ("model.a.w", "model.b.w"),  # Lightning's is part of the model
        ("_orig_mod.w", "w"),  # two would have the same name
        ("module.", "module.w"),
        ("n_averaged",),
        ("_orig_mod",),
    ],
)
def test_other_names_are_kept(names: tuple[str, ...]) -> None:
    assert plain_names(names) == {name: name for name in names}
