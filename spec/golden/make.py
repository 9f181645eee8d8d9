"""Make the golden files of a format version, once: an existing folder is never touched.

    python spec/golden/make.py 1.1

Each NAME.qf has a NAME.npz beside it with the arrays that went in (``source/...``) and the arrays that a reader has to give
(``decoded/...``), decoded by the reference reader, and all are listed in SHA256SUMS.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference

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
    # enough for bits by classes; and numbers far from the others
    tensors["scm.many"] = weights(90, 400, seed=13)
    tensors["scm.far"] = np.where(weights(60, 64, seed=14) > 1, 1e6, weights(60, 64, seed=15)).astype(np.float32)
    tensors["scm.short"] = tensors["lossless.short"]
    # five values, and many letters of them
    tensors["levels.many"] = (np.round(weights(100, 300, seed=12) * 1.5) / 2).astype(np.float32)
    return {"tensors": tensors, "empty": {}}


def main() -> None:
    """Make the folder for one version."""
    import qformat  # only to write; what the files mean is decided by the reference reader

    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    for name, arrays in sources().items():
        path = folder / f"{name}.qf"
        if arrays:
            qformat.save_file(arrays, path, TYPES, assets=ASSETS, metadata=METADATA)
        else:
            qformat.save_file({}, path)
        decoded = {key: reference.decode(tensor) for key, tensor in reference.read(path.read_bytes()).tensors.items()}
        named = {f"source/{key}": value for key, value in arrays.items()}
        named |= {f"decoded/{key}": value for key, value in decoded.items()}
        np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **named)
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
