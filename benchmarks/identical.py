"""The same checkpoint gives the same bytes, whatever else differs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from benchmarks.catalogue import CODED, EVERY, available
from benchmarks.context import Context
from benchmarks.inputs import Stored, minilm, minilm_matrices, write_shards
from benchmarks.report import Row, Section
from benchmarks.timing import QFORMAT, run_process
from qformat.container.reader import ContainerReader
from qformat.container.verify import sha256_of

_DTYPES = {"float32": "F32", "int64": "I64"}
_LARGE, _SMALL = 1500, 64  # rows of 384 for each type: more than one chunk, and few enough for the slow kernels


def _stored(array: np.ndarray) -> Stored:
    return Stored(_DTYPES[array.dtype.name], array.shape, array.nbytes, [array.tobytes()])


def _in_shards(directory: Path, arrays: Mapping[str, np.ndarray], count: int) -> Path:
    """Write a checkpoint in so many shards, the tensors dealt out in the order in which they are given."""
    names = list(arrays)
    write_shards(directory, [{name: _stored(arrays[name]) for name in names[i::count]} for i in range(count)])
    return directory


def _shuffled(directory: Path) -> Path:
    """Copy MiniLM, its one file cut into three shards whose tensors stand in reverse."""
    target = directory / "shuffled"
    shutil.copytree(minilm(), target, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(minilm() / "model.safetensors", framework="np") as source:
        arrays = {name: source.get_tensor(name) for name in sorted(source.keys(), reverse=True)}
    return _in_shards(target, arrays, 3)


@dataclass(frozen=True)
class _Every:
    """Checkpoints in which each type has tensors of its own, so that one file shows all types."""

    folder: Path
    types: Sequence[str]

    def _arrays(self, rows: int) -> dict[str, np.ndarray]:
        """Return for each type some rows of MiniLM, and a matrix whose rows are no whole blocks."""
        matrices = minilm_matrices()
        words, odd = (
            matrices["embeddings.word_embeddings.weight"],
            matrices["encoder.layer.0.intermediate.dense.weight"],
        )
        arrays = {}
        for number in range(len(self.types)):
            start = number * 997 % (len(words) - rows)
            arrays[f"{number:02}.rows"] = words[start : start + rows]
            arrays[f"{number:02}.odd"] = np.ascontiguousarray(odd[number : number + 37, 13:113])
        return arrays

    def written(self, name: str, rows: int, shards: int = 1) -> Path:
        """Return the directory of a new checkpoint; with more than one shard, its tensors stand in reverse."""
        directory = self.folder / name
        directory.mkdir()
        arrays = self._arrays(rows)
        order = sorted(arrays, reverse=shards > 1)
        (directory / "config.json").write_text("{}", encoding="utf-8")
        return _in_shards(directory, {name: arrays[name] for name in order}, shards)

    @property
    def options(self) -> list[str]:
        """What gives each tensor its type."""
        pairs = [f"--tensor-type={number:02}.*={text}" for number, text in enumerate(self.types)]
        return ["--type", "f32", *pairs]

    def digests(self, source: Path, options: Sequence[str], env: Mapping[str, str]) -> dict[str, list[object]]:
        """Convert, and return for each type the digests of its segments and the errors that were recorded."""
        output = self.folder / "every.qf"
        run_process([QFORMAT, "convert", "--force", *self.options, *options, source, output], env)
        found: dict[str, list[object]] = {text: [] for text in self.types}
        with ContainerReader(output) as reader:
            for record in reader.index.tensors:
                digests = [segment.sha256 for segment in record.segments]
                found[self.types[int(record.name[:2])]].append((record.name, digests, record.error))
        return found


def _minilm(folder: Path, ways: Mapping[str, tuple[list[str], dict[str, str]]]) -> Iterator[Row]:
    """Convert MiniLM to q4_0 in several ways."""
    output = folder / "out.qf"
    first = ""
    shuffled = _shuffled(folder)
    for name, (options, env) in ways.items():
        source = shuffled if name.startswith("three shards") else minilm()
        run_process([QFORMAT, "convert", "--force", *options, source, output], env)
        digest = sha256_of(output)
        peer = f"the first: {first[:16]}" if first else ""
        first = first or digest
        yield Row(f"q4_0: {name}", f"{digest[:16]}...", peer, target="identical", met=digest == first)


def _every_type(folder: Path, ways: Mapping[str, tuple[list[str], dict[str, str]]], context: Context) -> Iterator[Row]:
    """Convert a checkpoint that has tensors of every type in several ways."""
    every = _Every(folder, list(available((*EVERY, *CODED))[0]))
    rows = _SMALL if context.quick else _LARGE
    small = every.written("small", _SMALL)
    plain, shards = every.written("plain", rows), every.written("shards", rows, 3)
    first = every.digests(plain, ["--jobs", "1"], {})
    first_small = every.digests(small, [], {})
    for name, (options, env) in ways.items():
        numpy = "numpy" in name
        source = small if numpy else shards if name.startswith("three shards") else plain
        expected = first_small if numpy else first
        found = every.digests(source, options, env)
        differing = [text for text in every.types if found[text] != expected[text]]
        same = f"{len(every.types) - len(differing)} of {len(every.types)} types"
        peer = f"not {'; '.join(differing)}" if differing else "--jobs 1"
        yield Row(f"every type: {name}", same, peer, target="identical", met=not differing)


def run(context: Context) -> Section:
    """Convert in several ways: MiniLM to q4_0, and parts of it to every type."""
    folder = context.workdir / "identical"
    folder.mkdir()
    generic = {"NUMBA_CPU_NAME": "generic", "QFORMAT_CACHE_DIR": str(folder / "cache"), "QFORMAT_KERNELS": "numba"}
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "--jobs 1": (["--jobs", "1"], {}),
        "--jobs 2": (["--jobs", "2"], {}),
        "three shards, tensors in reverse": ([], {}),
        "kernels for a generic processor": ([], generic),
        "numpy kernels": ([], {"QFORMAT_KERNELS": "numpy"}),
    }
    rows = [*_minilm(folder, ways), *_every_type(folder, ways, context)]
    shutil.rmtree(folder)
    _, notes = available(EVERY)
    notes.append(
        f"Every type has {_LARGE} rows of MiniLM and 37 rows of 100 weights; {_SMALL} rows with numpy kernels."
    )
    return Section("Identical: SHA-256 of MiniLM as q4_0, and of segments of every type", rows, notes)
