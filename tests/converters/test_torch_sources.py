"""Checkpoints that torch.save wrote, against torch itself: every view and dtype, nesting, wrappers, damage and malice."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import importlib
import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import qformat
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.options import SourceOptions
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.readers.torch import TORCH_DTYPES, load_file
from tests.helpers.cli import run_all, run_cli

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
Tensors = dict[str, torch.Tensor]


def save(value: object, path: Path, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def opened(path: Path, key: str | None = None) -> Checkpoint:
    return open_checkpoint(path, SourceOptions(state_dict_key=key))


def names(checkpoint: Checkpoint) -> list[str]:
    return [tensor.name for tensor in checkpoint.tensors]


def refused(path: Path, key: str | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        opened(path, key)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1000
    return message


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(checkpoint: Checkpoint, expected: Tensors, step: int = 10**9) -> None:
    """Compare every element, read in parts of `step`."""
    assert sorted(names(checkpoint)) == sorted(expected)
    for tensor in checkpoint.tensors:
        theirs = expected[tensor.name]
        assert (tensor.shape, TORCH_DTYPES[tensor.dtype.name]) == (tuple(theirs.shape), theirs.dtype)
        count = theirs.numel()
        parts = [tensor.read(slice(i, min(i + step, count))) for i in range(0, max(count, 1), step)]
        for part in parts:
            assert part.dtype is tensor.dtype
            assert part.data.dtype == tensor.dtype.storage
            assert part.data.flags.c_contiguous
            assert part.data.flags.aligned
        assert b"".join(part.data.tobytes() for part in parts) == raw(theirs)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_view() -> Tensors:
    base = weights(6, 10)
    cube = weights(3, 4, 5, seed=1).half()
    return {
        "contiguous": base,
        "transposed": base.T,
        "every other": base[:, ::2],
        "rows": base[2:5],
        "columns": base[:, 3:7],
        "column": base[:, 1],
        "row": base[3],
        "one": base[1, 2],
        "permuted": cube.permute(2, 0, 1),
        "swapped": cube.transpose(0, 1)[:, 1:],
        "channels last": weights(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": weights(1, 7).expand(5, 7),
        "repeated": weights(3, 1).expand(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "empty in the middle": weights(4, 4)[:, 4:],
        "parameter": torch.nn.Parameter(weights(4, 3)),
        "shifted": torch.arange(9, dtype=torch.int16)[1:],
    }


@FORMATS
@pytest.mark.parametrize("step", [1, 7, 16, 10**9])
def test_torch_views_are_read_in_row_major_order(tmp_path, zipped, step):
    tensors = every_view()
    check(opened(save(tensors, tmp_path / "x.pt", zipped=zipped)), tensors, step)


@FORMATS
def test_torch_tensors_of_every_dtype_are_read_bit_for_bit(tmp_path, zipped):
    patterns = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(8)
    tensors = {}
    for name, dtype in TORCH_DTYPES.items():
        if not zipped and name in ("u16", "u32", "u64", "f8_e4m3", "f8_e5m2"):
            continue  # torch itself cannot read them back
        tensors[name] = (patterns > 0) if dtype is torch.bool else patterns.clone().view(dtype)
        tensors[f"{name} transposed"] = tensors[name].reshape(16, -1).T
    check(opened(save(tensors, tmp_path / "x.pt", zipped=zipped)), tensors, 77)


@FORMATS
def test_tied_torch_tensors_are_read_under_each_name(tmp_path, zipped):
    tied = weights(8, 4)
    tensors = {"embed.weight": tied, "head.weight": tied, "half": tied[:4]}
    check(opened(save(tensors, tmp_path / "x.pt", zipped=zipped)), tensors)


def test_reading_a_part_of_a_torch_view_reads_only_that_part(tmp_path):
    source = save({"x": torch.zeros(3, 1 << 21)[:, ::2]}, tmp_path / "x.pt")
    (tensor,) = opened(source).tensors
    tracemalloc.start()
    try:
        assert tensor.read(slice((1 << 20) - 5, (1 << 20) + 5)).data.size == 10
        assert tensor.read(slice(3 << 20, 3 << 20)).data.size == 0
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_torch_tensors_at_odd_offsets_are_aligned_when_read(tmp_path):
    tensors = {"a": weights(5, 3), "b": weights(7).double()}
    (tmp_path / "y.pt").write_bytes(zip_of(unzipped(save(tensors, tmp_path / "x.pt"))))
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        offsets = [r.header_offset + 30 + len(r.filename) for r in archive.infolist() if "/data/" in r.filename]
    assert any(offset % 4 for offset in offsets)
    check(opened(tmp_path / "y.pt"), tensors, 4)


# ---- real checkpoints


def package(name: str) -> Path:
    """Return the folder of a package (requirements-models.txt) without importing it, for which it needs others."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_a_real_folder_with_pytorch_model_bin_is_converted_exactly(tmp_path):
    source = package("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    expected = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    checkpoint = open_checkpoint(source)
    check(checkpoint, expected, 1000)
    assert {"config.json", "vocab.txt", "tokenizer_config.json"} <= set(checkpoint.assets)
    assert checkpoint.warnings == ["not taken along: training_args.bin"]
    convert(checkpoint, tmp_path / "x.qf", Recipe.parse("f32"))
    stored = load_file(tmp_path / "x.qf")
    assert {name: raw(tensor) for name, tensor in stored.items()} == {n: raw(t) for n, t in expected.items()}


def test_a_real_nested_torch_checkpoint_is_read():
    source = package("nanoguard") / "assets" / "model.pt"
    expected = torch.load(source, weights_only=True)
    checkpoint = open_checkpoint(source)
    check(checkpoint, expected["model_state_dict"])
    assert checkpoint.warnings == []
    beside = json.loads(checkpoint.assets["checkpoint.json"]())
    assert beside == {key: expected[key] for key in ("config", "metrics", "version")}


# ---- which state dict

SMALL = {"w": weights(4, 4), "b": weights(4)}
LARGE = {"w": weights(30, 30), "b": weights(30)}
ADAM = {
    "state": {0: {"exp_avg": weights(40, 40), "step": torch.tensor(3.0)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        (LARGE, None, LARGE),
        (OrderedDict(LARGE), None, LARGE),
        ({"state_dict": LARGE, "epoch": 3}, None, LARGE),
        ({"anything at all": LARGE}, None, LARGE),
        ({"a": {"b": {"c": LARGE}}}, None, LARGE),
        ({"model": LARGE, "optimizer": ADAM}, None, LARGE),
        ({"model": LARGE, "optim_state": {"exp_avg": LARGE, "exp_avg_sq": LARGE}}, None, LARGE),
        ({"model": LARGE, "center": torch.ones(3)}, None, LARGE),
        ({"model": LARGE, "head": SMALL}, None, LARGE),
        ({"optimal_model": LARGE, "norm": {"mean": torch.zeros(3), "std": torch.ones(3)}}, None, LARGE),
        ({"optimized_state_dict": LARGE, "metrics": {"acc": torch.tensor(0.9)}}, None, LARGE),
        ({"model": LARGE, "opt": ADAM, "optimizerState": {"m": weights(99, 99)}}, None, LARGE),
        ({"model": LARGE, None: 1, 0.5: "x", True: 2, (1, 2): 3}, None, LARGE),
        ({"model": LARGE, "rng": torch.get_rng_state()}, None, LARGE),
        ({"weights": {name: tensor.numpy() for name, tensor in LARGE.items()}}, None, LARGE),
        ({"model": LARGE | {"n": np.arange(4)}, "labels": np.ones((99, 99))}, None, LARGE | {"n": torch.arange(4)}),
        ({"model": LARGE, "head": SMALL}, "head", SMALL),
        ({"model": LARGE, "ema": LARGE}, "ema", LARGE),
        ({"m": {"a": LARGE, "b": SMALL}}, "m.b", SMALL),
        ({"m.a": LARGE, "m": {"a": {"x": torch.ones(2)}}}, "m.a", LARGE),
        ([LARGE, 7], None, LARGE),
        ((7, {"model": LARGE}), "1.model", LARGE),
        ({"m": {"a": SMALL, "b": SMALL}, "n": LARGE}, "m", {f"{m}.{k}": v for m in "ab" for k, v in SMALL.items()}),
        ({"a": SMALL, "b": [torch.ones(2)]}, ".", {f"a.{k}": v for k, v in SMALL.items()} | {"b.0": torch.ones(2)}),
        (LARGE, ".", LARGE),
        ({0: weights(3), "a": weights(3)}, None, {"0": weights(3), "a": weights(3)}),
        ({"m": {0: SMALL, 1: SMALL}, "adam": ADAM}, "m", {f"{i}.{k}": v for i in range(2) for k, v in SMALL.items()}),
    ],
)
def test_the_state_dict_of_a_torch_checkpoint_is_found(tmp_path, value, key, expected):
    check(opened(save(value, tmp_path / "x.pt"), key), expected)


@pytest.mark.parametrize(
    ("value", "key", "says"),
    [
        ({"model": LARGE, "ema": LARGE}, None, ["'model' (2 tensors, 930 weights)", "'ema'", "--state-dict-key"]),
        ({"encoder": LARGE, "decoder": {"w": weights(10, 20)}}, None, ["'encoder'", "'decoder'", "--state-dict-key"]),
        ({"model": LARGE}, "modle", ["'modle'", "'model' (2 tensors, 930 weights)"]),
        ({"model": LARGE}, "model.w", ["'model.w'", "'model'"]),
        ({"model": LARGE}, "", ["''", "'model'"]),
        ({str(i): LARGE for i in range(30)}, None, ["'0' (", "22 more"]),
        ({"epoch": 3}, None, ["holds no tensors"]),
        ({}, None, ["holds no tensors"]),
        (3, None, ["holds no tensors"]),
        (ADAM, None, ["holds no tensors that have names, but the state of an optimizer"]),
        ({"optimizer_state_dict": {"x": LARGE}}, None, ["but the state of an optimizer"]),
        ({"exp_avg": LARGE, "step": torch.ones(2)}, "exp", ["'exp'"]),
        (
            {"cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()[:16]]},
            None,
            ["the state of random number generators"],
        ),
        (
            {"backbone": LARGE, "head": SMALL},
            None,
            ["'backbone' (2 tensors, 930 weights)", "'head' (2 tensors, 20 weights)"],
        ),
        ({"params": LARGE, "buffers": {"mean": torch.ones(3)}}, None, ["'params'", "'buffers'"]),
        (
            {"model": {("a", 0): weights(9, 9)}, "x": {"y": weights(2)}},
            None,
            ["'model' holds tensors", "such as ('a', 0)"],
        ),
        ({"model": LARGE, "momentum": LARGE}, None, ["'model'", "'momentum'", "--state-dict-key"]),
        ({0: weights(3), "0": weights(3)}, None, ["two tensors under the key '0'"]),
        ({(1, 2): weights(3)}, None, ["holds no tensors that have names"]),
        ({"m": {"layers": LARGE, "embedding": SMALL}}, None, ["'m.layers'", "'m.embedding'", "--state-dict-key"]),
        ({"m": {"embedding": SMALL, "layers": {0: LARGE, 1: LARGE}}}, None, ["'m.layers.0'", "'m.embedding'"]),
        ({"a.b": {"c": weights(2)}, "a": {"b.c": weights(2)}}, ".", ["two tensors", "'a.b.c'"]),
        (weights(3), None, ["one tensor without a name"]),
    ],
)
def test_ambiguous_or_missing_state_dicts_are_refused(tmp_path, value, key, says):
    message = refused(save(value, tmp_path / "x.pt"), key)
    for text in says:
        assert text in message


def test_the_option_state_dict_key_selects_a_state_dict(tmp_path):
    source = save({"model": LARGE, "ema": {"w": weights(30, 30, seed=5)}}, tmp_path / "x.pt")
    wrong, right, stats = run_all(
        ["convert", source, tmp_path / "wrong.qf"],
        ["convert", source, tmp_path / "x.qf", "--state-dict-key", "ema", "-t", "f32"],
        ["quantize-stats", source, "--state-dict-key", "ema", "--json", "-"],
    )
    assert (wrong.code, right.code) == (1, 0)
    assert wrong.err.count("\n") == 1
    assert raw(load_file(tmp_path / "x.qf")["w"]) == raw(weights(30, 30, seed=5))
    assert json.loads(stats.out)["results"][0]["params"] == 900


def test_another_state_dict_key_makes_another_variant(tmp_path):
    source = save({"model": LARGE, "ema": LARGE}, tmp_path / "x.pt")
    assert opened(source, "model").variant != opened(source, "ema").variant


def test_a_state_dict_key_is_refused_for_safetensors(tmp_path):
    save_file(SMALL, tmp_path / "x.safetensors")
    assert "--state-dict-key" in refused(tmp_path / "x.safetensors", "model")


def test_entries_beside_the_state_dict_are_stored_or_named(tmp_path):
    value = {
        "model": LARGE | {"extra": {"a": 1}},
        "config": {"layers": 2, "name": "\u2028x", "sizes": (1, 2)},
        "loss": float("nan"),
        "optimizer": ADAM,
        "seen": {1, 2},
        "long": "x" * 2_000_000,
        "labels": {0: "cat"},
    }
    checkpoint = opened(save(value, tmp_path / "x.pt"))
    beside = json.loads(checkpoint.assets["checkpoint.json"]())
    assert beside == {
        "model.extra": {"a": 1},
        "config": {"layers": 2, "name": "\u2028x", "sizes": [1, 2]},
        "labels": {"0": "cat"},
    }
    (warning,) = checkpoint.warnings
    assert warning.startswith("x.pt: the state dict 'model' is taken")
    for key in ("loss", "optimizer", "seen", "long"):
        assert f"'{key}'" in warning


def test_values_of_numpy_and_python_beside_the_state_dict_are_stored(tmp_path):
    value = {
        "model": LARGE,
        "numpy": {
            "f": np.float64(0.5),
            "h": np.float16(0.25),
            "i": np.int64(3),
            "b": np.bool_(True),
            "big": np.arange(3, dtype=">i4"),
        },
        "arrays": [np.arange(4), np.asfortranarray(np.ones((2, 3), np.float32)), np.zeros((0, 2))],
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"x": [1]}),
        "ordered": OrderedDict(a=1),
        "deque": collections.deque([1, 2]),
        "size": torch.Size([2, 3]),
    }
    expected = {
        "numpy": {"f": 0.5, "h": 0.25, "i": 3, "b": True, "big": [0, 1, 2]},
        "arrays": [[0, 1, 2, 3], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], []],
        "counts": {"a": 2, "b": 1},
        "default": {"x": [1]},
        "ordered": {"a": 1},
        "deque": [1, 2],
        "size": [2, 3],
    }
    for protocol in (2, 3, 4, 5):
        torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
        checkpoint = opened(tmp_path / "x.pt")
        assert json.loads(checkpoint.assets["checkpoint.json"]()) == expected
        assert checkpoint.warnings == []


