"""The same weights give the same bytes with any number of threads, other shards and other kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qformat

LARGE, SMALL = 1500, 64  # rows of 384 for each type: more than one chunk, and few enough for numpy kernels
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "two threads": (["--jobs", "2"], {}),
    "three shards, tensors in reverse": ([], {}),
    "kernels for a generic processor": ([], {"NUMBA_CPU_NAME": "generic", "QFORMAT_KERNELS": "numba"}),
    "numpy kernels": ([], {"QFORMAT_KERNELS": "numpy"}),
}
TYPES = [
    *(f"q4_0:search={how}" for how in ("naive", "table", "exact")),
    *(f"q4_1:search={how}" for how in ("naive", "als", "best")),
    *("q5_0", "q5_1", "q8_0"),
    *(f"nlm:block={block}{mode}" for block in (32, 64, 128) for mode in ("", ",optimize=max")),
    *(f"lut:{options}" for options in ("fit=lloyd", "fit=percentile", "fit=gauss", "scale=row", "scope=block")),
    "lut:scope=block,block=256",
    *(f"affine:bits=4,group={group},sym={sym}" for sym in ("true", "false") for group in (32, 64, 128)),
    *("affine:bits=8,group=row", "affine:bits=3,group=64,sym=false", "affine:bits=2,group=64,sym=false"),
    *("ternary", "ternary:scale=group,bpw=1.3", "levels:n=7,scale=tensor", "levels:sparsity=0.5", "lossless"),
    *("scm", "scm:bpw=2.7", "scm:max_rmse=0.01"),
    *(f"{name}:coded=true" for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "nlm")),
]
every_way = pytest.mark.parametrize("way", WAYS)


def convert(source: Path, output: Path, options: Sequence[str], env: Mapping[str, str]) -> Path:
    command = [sys.executable, "-m", "qformat", "convert", "--force", *options, str(source), str(output)]
    cache = {"QFORMAT_CACHE_DIR": str(output.parent / "cache")} if env else {}
    subprocess.run(command, env=os.environ | env | cache, check=True)
    return output


def write_shards(folder: Path, arrays: Mapping[str, np.ndarray], count: int) -> Path:
    """Write a checkpoint in shards, with the tensors dealt out in their order."""
    folder.mkdir(exist_ok=True)
    places = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        some = {name: arrays[name] for name in list(arrays)[number::count]}
        save_file(some, folder / file)
        places |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def reversed_items(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: arrays[name] for name in sorted(arrays, reverse=True)}


@pytest.mark.slow
@every_way
def test_minilm_converts_to_the_same_file(way, minilm, minilm_qf, tmp_path):
    options, env = WAYS[way]
    source = minilm
    if "shards" in way:
        source = tmp_path / "shards"
        shutil.copytree(minilm, source, ignore=shutil.ignore_patterns("*.safetensors"))
        write_shards(source, reversed_items(load_file(minilm / "model.safetensors")), 3)
    found = convert(source, tmp_path / "m.qf", ["--type", "q4_0", *options], env)
    assert found.read_bytes() == minilm_qf.read_bytes()


def weights_for_each_type(minilm: Path, rows: int) -> dict[str, np.ndarray]:
    """Return for each type some rows of MiniLM, and a matrix whose rows are no whole blocks."""
    source = load_file(minilm / "model.safetensors")
    words = source["embeddings.word_embeddings.weight"]
    odd = source["encoder.layer.0.intermediate.dense.weight"]
    arrays = {}
    for number in range(len(TYPES)):
        start = number * 997 % (len(words) - rows)
        arrays[f"{number:02}.rows"] = words[start : start + rows]
        arrays[f"{number:02}.odd"] = np.ascontiguousarray(odd[number : number + 37, 13:113])
    return arrays


def segments_by_type(path: Path) -> dict[str, list[object]]:
    """Return the digests of segments and the recorded errors of each type."""
    found: dict[str, list[object]] = {type_: [] for type_ in TYPES}
    with qformat.safe_open(path) as f:
        for name in f.keys():  # noqa: SIM118
            record = f.info(name)
            found[TYPES[int(name[:2])]].append(
                (name, [(segment.sha256, segment.error) for segment in record.segments], record.error)
            )
    return found


@pytest.mark.slow
@every_way
def test_tensors_of_every_type_convert_to_the_same_segments(way, minilm, tmp_path):
    options, env = WAYS[way]
    arrays = weights_for_each_type(minilm, SMALL if way == "numpy kernels" else LARGE)
    types = ["--type", "f32", *(f"--tensor-type={number:02}.*={type_}" for number, type_ in enumerate(TYPES))]
    whole = write_shards(tmp_path / "whole", dict(sorted(arrays.items())), 1)
    other = write_shards(tmp_path / "shards", reversed_items(arrays), 3) if "shards" in way else whole
    expected = segments_by_type(convert(whole, tmp_path / "first.qf", [*types, "--jobs", "1"], {}))
    found = segments_by_type(convert(other, tmp_path / "second.qf", [*types, *options], env))
    assert [type_ for type_ in TYPES if found[type_] != expected[type_]] == []
