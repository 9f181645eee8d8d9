"""Make the golden files of a format version, once: an existing folder is never changed.

    python spec/golden/make.py 1.1

Each NAME.qf has a NAME.npz beside it with the source arrays (``source/...``) and the arrays that readers must return
(``decoded/...``), as the reference reader decodes them; SHA256SUMS lists all files. ``copied`` has tensors of types that are only
copied, and ``head`` is the head of shards.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qformat
from qformat.codecs.affine import Affine
from qformat.codecs.base import Codec
from qformat.codecs.codebook import Codebook
from qformat.codecs.fp8 import Fp8
from qformat.codecs.ggml import Ggml
from qformat.codecs.layout import Matrix
from qformat.codecs.registry import parse_type
from qformat.codecs.scaled import Scaled
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, SourceTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import reference

from tests.helpers.quantized import Codes

Array = npt.NDArray[Any]

TYPES = {
    "q4.*": "q4_0",
    "q4_naive.*": "q4_0:search=naive",
    "q4_exact.*": "q4_0:search=exact",
    "q41.*": "q4_1",
    "q41_naive.*": "q4_1:search=naive",
    "q41_best.*": "q4_1:search=best",
    "q5.*": "q5_0",
    "q51.*": "q5_1",
    "q8.*": "q8_0",
    "nlm.*": "nlm",
    "nlm64.*": "nlm:block=64",
    "nlm128.*": "nlm:block=128,optimize=max",
    "affine.*": "affine",
    "affine2.*": "affine:bits=2,group=32,sym=false,scale=bf16",
    "affine3.*": "affine:bits=3,group=64",
    "affine8.*": "affine:bits=8,group=row,scale=f32",
    "lut.*": "lut",
    "lut_row.*": "lut:scale=row,size=8,fit=gauss",
    "lut_percentile.*": "lut:size=4,fit=percentile",
    "lut_block.*": "lut:scope=block",
    "lut_block256.*": "lut:scope=block,block=256,size=8",
    "coded40.*": "q4_0:coded=true",
    "coded41.*": "q4_1:coded=true",
    "coded50.*": "q5_0:coded=true",
    "coded51.*": "q5_1:coded=true",
    "coded80.*": "q8_0:coded=true",
    "coded_nlm.*": "nlm:coded=true,block=64",
    "ternary.*": "ternary",
    "ternary_sparse.*": "ternary:scale=tensor,sparsity=0.5",
    "ternary_group.*": "ternary:scale=group,group=64,dtype=bf16",
    "levels.*": "levels:scale=tensor",
    "levels_rate.*": "levels:n=15,dtype=f32,bpw=40",
    "levels_low.*": "levels:n=7,scale=tensor,bpw=1.75",
    "lossless.*": "lossless",
    "scm.*": "scm",
    "scm_rate.*": "scm:bpw=2.7",
    "scm_bound.*": "scm:max_rmse=0.02",
    "as_f16": "f16",
    "as_bf16": "bf16",
    "as_f32": "f32",
    "as_f64": "f64",
}
ASSETS = {"config.json": b'{"model_type": "golden"}\n' * 20, "folder/notice.txt": b"short"}
METADATA = {"made for": "the tests of every later version", "ünïcode": '✓ \\ " \t'}


def weights(*shape: int, seed: int) -> Array:
    """Return float32 numbers, roughly bell-shaped, from integer arithmetic alone: the same on every machine."""
    count = int(np.prod(shape))
    state = np.arange(1, 4 * count + 1, dtype=np.uint64) * np.uint64(6364136223846793005) + np.uint64(seed)
    for _ in range(3):
        state ^= state >> np.uint64(31)
        state *= np.uint64(0x9E3779B97F4A7C15)
    uniform = (state >> np.uint64(40)).astype(np.float64) / 2.0**24 - 0.5
    return uniform.reshape(4, count).sum(axis=0).astype(np.float32).reshape(shape)


def sources() -> dict[str, dict[str, Array]]:
    """Return the arrays of each golden file."""
    x = weights(5, 70, seed=1)
    tensors: dict[str, Array] = {
        "q4.two_blocks": weights(6, 64, seed=2),
        "q4.odd_width": weights(7, 341, seed=3),
        "q4.conv": weights(8, 5, 3, seed=4),
        "q4.half": weights(4, 96, seed=5).astype(np.float16),
        "q4.vector": weights(50, seed=6),
        "q4.scalar": weights(1, seed=7).reshape(()),
        "q4.none": np.zeros((0, 64), np.float32),
        "q4.zeros": np.zeros((2, 32), np.float32),
        "q4.signed_zeros": np.where(np.arange(64).reshape(2, 32) % 2, 0.0, -0.0).astype(np.float32),
        "q4.ties": np.tile(np.array([-1.0, 1.0, 0.5, -0.5], np.float32), (3, 16)),
        "as_f16": x,
        "as_bf16": x,
        "as_f32": x.astype(np.float16),
        "as_f64": x,
        "raw.scalar": np.array(3, np.int64),
        "raw.none": np.zeros((3, 0), np.uint8),
    }
    kinds = (pattern.removesuffix(".*") for pattern in TYPES if pattern.endswith(".*"))
    for kind in kinds:
        if kind != "q4":
            cases = ("two_blocks", "odd_width", "conv", "vector", "none", "zeros", "ties")
            tensors |= {f"{kind}.{case}": tensors[f"q4.{case}"] for case in cases}
    for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
        tensors[f"raw.{name}"] = (np.arange(-3, 9).reshape(3, 4) > 0) if name == "bool" else np.arange(12).astype(name)
    for name in ("f2", "f4", "f8"):
        tensors[f"raw.{name}"] = weights(9, 3, seed=8).astype(name)
        spread = np.ldexp(weights(24, 90, seed=9), np.arange(24)[:, None] % 5 - 10)  # rows of different magnitudes
        tensors[f"lossless.{name}"] = np.where(weights(24, 90, seed=10) > 1, 0, spread).astype(name)
        if name != "f8":
            tensors[f"scm.{name}"] = tensors[f"lossless.{name}"]
            tensors[f"scm_rate.{name}"] = tensors[f"lossless.{name}"]
    tensors["lossless.short"] = np.vstack([tensors["lossless.f2"].astype(np.float32), tensors["lossless.f4"]])
    thousandth = np.arange(600_001) % 1000 == 0  # a row of two chunks
    for kind in ("ternary", "lossless", "coded40", "scm"):
        tensors[f"{kind}.long"] = np.where(thousandth, weights(601, seed=11).repeat(1000)[:600_001], 0).astype(
            np.float32
        )
    # enough weights for sections by classes; and outliers
    tensors["scm.many"] = weights(90, 400, seed=13)
    tensors["scm.far"] = np.where(weights(60, 64, seed=14) > 1, 1e6, weights(60, 64, seed=15)).astype(np.float32)
    tensors["scm.short"] = tensors["lossless.short"]
    # five values, and a long stream
    tensors["levels.many"] = (np.round(weights(100, 300, seed=12) * 1.5) / 2).astype(np.float32)
    # enough weights for the additional layer before the residual
    tensors["scm.most"] = weights(300, 256, seed=16).astype(np.float16)
    shards = {f"layer.{number}.weight": weights(32, 64, seed=60 + number) for number in range(3)}
    return {"tensors": tensors, "empty": {}, "copied": {}, "head": shards}


def some_bytes(count: int, *, seed: int, below: int = 256) -> bytes:
    """Return bytes, the same on every machine."""
    return ((weights(count, seed=seed) + 2) * 64 % below).astype(np.uint8).tobytes()


def copied() -> list[SourceTensor]:
    """Return tensors of the types that are only copied, and one of blocks, which can also be encoded from floats."""
    tensors: list[SourceTensor] = []

    def add(name: str, kind: Codec, rows: int, cols: int, *segments: bytes) -> None:
        tensors.append(Codes(name, (rows, cols), kind, segments))

    def scales(count: int, dtype: str, seed: int) -> bytes:
        return weights(count, seed=seed).astype(dtype).tobytes()

    def places(count: int, groups: int) -> bytes:
        return (np.arange(count) * 7 % groups).astype("<u4").tobytes()

    for bits in (2, 3, 4, 8):
        codes = some_bytes(5 * 3 * 4 * bits, seed=20 + bits)
        kind = Affine(bits, 33, sym=bits == 3, scale="f32" if bits == 8 else "f16", act_order=True)
        own = () if bits == 3 else (some_bytes(15, seed=30 + bits, below=1 << bits),)
        add(f"act_order.{bits}", kind, 5, 70, scales(15, "f4" if bits == 8 else "f2", bits), *own, places(70, 3), codes)
    add("act_order.none", Affine(4, 33, act_order=True), 0, 70, b"", b"", b"")
    for code, below in (("e4m3", 127), ("e5m2", 124)):
        for number, (rows, cols) in enumerate((("all", "all"), (1, "all"), (4, 32), ("all", 16), (1, 50), (3, "all"))):
            bands, groups = (1 if size == "all" else -(-n // size) for n, size in ((6, rows), (70, cols)))
            listed = (places(6, bands),) if rows not in (1, "all") else ()
            values = some_bytes(420, seed=40 + number, below=below)
            kind = Fp8(code, rows, cols, "f32")
            add(f"fp8.{code}.{number}", kind, 6, 70, scales(bands * groups, "f4", number + 1), *listed, values)
    add("fp8.none", Fp8("e4m3", 128, 128, "f16"), 0, 70, b"", b"", b"")
    integers = (
        Scaled(1, 1, 8, "f16", "f16", "sub"),
        Scaled(2, "all", "all", "f32", "none", offset=2),
        Scaled(3, 1, 64, "bf16", "bf16"),
        Scaled(4, 1, 32, "bf16", "bf16", offset=8),
        Scaled(4, 3, 1, "f16", "f32", "sub"),
        Scaled(5, 1, "all", "f32", "f16"),
        Scaled(6, 1, 50, "f16", "f16"),
        Scaled(8, "all", 1, "f32", "bf16", "sub", offset=128),
    )
    for number, kind in enumerate(integers):
        bands, groups = (1 if size == "all" else -(-n // size) for n, size in ((6, kind.rows), (70, kind.cols)))
        numbers = [
            weights(bands * groups, seed=70 + 2 * number + i).astype("f4") for i in range(1 + (kind.zero != "none"))
        ]
        parts = [
            from_array(values).cast(DTYPES[dtype]).data.tobytes()
            for values, dtype in zip(numbers, (kind.scale, kind.zero), strict=False)
        ]
        listed = (places(6, bands),) if kind.rows not in (1, "all") else ()
        add(f"scaled.{number}", kind, 6, 70, *parts, *listed, some_bytes(6 * 3 * 4 * kind.bits, seed=90 + number))
    add("scaled.none", Scaled(4, 2, 32), 0, 70, b"", b"", b"", b"")
    blocks = np.frombuffer(some_bytes(5 * 2 * 66, seed=50), np.uint8).reshape(-1, 66).copy()
    blocks[:, 64:] = weights(10, seed=51).astype("<f2").view(np.uint8).reshape(-1, 2)
    add("ggml.tq2_0", Ggml("tq2_0"), 5, 512, blocks.tobytes())
    q4_0 = np.frombuffer(some_bytes(5 * 2 * 18, seed=52), np.uint8).reshape(-1, 18).copy()
    q4_0[:, :2] = weights(10, seed=53).astype("<f2").view(np.uint8).reshape(-1, 2)
    add("q4_0", parse_type("q4_0"), 5, 64, q4_0.tobytes())
    # (name, parameters of the codec, columns)
    books: list[tuple[str, dict[str, Any], int]] = [
        ("plain", {"group": 64}, 140),
        ("short", {"group": 16, "scale": "f8_e4m3", "factor": "scale"}, 70),
        ("divisor", {"group": 16, "scale": "f8_e4m3", "factor": "divisor"}, 64),
        ("powers", {"group": 32, "scale": "f8_e8m0"}, 96),
        ("row", {"bits": 8, "group": "row", "factor": "value"}, 33),
        ("halves", {"group": 48, "scale": "f16", "factor": "value"}, 97),
        ("flat", {"group": 64, "flat": True}, 50),
        ("flat_bytes", {"bits": 8, "group": 32, "flat": True, "scale": "bf16"}, 7),
        ("transposed", {"group": 32, "scale": "f8_e8m0", "transposed": 32}, 96),
    ]
    for number, (name, parameters, cols) in enumerate(books):
        kind = Codebook(**parameters)
        matrix = Matrix(6, cols)
        sizes = {segment: length or 0 for segment, length in kind.segments(matrix)}
        bytes_ = some_bytes(sizes["scales"], seed=80 + number, below=120)
        if kind.scale in ("f32", "f16"):
            bytes_ = scales(sizes["scales"] // DTYPES[kind.scale].size, DTYPES[kind.scale].storage, 80 + number)
        contents = {
            "table": scales(1 << kind.bits, "f4", 90 + number),
            "factor": scales(1, "f4", 100 + number),
            "scales": bytes_,
            "starts": (np.arange(6) * cols).astype("<u8").tobytes(),
            "codes": some_bytes(sizes["codes"], seed=110 + number),
        }
        add(f"codebook.{name}", kind, 6, cols, *(contents[segment] for segment in sizes))
    add("codebook.none", Codebook(flat=True), 0, 70, b"", b"", b"", b"")
    tensors.append(ArrayTensor("f8_e8m0", Elements(DTYPES["f8_e8m0"], np.arange(255, dtype=np.uint8).reshape(5, 51))))
    return tensors


def write(name: str, arrays: dict[str, Array], path: Path, jobs: int | None = None) -> None:
    """Write one golden file."""
    if name == "copied":
        convert(Checkpoint(copied()), path, Recipe(), jobs=jobs)
    elif name == "head":
        tensors = [ArrayTensor(key, from_array(array)) for key, array in arrays.items()]
        readers = {key: partial(bytes, data) for key, data in ASSETS.items()}
        checkpoint = Checkpoint(tensors, readers, metadata=METADATA)
        convert(checkpoint, path, Recipe.parse("q4_0"), shard_size=2400, jobs=jobs)
    elif arrays:
        qformat.save_file(arrays, path, TYPES, assets=ASSETS, metadata=METADATA, jobs=jobs)
    else:
        qformat.save_file({}, path)


def main() -> None:
    """Make the folder for one version."""
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    every = sources()
    for name, arrays in every.items():
        write(name, arrays, folder / f"{name}.qf")
    for path in sorted(folder.glob("*.qf")):
        decoded = {key: reference.decode(tensor) for key, tensor in reference.read_path(path).tensors.items()}
        named = {f"source/{key}": value for key, value in every.get(path.stem, {}).items()}
        named |= {f"decoded/{key}": value for key, value in decoded.items()}
        np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **named)
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