class Color(enum.Enum):
    RED = 1


class Settings(dict[str, Any]):
    pass


def test_objects_of_other_classes_are_left_out_by_name(tmp_path):
    value = {
        "model": LARGE,
        "hyper_parameters": {"lr": 0.1, "path": Path("a"), "args": argparse.Namespace(x=1)},
        "color": Color.RED,
        "settings": Settings(a=1),
        "when": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
        "records": np.zeros(2, "i4,f4"),
        "number": 1j,
        "list": [1, Path("b")],
    }
    for protocol in (2, 4):
        torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
        checkpoint = opened(tmp_path / "x.pt")
        check(checkpoint, LARGE)
        assert json.loads(checkpoint.assets["checkpoint.json"]()) == {"hyper_parameters": {"lr": 0.1}}
        module = "tests.converters.test_torch_sources"
        assert checkpoint.warnings[0] == (
            "x.pt: the state dict 'model' is taken, and 'hyper_parameters.path' (pathlib.PosixPath), 'hyper_parameters.args' "
            f"(argparse.Namespace), 'color' ({module}.Color), 'settings' ({module}.Settings), 'when' (datetime.datetime), "
            "'records', 'number', 'list' left out"
        )


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_of_every_pickle_protocol_are_read(tmp_path, zipped, protocol):
    torch.save(
        {"model": every_view()}, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )
    check(opened(tmp_path / "x.pt"), every_view())


