"""The same checkpoint gives the same bytes, whatever else differs."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open

from benchmarks.context import Context
from benchmarks.inputs import Stored, minilm, write_shards
from benchmarks.report import Row, Section
from benchmarks.timing import QFORMAT, run_process
from qformat.container.verify import sha256_of

_DTYPES = {"float32": "F32", "int64": "I64"}


def _shuffled(directory: Path) -> Path:
    """Copy MiniLM, its one file cut into three shards whose tensors stand in reverse."""
    target = directory / "shuffled"
    shutil.copytree(minilm(), target, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(minilm() / "model.safetensors", framework="np") as source:
        arrays = {name: source.get_tensor(name) for name in sorted(source.keys(), reverse=True)}
    tensors = {
        name: Stored(_DTYPES[array.dtype.name], array.shape, array.nbytes, [array.tobytes()])
        for name, array in arrays.items()
    }
    names = list(tensors)
    write_shards(target, [{name: tensors[name] for name in names[i::3]} for i in range(3)])
    return target


def run(context: Context) -> Section:
    """Convert MiniLM to q4_0 in several ways."""
    folder = context.workdir / "identical"
    folder.mkdir()
    generic = {"NUMBA_CPU_NAME": "generic", "QFORMAT_CACHE_DIR": str(folder / "cache"), "QFORMAT_KERNELS": "numba"}
    ways: dict[str, tuple[Path, list[str], dict[str, str]]] = {
        "--jobs 1": (minilm(), ["--jobs", "1"], {}),
        "--jobs 2": (minilm(), ["--jobs", "2"], {}),
        "three shards, tensors in reverse": (_shuffled(folder), [], {}),
        "kernels for a generic processor": (minilm(), [], generic),
        "numpy kernels": (minilm(), [], {"QFORMAT_KERNELS": "numpy"}),
    }
    rows: list[Row] = []
    first = ""
    for name, (source, options, env) in ways.items():
        output = folder / "out.qf"
        run_process([QFORMAT, "convert", "--force", *options, source, output], env)
        digest = sha256_of(output)
        first = first or digest
        peer = "" if not rows else f"the first: {first[:16]}"
        rows.append(Row(name, f"{digest[:16]}...", peer, target="identical", met=digest == first))
    shutil.rmtree(folder)
    return Section("Identical: SHA-256 of MiniLM as q4_0", rows)