def test_expanded_constants_are_stored_in_full_with_a_warning(tmp_path):
    tensors = {"w": weights(16, 16), "mask": torch.ones(1).expand(1024, 2048)}
    checkpoint = opened(save(tensors, tmp_path / "x.pt"))
    check(checkpoint, tensors, 100_000)
    assert checkpoint.warnings == [
        "x.pt: stored in full, though the file repeats a few elements of it (expand): 'mask' (8,388,608 bytes from 4)"
    ]


def test_torch_files_that_become_shorter_are_refused(tmp_path):
    source = save({"w": weights(1000, 1000), "t": weights(1000, 1000).T}, tmp_path / "x.pt")
    tensors = opened(source).tensors
    os.truncate(source, 10_000)
    for tensor in tensors:
        with pytest.raises(SourceError, match="became shorter"):
            tensor.read(slice(0, 1_000_000))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_torch_wrappers_are_removed(tmp_path, prefix):
    source = save({f"{prefix}{name}": tensor for name, tensor in LARGE.items()}, tmp_path / "x.pt")
    checkpoint = opened(source)
    check(checkpoint, LARGE)
    (warning,) = checkpoint.warnings
    assert all(part in warning.partition(" of ")[0] for part in prefix.split("."))


def test_a_prefix_of_some_names_only_is_kept(tmp_path):
    tensors = {"module.w": weights(3, 3), "modules.w": weights(3), "n_averaged": torch.tensor(4)}
    checkpoint = opened(save(tensors, tmp_path / "x.pt"))
    check(checkpoint, tensors)
    assert checkpoint.warnings == []


# ---- hostile and broken files


class Evil:
    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {}", f"{os.name}.system"),
        (eval, "open('{}', 'w')", "builtins.eval"),
        (exec, "open('{}', 'w')", "builtins.exec"),
        (subprocess.Popen, "touch {}", ".Popen"),
        (open, "{}", "open"),
        (os.mkdir, "{}", "mkdir"),
        (torch.save, "{}", "torch.serialization.save"),
        (torch.hub.load, "{}", "torch.hub.load"),
        (importlib.import_module, "this", "importlib.import_module"),
        (getattr, "system", "builtins.getattr"),
        (torch.nn.Linear, "3", "torch.nn.modules.linear.Linear"),
    ],
)
def test_pickled_code_is_not_executed(tmp_path, zipped, protocol, function, argument, name):
    witness = tmp_path / "witness"
    value = {
        "w": weights(3),
        "x": Evil(function, argument.format(witness)),
        "y": [Evil(function, argument.format(witness))],
    }
    torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    checkpoint = opened(tmp_path / "x.pt")
    check(checkpoint, {"w": weights(3)})
    (warning,) = checkpoint.warnings
    assert warning.startswith("x.pt: 'x' (")
    assert name in warning
    assert warning.endswith(", 'y' left out")
    assert not witness.exists()


# ways to run code that begin with names or values that are allowed, as the body of a pickle of {"w": …, "x": HERE}
CHAINS = {
    "os.system by getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nU\x08__call__tR(U\x0dtouch WITNESStR",
    "a stand-in is called": b"cposix\nsystem\n(U\x01xtR(U\x0dtouch WITNESStR",
    "an argument is called": b"cbuiltins\nmap\n(cos\nsystem\n(U\x0dtouch WITNESSltR",
    "state of a dict": b"ccollections\nOrderedDict\n)R}U\x07__len__cos\nsystem\nsb",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}U\x08__code__U\x01xstb",
    "state of a class": b"ccollections\nOrderedDict\n(N}U\x07__new__cos\nsystem\nstb",
    "old-style instance": b"(U\x0dtouch WITNESSios\nsystem\n",
    "object": b"(cos\nsystem\nU\x0dtouch WITNESSo",
    "a handler's argument": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(U\x0dtouch WITNESStNtR",
    "default factory": b"ccollections\ndefaultdict\n(cos\nsystem\ntR",
    "import by name": b"cqformat_module_of_a_test\nvalue\n",
    "dotted name": b"\x8c\x02os\x8c\x0fsystem.__call__\x93(U\x0dtouch WITNESStR",
}  # fmt: skip


@pytest.mark.parametrize("body", CHAINS.values(), ids=CHAINS)
def test_chains_of_calls_in_pickles_are_not_executed(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "qformat_module_of_a_test.py").write_text("open('WITNESS', 'w')")
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x03tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x03t(K\x01tI00\n}tR"
    data = b"\x80\x02(U\x01w" + rebuilt + b"U\x01x" + body + b"d."
    (tmp_path / "x.pt").write_bytes(zip_of({"x/data.pkl": data, "x/data/0": weights(3).numpy().tobytes()}))
    checkpoint = opened(tmp_path / "x.pt")
    check(checkpoint, {"w": weights(3)})
    assert not (tmp_path / "WITNESS").exists()
    assert "qformat_module_of_a_test" not in sys.modules


@pytest.mark.parametrize(
    "body", [b"\x82\x01", b"\x97", b"cos\nsystem\nU\x01xR", b"}U\x01a\x81", b"0000", b"h\x07", b"a", b"]N\x86}s", b"l"]
)  # extensions, buffers outside of the file, arguments that are no tuple, an empty stack, keys that cannot be hashed
def test_pickles_with_impossible_opcodes_are_refused(tmp_path, body):
    (tmp_path / "x.pt").write_bytes(zip_of({"x/data.pkl": b"\x80\x02" + body + b"."}))
    assert "is damaged" in refused(tmp_path / "x.pt")


def test_keys_that_take_for_ever_to_hash_are_refused(tmp_path):
    data = b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns."
    (tmp_path / "x.pt").write_bytes(zip_of({"x/data.pkl": data}))
    assert "a key of very many parts" in refused(tmp_path / "x.pt")


def test_pickles_that_torch_did_not_write_are_not_loaded(tmp_path):
    data = pickle.dumps({"x": Evil(os.system, f"touch {tmp_path / 'witness'}")}, protocol=4)
    (tmp_path / "y.pkl").write_bytes(data)
    assert "is a pickle" in refused(tmp_path / "y.pkl")
    (tmp_path / "z.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + data)
    assert "is damaged" in refused(tmp_path / "z.pt")
    assert not (tmp_path / "witness").exists()


def test_huge_integers_in_pickles_are_left_out(tmp_path):
    (warning,) = opened(save({"w": weights(3), "x": 10**5000}, tmp_path / "x.pt")).warnings
    assert warning == "x.pt: 'x' left out"


def test_a_pickled_module_is_refused_with_a_way_out(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2), "epoch": 3}, tmp_path / "x.pt")
    result = run_cli("convert", tmp_path / "x.pt", tmp_path / "x.qf")
    assert result.code == 1
    assert result.err == (
        f"Error: {tmp_path}/x.pt: holds an object of the class torch.nn.modules.linear.Linear in place of a state dict; load it "
        "where it was made, and save only the state dict: torch.save(model.state_dict(), ...)\n"
    )


@FORMATS
def test_truncated_torch_files_are_refused(tmp_path, zipped):
    whole = save({"model": SMALL, "epoch": 1}, tmp_path / "x.pt", zipped=zipped).read_bytes()
    source = tmp_path / "y.pt"
    for length in [*range(0, len(whole) - 1, 61), len(whole) - 1]:
        source.write_bytes(whole[:length])
        refused(source)


@FORMATS
def test_flipped_bits_of_torch_files_raise_only_source_errors(tmp_path, zipped):
    whole = save({"model": every_view(), "epoch": 1, "tag": "x"}, tmp_path / "x.pt", zipped=zipped).read_bytes()
    rng = np.random.default_rng(0)
    source = tmp_path / "y.pt"
    refusals = 0
    for position in rng.integers(0, len(whole), 250):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        source.write_bytes(damaged)
        try:
            for tensor in opened(source).tensors:
                tensor.read(slice(0, int(np.prod(tensor.shape))))
        except SourceError:
            refusals += 1
    assert refusals > 10


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def zip_of(names_and_data: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in names_and_data.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"hello", "no weights of a known kind"),
        (bytes(1000), "no weights of a known kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (pickle.dumps({"w": [1.0]}), "is a pickle"),
        (b"PK\x03\x04 and no more", "cut short or damaged"),
        (zip_of({}), "holds nothing"),
        (zip_of({"[Content_Types].xml": b"<xml/>", "word/document.xml": b""}), "'[Content_Types].xml'"),
        (zip_of({"config.json": b"{}", "model.weights.h5": b"\x89HDF"}), "'model.weights.h5'"),
        (npz(), "'a.npy'"),
        (zip_of({"m/data.pkl": b"\x80\x02}.", "m/constants.pkl": b"\x80\x02)."}), "TorchScript"),
        (zip_of({"a/data.pkl": b"", "b/data.pkl": b""}), "torch.save did not write"),
        (zip_of({"m/data.pkl": b""}), "is damaged"),
        (zip_of({"m/data.pkl": b"\x80\x02}."}, zipfile.ZIP_DEFLATED), "compressed"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused_by_kind(tmp_path, data, says):
    source = tmp_path / "model.bin"
    source.write_bytes(data)
    assert says in refused(source)


def test_compressed_torch_archives_are_refused(tmp_path):
    save({"w": torch.zeros(10_000)}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(zip_of(unzipped(tmp_path / "x.pt"), zipfile.ZIP_DEFLATED))
    assert "zip -0" in refused(tmp_path / "y.pt")


def test_checkpoints_under_the_suffix_of_another_kind_are_recognized(tmp_path):
    check(opened(save(SMALL, tmp_path / "x.safetensors")), SMALL)
    save_file(SMALL, tmp_path / "x.bin")
    check(opened(tmp_path / "x.bin"), SMALL)


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_torch_tensors_that_cannot_be_stored_are_refused_by_name(tmp_path):
    conjugate = torch.view_as_complex(torch.ones(2, 2)).conj()
    for value, what in [
        (
            torch.quantize_per_channel(torch.ones(2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
            "of dtype qint8, quantized by torch",
        ),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without values"),
        (conjugate.imag, "changes signs"),
    ]:
        message = refused(save({"fine": weights(3), "it\n": value}, tmp_path / "x.pt"))
        assert what in message
        assert r"'it\n'" in message


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_torch_tensors_of_subclasses_are_not_read_as_plain(tmp_path):
    tensors = {"w": weights(3, 4).as_subclass(Quantized), "b": weights(3)}
    assert refused(save({"model": tensors}, tmp_path / "x.pt")) == (
        f"{tmp_path}/x.pt: tensor 'w' is of the class {Quantized.__module__}.Quantized, which cannot be stored; load it where it "
        "was made, and save it as a plain tensor"
    )
    parameter = torch.nn.Parameter(weights(3, 4))
    parameter.tensor_model_parallel = True
    check(
        opened(save({"w": parameter, "b": torch.nn.Parameter(weights(3))}, tmp_path / "y.pt")),
        {"w": weights(3, 4), "b": weights(3)},
    )


class Quantized(torch.Tensor):
    pass


def test_torch_tensors_of_dtypes_that_are_not_known_are_stored_as_bytes(tmp_path):
    fnuz = torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(torch.float8_e4m3fnuz)
    numbers = torch.complex(weights(3, 4), weights(3, 4, seed=1))
    tensors = {"w": weights(32, 32), "x": fnuz.T, "c": numbers.T, "d": numbers.to(torch.complex128)}
    tensors["q"] = torch.quantize_per_tensor(weights(2, 3), 0.5, 3, torch.qint8)
    source = save(tensors, tmp_path / "x.pt")
    checkpoint = opened(source)
    assert checkpoint.warnings == [
        "x.pt: tensor 'x' and 3 more: of dtype float8_e4m3fnuz, whose numbers are not known here; stored as bytes"
    ]
    assert checkpoint.metadata == {
        "safetensors.dtype.x": '["F8_E4M3FNUZ", [6, 4]]',
        "safetensors.dtype.c": '["C64", [4, 3]]',
        "torch.dtype.d": '["complex128", [3, 4]]',
        "torch.dtype.q": '["qint8", [2, 3], 0.5, 3]',
    }
    convert(checkpoint, tmp_path / "x.qf", Recipe.parse(None))
    stored = load_file(tmp_path / "x.qf")
    assert raw(stored["q"]) == raw(tensors["q"].int_repr())
    for name in "xcd":
        assert raw(stored[name]) == raw(tensors[name])
    with pytest.raises(SourceError, match="tensor 'q' is of dtype qint8, which is stored as bytes: it can only stay"):
        convert(checkpoint, tmp_path / "y.qf", Recipe.parse("q4_0"))


def test_torch_files_that_expand_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qformat.converters.sources.state_dict._MOST_NODES", 20_000)
    assert "repeat" in refused(save({"w": torch.ones(1).expand(10**9, 10**6)}, tmp_path / "x.pt"))
    bomb: Any = "x" * 1000
    for _ in range(30):
        bomb = [bomb] * 10
    assert "nested" in refused(save({"w": weights(3), "bomb": bomb}, tmp_path / "y.pt"))
    endless: dict[str, Any] = {"w": weights(3)}
    endless["self"] = endless
    assert "nested" in refused(save(endless, tmp_path / "z.pt"))
    text: Any = {0.5: "x" * 1000}
    for _ in range(30):
        text = dict.fromkeys((i / 2 for i in range(10)), text)
    checkpoint = opened(save({"w": weights(3), "text": text}, tmp_path / "t.pt"))
    assert checkpoint.assets == {}
    assert "'text'" in checkpoint.warnings[0]


@FORMATS
def test_torch_tensors_that_exceed_their_storage_are_refused(tmp_path, zipped):
    """The pickle says that a tensor of 8 elements has 2000, or begins after its end."""
    whole = save({"w": torch.arange(8, dtype=torch.int16)}, tmp_path / "x.pt", zipped=zipped).read_bytes()
    size = b"K\x08\x85"  # the shape (8,)
    assert whole.count(size) == 1
    source = tmp_path / "y.pt"
    for other in (b"M\xd0\x07\x85", b"J\xff\xff\xff\x7f\x85", b"J\xff\xff\xff\xff\x85"):
        at = whole.index(size)
        if zipped:
            content = unzipped(tmp_path / "x.pt")
            content["x/data.pkl"] = content["x/data.pkl"].replace(size, other)
            source.write_bytes(zip_of(content))
        else:
            source.write_bytes(whole[:at] + other + whole[at + len(size) :])
        refused(source)


def test_torch_files_are_read_without_torch(tmp_path):
    source = save(SMALL, tmp_path / "x.pt")
    script = (
        "import sys; sys.modules['torch'] = None; from qformat.cli import cli;"
        f"cli(['convert', {str(source)!r}, {str(tmp_path / 'x.qf')!r}, '-t', 'f32'])"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert raw(load_file(tmp_path / "x.qf")["w"]) == raw(SMALL["w"])


# ---- directories

PARTS = {"a.w": weights(6, 8), "a.b": weights(8), "c.w": weights(5, 5, seed=2)}


def sharded(directory: Path, count: int = 3, *, index: bool = True, stem: str = "pytorch_model") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    weight_map = {}
    for i, (name, tensor) in enumerate(PARTS.items(), 1):
        file = f"{stem}-{i:05}-of-{count:05}.bin"
        save({name: tensor}, directory / file)
        weight_map[name] = file
    if index:
        (directory / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_torch_shards_convert_like_safetensors_shards(tmp_path):
    source = sharded(tmp_path / "bin")
    checkpoint = open_checkpoint(source)
    check(checkpoint, PARTS, 10)
    assert checkpoint.warnings == []
    assert set(checkpoint.assets) == {"config.json"}
    other = tmp_path / "safetensors"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file(PARTS, other / "model.safetensors")
    roots = {convert(open_checkpoint(d), tmp_path / f"{d.name}.qf", Recipe.parse("q8_0")).root for d in (source, other)}
    assert len(roots) == 1


def test_names_in_torch_shards_are_those_of_the_index(tmp_path):
    source = tmp_path / "x"
    source.mkdir()
    save({"module.a": weights(3)}, source / "1.bin")
    save({"b": weights(4)}, source / "2.bin")
    index = {"weight_map": {"module.a": "1.bin", "b": "2.bin"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert sorted(names(open_checkpoint(source))) == ["b", "module.a"]


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a.w": "pytorch_model-00009-of-00003.bin"}, "is missing"),
        ({"a.w": "../x.bin"}, "not a plain file name"),
        ({"a.w": "pytorch_model-00002-of-00003.bin"}, "it does not"),
        ({"a.w": "config.json"}, "config.json: holds no weights"),
    ],
)
def test_an_index_that_does_not_fit_the_torch_shards_is_refused(tmp_path, weight_map, says):
    source = sharded(tmp_path / "x")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert says in refused(source)


def test_safetensors_are_preferred_to_torch_files(tmp_path):
    source = sharded(tmp_path / "x", index=False)
    save({"pickled": weights(3)}, source / "pytorch_model.bin")
    save_file({"safe": weights(3)}, source / "model.safetensors")
    assert names(open_checkpoint(source)) == ["safe"]
    (source / "model.safetensors").unlink()
    assert names(open_checkpoint(source)) == ["pickled"]


def test_torch_shards_without_an_index_are_joined_with_a_warning(tmp_path):
    source = sharded(tmp_path / "x", index=False)
    checkpoint = open_checkpoint(source)
    check(checkpoint, PARTS)
    assert "no index" in checkpoint.warnings[0]
    save({"a.w": weights(1)}, source / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(SourceError, match=r"'a\.w' is in another shard too"):
        open_checkpoint(source)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin is missing" in refused(source)
    assert "-00004-of-00004.bin is missing" in refused(sharded(tmp_path / "y", 4, index=False))


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["RWKV-x.pth"], "RWKV-x.pth"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        ([ADAPTER, "optimizer.pt", "rng_state_0.pth", "training_args.bin"], ADAPTER),
        ([ADAPTER, "adapter_model.bin"], ADAPTER),
        ([ADAPTER, "model.safetensors"], "model.safetensors"),
        ([ADAPTER, "whatever.pt"], "whatever.pt"),
        (["diffusion_pytorch_model.safetensors", "whatever.pt"], "diffusion_pytorch_model.safetensors"),
        (["consolidated.safetensors", "whatever.pt"], "consolidated.safetensors"),
        (["pytorch_model.bin", "whatever.pt"], "pytorch_model.bin"),
    ],
)
def test_weight_files_under_other_names_are_found(tmp_path, files, expected):
    for file in files:
        (save_file if file.endswith(".safetensors") else save)({file: weights(3)}, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == [expected]
    assert set(checkpoint.assets) == {"config.json"}
    others = ", ".join(sorted(file for file in files if file != expected))
    variant = ["the variant 'fp16' is taken, there is no other: model.fp16.safetensors"] if "fp16" in expected else []
    assert checkpoint.warnings == [*variant, *([f"not taken along: {others}"] if others else [])]


def test_folders_without_weights_or_with_several_checkpoints_are_refused(tmp_path):
    assert "holds no weights" in refused(tmp_path)
    save(SMALL, tmp_path / "a.pt")
    save(SMALL, tmp_path / "b.ckpt")
    assert "a.pt, b.ckpt; give one of them" in refused(tmp_path)


def test_gguf_files_are_recognized_in_folders_and_under_other_names(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.bin.gguf", "llama")
    writer.add_tensor("a.weight", weights(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(open_checkpoint(tmp_path), {"a.weight": weights(4, 32)})
    (tmp_path / "model.bin.gguf").rename(tmp_path / "x.pt")  # content counts
    check(opened(tmp_path / "x.pt"), {"a.weight": weights(4, 32)})
    assert "--state-dict-key" in refused(tmp_path / "x.pt", "a")


def test_weights_in_subfolders_are_named_in_a_warning(tmp_path):
    save(SMALL, tmp_path / "pytorch_model.bin")
    (tmp_path / "2_Dense").mkdir()
    save(SMALL, tmp_path / "2_Dense" / "pytorch_model.bin")
    (warning,) = open_checkpoint(tmp_path).warnings
    assert warning == "not taken along: 2_Dense/pytorch_model.bin"


# ---- RWKV


def rwkv(**more: torch.Tensor) -> Tensors:
    common = {name: torch.ones(2, 2) for name in ("emb.weight", "head.weight")}
    common |= {name: torch.ones(2) for name in ("ln_out.weight", "blocks.0.ln0.weight", "blocks.0.ln1.weight")}
    return common | {"blocks.0.att.key.weight": torch.ones(2, 2)} | {f"blocks.0.att.{k}": v for k, v in more.items()}


LN_X = {"ln_x.weight": torch.ones(2)}
GATE = LN_X | {"gate.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("more", "version"),
    [
        ({"time_decay": torch.ones(2), "time_mix_k": torch.ones(1, 1, 2)}, "4"),
        (LN_X | {"time_decay": torch.ones(2)}, "5"),
        (GATE | {"time_decay": torch.ones(2)}, "5.1"),
        (GATE | {"time_decay": torch.ones(2, 1)}, "5.1"),
        (GATE | {"time_decay": torch.ones(2, 4)}, "5.2"),
        (GATE | {"time_maa_x": torch.ones(1, 1, 2)}, "6"),
        (LN_X | {"r_k": torch.ones(2, 2)}, "7"),
    ],
)
def test_the_version_of_an_rwkv_model_is_recorded(tmp_path, more, version):
    source = save(rwkv(**more), tmp_path / "RWKV.pth")
    assert open_checkpoint(source).metadata == {"rwkv_version": version}


def test_metadata_of_a_checkpoint_is_written_to_the_file(tmp_path):
    source = save(rwkv(), tmp_path / "RWKV.pth")
    convert(open_checkpoint(source), tmp_path / "x.qf", Recipe.parse(None))
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert f.metadata == {"rwkv_version": "4"}


def test_models_without_rwkv_keys_get_no_rwkv_version(tmp_path):
    tensors = rwkv()
    del tensors["blocks.0.ln0.weight"]
    assert open_checkpoint(save(tensors, tmp_path / "x.pth")).metadata == {}


def test_legacy_torch_files_that_claim_too_many_elements_are_refused(tmp_path):
    whole = save({"w": torch.zeros(8)}, tmp_path / "x.pt", zipped=False).read_bytes()
    # the storage's size, in the pickle and before its bytes
    claimed = whole.replace(b"K\x08N", b"J\x00\x00\x00\x40N").replace(struct.pack("<Q", 8), struct.pack("<Q", 1 << 30))
    assert len(claimed) > len(whole)
    (tmp_path / "y.pt").write_bytes(claimed)
    refused(tmp_path / "y.pt")
