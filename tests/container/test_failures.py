"""What goes wrong while files are written or looked at: one line that says what, where and what to do, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.container.layout import MAGIC
from qformat.container.verify import verify
from tests.helpers.checkpoints import safetensors_bytes, weights, write_safetensors
from tests.helpers.cli import Result, cli_finish, cli_start, run_all, run_cli
from tests.helpers.files import Draft, put, raw_asset, raw_tensor, sha256, small_draft
from tests.helpers.reference import reference

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def one_line(result: Result, code: int = 1) -> str:
    """Assert that a command failed in an orderly way; return what it said."""
    assert "Traceback" not in result.out + result.err
    assert result.code == code, result
    lines = [line for line in result.err.splitlines() if not line.startswith(("Warning: ", "Usage: ", "Try "))]
    (line,) = [line for line in lines if line]
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def nothing_at(target: Path) -> None:
    assert not os.path.lexists(target)
    assert not os.path.lexists(f"{target}.partial")


def valid(path: Path) -> None:
    (report,) = verify([str(path)], jobs=1)
    assert report.ok, report
    reference.read(path.read_bytes())


def model(directory: Path, shards: Mapping[str, Mapping[str, np.ndarray]], weight_map: Any = None) -> Path:
    """Make a directory as the hub has them; `weight_map` stands in for the right one."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "test"}')
    for shard, arrays in shards.items():
        write_safetensors(directory / shard, arrays)
    if weight_map is None:
        weight_map = {name: shard for shard, arrays in shards.items() for name in arrays}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    ONE: {"a.weight": weights(0, 8, 40), "a.bias": weights(1, 8)},
    TWO: {"b.weight": weights(2, 8, 33), "b.ids": np.arange(5)},
}
HOME = {name: shard for shard, arrays in SHARDS.items() for name in arrays}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "model", SHARDS)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.qf"
    path.write_bytes(small_draft().pack())
    return path


def test_the_base_of_all_cases_converts(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    result = run_cli("convert", source, target)
    assert (result.code, result.err) == (0, "")
    valid(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.qf", "model"]


# ---- bad checkpoints


def index_is(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda directory: (directory / INDEX).write_bytes(data)


def map_is(weight_map: Any) -> Callable[[Path], object]:
    return index_is(json.dumps({"weight_map": weight_map}))


def shard_is(data: bytes | Callable[[bytes], bytes], shard: str = TWO) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / shard
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return change


def only(data: bytes) -> Callable[[Path], object]:
    """Make it a checkpoint of one file without an index."""

    def change(directory: Path) -> None:
        for name in (ONE, TWO, INDEX):
            (directory / name).unlink()
        (directory / SINGLE).write_bytes(data)

    return change


def replace_by_directory(name: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return change


def in_both_shards(weight_map: dict[str, str]) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        write_safetensors(directory / ONE, SHARDS[ONE] | {"twice": weights(7, 3)})
        write_safetensors(directory / TWO, SHARDS[TWO] | {"twice": weights(8, 3)})
        map_is(weight_map)(directory)

    return change


def header_is(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + body


def entry(dtype: str = "F32", shape: Sequence[Any] = (2, 3), offsets: Sequence[Any] = (0, 24)) -> bytes:
    return json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


GOOD = safetensors_bytes({"a.weight": ("f32", (8, 40), weights(0, 8, 40).tobytes())})

# name: (what to break, what the message has to contain)
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (lambda d: (d / TWO).unlink(), (TWO, "missing")),
    "half a shard": (shard_is(lambda data: data[: len(data) // 2]), (TWO, "cut short")),
    "shard without its last byte": (shard_is(lambda data: data[:-1]), (TWO, "cut short")),
    "shard of 4 bytes": (shard_is(lambda data: data[:4]), (TWO, "cut short")),
    "shard with only its header": (shard_is(lambda data: data[:40]), (TWO, "cut short")),
    "shard with a byte too many": (shard_is(lambda data: data + b"\0"), (TWO, "length")),
    "empty shard": (shard_is(b""), (TWO, "empty")),
    "shard of zeros": (shard_is(bytes(3000)), (TWO,)),
    "shard of garbage": (shard_is(np.random.default_rng(3).bytes(3000)), (TWO,)),
    "shard is a web page": (shard_is(b"<!DOCTYPE html><html>404</html>" * 40), (TWO,)),
    "shard is a pointer of git-lfs": (shard_is(b"version https://git-lfs.github.com/spec/v1\n"), (TWO,)),
    "shard is a directory": (replace_by_directory(TWO), (TWO, "not a file")),
    "shard is a broken link": (lambda d: ((d / TWO).unlink(), (d / TWO).symlink_to(d / "none")), (TWO, "missing")),
    "both shards missing": (lambda d: ((d / ONE).unlink(), (d / TWO).unlink()), (ONE, "missing")),
    "index names an absent tensor": (map_is(HOME | {"c.weight": ONE}), ("c.weight", ONE)),
    "index names the wrong shard": (map_is(HOME | {"a.weight": TWO}), ("a.weight", TWO)),
    "index leads up": (map_is(HOME | {"c": "../x.safetensors"}), ("../x.safetensors", INDEX)),
    "index leads up in the end": (map_is(HOME | {"c": ".."}), ("'..'", INDEX)),
    "index leads away": (map_is(HOME | {"c": "/etc/passwd"}), ("/etc/passwd", INDEX)),
    "index leads down": (map_is(HOME | {"c": "sub/x.safetensors"}), ("sub/x.safetensors", INDEX)),
    "index leads up on another system": (map_is(HOME | {"c": "..\\x"}), (INDEX,)),
    "index names nothing": (map_is(HOME | {"c": ""}), (INDEX,)),
    "index names a NUL": (map_is(HOME | {"c": "a\0b"}), (INDEX,)),
    "index names no Unicode": (index_is('{"weight_map": {"a": "\\ud800.safetensors"}}'), ("missing",)),
    "index names 300 letters": (map_is(HOME | {"c": "x" * 300}), ("xxx",)),
    "index is empty": (index_is(""), (INDEX,)),
    "index is not JSON": (index_is("{'weight_map': {}}"), (INDEX,)),
    "index is cut short": (index_is('{"weight_map": {"a'), (INDEX,)),
    "index is no text": (index_is(b"\xff\xfe\x00"), (INDEX,)),
    "index is an array": (index_is("[]"), (INDEX, "weight_map")),
    "index is null": (index_is("null"), (INDEX, "weight_map")),
    "index has no weight_map": (index_is('{"metadata": {}}'), (INDEX, "weight_map")),
    "index has an empty weight_map": (map_is({}), (INDEX, "weight_map")),
    "index has a list of weights": (map_is([ONE, TWO]), (INDEX, "weight_map")),
    "index has a text of weights": (map_is(ONE), (INDEX, "weight_map")),
    "index maps to numbers": (map_is({"a.weight": 1}), (INDEX, "weight_map")),
    "index maps to null": (map_is({"a.weight": None}), (INDEX, "weight_map")),
    "index is nested deeply": (index_is("[" * 200_000), (INDEX,)),
    "index is a directory": (replace_by_directory(INDEX), (INDEX,)),
    "tensor in two shards": (in_both_shards(HOME), ("twice", "two shards")),
    "no weights": (lambda d: [(d / name).unlink() for name in (ONE, TWO, INDEX)], ("model.safetensors",)),
    "single file: empty": (only(b""), (SINGLE, "empty")),
    "single file: half": (only(GOOD[: len(GOOD) // 2]), (SINGLE, "cut short")),
    "single file: garbage": (only(np.random.default_rng(4).bytes(500)), (SINGLE,)),
    "single file: is a directory": (lambda d: (d / SINGLE).mkdir(), (SINGLE, "not a file")),
    "single file: header of 2^63 bytes": (only(b"\xff" * 7 + b"\x7f{" + bytes(100)), (SINGLE,)),
    "single file: header is no JSON": (only(header_is(b'{"a.weight": ' + b" " * 20)), (SINGLE,)),
    "single file: header is an array": (only(header_is(b"[1, 2, 3]")), (SINGLE,)),
    "single file: offsets overlap": (
        only(
            header_is(
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
                bytes(12),
            )
        ),
        (SINGLE,),
    ),
    "single file: offsets beyond the end": (only(header_is(entry(offsets=(24, 48)), bytes(24))), (SINGLE,)),
    "single file: offsets backwards": (only(header_is(entry(offsets=(24, 0)), bytes(24))), (SINGLE,)),
    "single file: shape and length differ": (only(header_is(entry(shape=(2, 4)), bytes(24))), (SINGLE,)),
    "single file: absurd shape": (only(header_is(entry(shape=(2**40, 2**40)), bytes(24))), (SINGLE,)),
    "single file: negative shape": (only(header_is(entry(shape=(-2, -3)), bytes(24))), (SINGLE,)),
    "single file: unknown dtype": (only(header_is(entry(dtype="Q9"), bytes(24))), (SINGLE,)),
    "single file: dtype that cannot be stored": (
        only(header_is(entry(dtype="C64", offsets=(0, 48)), bytes(48))),
        (SINGLE, "a.weight", "C64"),
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_checkpoints_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    change, says = BAD_SOURCES[name]
    change(source)
    before = sorted(source.rglob("*"))
    target = tmp_path / "m.qf"
    message = one_line(run_cli("convert", source, target))
    for text in (str(source), *says):
        assert text in message
    assert len(message) < 1000
    nothing_at(target)
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("name", ["missing shard", "half a shard", "index is not JSON", "no weights"])
def test_statistics_of_bad_checkpoints_are_refused(name: str, source: Path) -> None:
    change, says = BAD_SOURCES[name]
    change(source)
    message = one_line(run_cli("quantize-stats", source))
    for text in (str(source), *says):
        assert text in message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (GOOD[: len(GOOD) // 2], "cut short"),
        (GOOD[:5], "cut short"),
        (b"PK\x03\x04" + bytes(100), "not a whole zip archive"),
        (bytes(100), "does not have the length"),
        (small_draft().pack()[:200], "truncated"),
    ],
)
def test_bad_source_files_are_refused(data: bytes, says: str, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    source.write_bytes(data)
    message = one_line(run_cli("convert", source, tmp_path / "m.qf"))
    assert str(source) in message
    assert says in message
    nothing_at(tmp_path / "m.qf")


def test_a_source_that_does_not_exist(tmp_path: Path) -> None:
    for command in (["convert", tmp_path / "none", tmp_path / "m.qf"], ["quantize-stats", tmp_path / "none"]):
        assert str(tmp_path / "none") in one_line(run_cli(*command))
    nothing_at(tmp_path / "m.qf")


def test_a_failed_run_leaves_the_file_that_was_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.write_bytes(b"precious")
    (source / TWO).unlink()
    one_line(run_cli("convert", source, target, "--force"))
    write_safetensors(source / TWO, {"b.weight": np.full((8, 33), np.nan, np.float32), "b.ids": np.arange(5)})
    one_line(run_cli("convert", source, target, "--force"))
    assert target.read_bytes() == b"precious"
    assert not Path(f"{target}.partial").exists()


def test_a_tensor_that_the_index_does_not_list_is_taken_along(source: Path, tmp_path: Path) -> None:
    write_safetensors(source / TWO, SHARDS[TWO] | {"extra": weights(9, 3), "extra 2": weights(9, 4)})
    result = run_cli("convert", source, tmp_path / "m.qf")
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("Warning: ")
    assert "'extra' and 1 more" in line
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.get_tensor("extra").tobytes() == weights(9, 3).tobytes()


def test_a_listed_tensor_in_two_shards_comes_from_the_one_that_is_named(source: Path, tmp_path: Path) -> None:
    in_both_shards(HOME | {"twice": TWO})(source)
    assert run_cli("convert", source, tmp_path / "m.qf").code == 0
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.get_tensor("twice").tobytes() == weights(8, 3).tobytes()


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31mb", "n" * 1025])
def test_tensor_names_that_the_format_has_not(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": weights(0, 3), name: weights(0, 4)})
    assert "name" in one_line(run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf"))
    nothing_at(tmp_path / "m.qf")


@pytest.mark.parametrize("name", [b"a:b.json", b"a\\b.json", b"a\nb.json", b"\xff.json"])
def test_asset_names_that_the_format_has_not(name: bytes, source: Path, tmp_path: Path) -> None:
    (source / os.fsdecode(name)).write_text("{}")
    result = run_cli("convert", source, tmp_path / "m.qf")
    assert result.code == 0
    assert result.err.startswith("Warning: asset name")
    assert result.err.endswith(": left out\n")
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.assets() == ["config.json"]


# ---- values that cannot be stored

SIZES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "f8_e4m3": 1, "f8_e5m2": 1}
SIGNALING = {
    "f32": 0x7F812345,
    "f16": 0xFC01,
    "bf16": 0xFF81,
    "f64": 0x7FF0000000000001,
    "f8_e4m3": 0xFF,
    "f8_e5m2": 0xFD,
}
INFINITY = {"f32": 0xFF800000, "f16": 0x7C00, "bf16": 0x7F80, "f64": 0xFFF0000000000000, "f8_e5m2": 0x7C}


def patterns(dtype: str, bits: int) -> bytes:
    """Return 2 x 40 elements of which one has these bits and the others are 0.5 or so."""
    size = SIZES[dtype]
    half = {"f32": 0x3F000000, "f16": 0x3800, "bf16": 0x3F00, "f64": 0x3FE0 << 48, "f8_e4m3": 0x30, "f8_e5m2": 0x38}
    data = bytearray(half[dtype].to_bytes(size, "little") * 80)
    data[37 * size : 38 * size] = bits.to_bytes(size, "little")
    return bytes(data)


def stored_bytes(path: Path, name: str) -> bytes:
    with qformat.safe_open(path) as file:
        (segment,) = file.info(name).segments
    return path.read_bytes()[segment.offset : segment.stop]


def broken_source(path: Path, dtype: str, bits: int) -> bytes:
    """Make a checkpoint with two broken tensors; return the bytes of both."""
    bad = patterns(dtype, bits)
    tensors = {
        "a.fine": ("f32", (2, 40), weights(0, 2, 40).tobytes()),
        "b.broken": (dtype, (2, 40), bad),
        "c.broken": (dtype, (80,), bad),
    }
    path.write_bytes(safetensors_bytes(tensors))
    return bad


@pytest.mark.parametrize(("dtype", "bits"), [*SIGNALING.items(), *INFINITY.items()])
def test_nan_and_infinity_are_refused_by_name(dtype: str, bits: int, tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    bad = broken_source(source, dtype, bits)
    refused, kept = run_all(["convert", source, tmp_path / "none.qf"], ["convert", source, target, "--allow-nonfinite"])
    message = one_line(refused)
    assert "'b.broken'" in message
    assert "NaN or infinity" in message
    assert "--allow-nonfinite" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.qf", "x.safetensors"]
    assert kept.code == 0
    assert kept.err == f"Warning: tensor 'b.broken' holds NaN or infinity and is kept as {dtype}, not q4_0\n"
    valid(target)
    with qformat.safe_open(target) as file:
        kinds = {name: file.info(name).codec for name in file.keys()}  # noqa: SIM118
    assert kinds == {"a.fine": "q4_0", "b.broken": dtype, "c.broken": dtype}
    assert stored_bytes(target, "b.broken") == bad
    assert stored_bytes(target, "c.broken") == bad


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f8_e4m3"])
def test_nan_is_refused_whatever_the_type(dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    broken_source(source, dtype, SIGNALING[dtype])
    results = run_all(
        ["convert", source, tmp_path / "1.qf", "-t", "f32"],
        ["convert", source, tmp_path / "2.qf", "--tensor-type", "*=f16"],
        ["quantize-stats", source],
        ["quantize-stats", source, "--exclude", "b"],
    )
    for result in results[:-1]:
        assert "'b.broken'" in one_line(result)
    assert (results[-1].code, results[-1].err) == (0, "")
    assert list(tmp_path.iterdir()) == [source]


def test_compiled_kernels_find_nan_and_infinity_too(tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    every = [
        (f"{dtype} {i}", dtype, bits) for i, table in enumerate((SIGNALING, INFINITY)) for dtype, bits in table.items()
    ]
    tensors = {name: (dtype, (2, 40), patterns(dtype, bits)) for name, dtype, bits in every}
    source.write_bytes(safetensors_bytes(tensors))
    env = {"QFORMAT_KERNELS": "numba"}
    refused, kept = run_all(
        ["convert", source, tmp_path / "none.qf"], ["convert", source, target, "--allow-nonfinite"], env=env
    )
    assert "'bf16 0'" in one_line(refused)
    assert kept.code == 0
    assert all(f"Warning: tensor {name!r} holds NaN or infinity and is kept as" in kept.err for name in tensors)
    for name, (_, _, data) in tensors.items():
        assert stored_bytes(target, name) == data


def test_nonfinite_in_the_last_element_of_a_large_tensor(tmp_path: Path) -> None:
    array = np.zeros((1100, 1000), np.float32)
    array[-1, -1] = np.inf
    write_safetensors(tmp_path / "x.safetensors", {"w": array})
    assert "'w'" in one_line(run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf"))
    nothing_at(tmp_path / "m.qf")


def to_bf16(array: np.ndarray) -> bytes:
    return (np.asarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


TOO_LARGE: dict[str, tuple[str, bytes, list[str]]] = {
    "f32 for q4_0": ("f32", np.full((2, 40), 1e6, np.float32).tobytes(), []),
    "bf16 for q4_0": ("bf16", to_bf16(np.full((2, 40), 1e38)), []),
    "f64 for q4_0": ("f64", np.full((2, 40), 1e6).tobytes(), []),
    "f64 beyond f32 for q4_0": ("f64", np.full((2, 40), 1e300).tobytes(), []),
    "f32 for f16": ("f32", np.full((2, 40), 65520, np.float32).tobytes(), ["-t", "f16"]),
    "f32 for bf16": ("f32", np.full((2, 40), np.finfo(np.float32).max).tobytes(), ["-t", "bf16"]),
    "f64 for f32": ("f64", np.full((2, 40), 1e39).tobytes(), ["-t", "f32"]),
    "f64 for f16": ("f64", np.full((2, 40), 1e300).tobytes(), ["-t", "f16"]),
}


def the_way_out(message: str) -> str:
    """Return what the message says to give as --tensor-type, as a shell would read it."""
    (advice,) = re.findall("keep it with (.*?)(?:, or accept .*)?$", message)
    option, value = shlex.split(advice)
    assert option == "--tensor-type"
    return value


def test_the_way_out_fits_every_name(tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    name = "a[0] 'b' \"c\" * ? $HOME !d\\e"
    write_safetensors(source, {name: np.full((2, 40), 1e6, np.float32), "a0": weights(0, 2, 40)})
    message = one_line(run_cli("convert", source, target))
    assert run_cli("convert", source, target, "--tensor-type", the_way_out(message)).code == 0
    with qformat.safe_open(target) as file:
        assert (file.info(name).codec, file.info("a0").codec) == ("f32", "q4_0")


@pytest.mark.parametrize("name", TOO_LARGE)
def test_values_too_large_are_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    dtype, data, options = TOO_LARGE[name]
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    source.write_bytes(safetensors_bytes({"w": (dtype, (2, 40), data)}))
    converted, measured = run_all(["convert", source, target, *options], ["quantize-stats", source, *options])
    message = one_line(converted)
    assert "'w'" in message
    assert "too large" in message
    nothing_at(target)
    way_out = the_way_out(message)
    assert run_cli("convert", source, target, *options, "--tensor-type", way_out).code == 0
    assert stored_bytes(target, "w") == data
    assert "'w'" in one_line(measured)


@pytest.mark.parametrize("value", [1e300, 1e-300, -1.7e308])
def test_statistics_of_values_beyond_binary32(value: float, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"w": np.full((2, 40), value)})
    for result in run_all(*(["quantize-stats", tmp_path / "x.safetensors", "-t", kind] for kind in ("f64", "f32"))):
        if result.code:
            assert "'w'" in one_line(result)
        else:
            assert result.err in (
                "",
                "Warning: w: 1 blocks would become zero as f32; convert refuses that by default\n",
            )
            assert "nan" not in result.out


TOO_SMALL = {
    "f32": np.full((2, 40), 1e-9, np.float32).tobytes(),
    "f32 subnormal": np.full((2, 40), 1e-42, np.float32).tobytes(),
    "bf16": to_bf16(np.full((2, 40), -1e-9)),
    "f64": np.full((2, 40), 1e-9).tobytes(),
    "f64 below f32": np.full((2, 40), 1e-300).tobytes(),
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_blocks_that_would_vanish_are_refused_with_two_ways_out(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    dtype = name.split(maxsplit=1)[0]
    fine = weights(0, 2, 40).tobytes()
    source.write_bytes(safetensors_bytes({"fine": ("f32", (2, 40), fine), "w": (dtype, (2, 40), TOO_SMALL[name])}))
    message = one_line(run_cli("convert", source, target))
    assert "'w'" in message
    assert "too small" in message
    assert "--allow-zeroed" in message
    nothing_at(target)
    way_out = the_way_out(message)
    other = tmp_path / "other.qf"
    results = run_all(
        ["convert", source, other, "--tensor-type", way_out], ["convert", source, target, "--allow-zeroed"]
    )
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    assert stored_bytes(other, "w") == TOO_SMALL[name]
    valid(target)
    with qformat.safe_open(target) as file:
        assert not file.get_tensor("w").any()
        assert file.get_tensor("fine").any()
        error = file.info("w").error
    assert error is not None
    if name != "f64 below f32":  # which binary32, the measure of errors, cannot tell from zero
        assert error.maximum > 0


@pytest.mark.parametrize(("dtype", "tiny"), [("<f4", 1e-30), ("<f8", 1e-30), ("<f8", 1e-300)])
def test_a_tiny_value_among_others_is_no_zeroed_block(dtype: str, tiny: float, tmp_path: Path) -> None:
    array = weights(0, 2, 40).astype(dtype)
    array[1, 3] = tiny
    write_safetensors(tmp_path / "x.safetensors", {"w": array})
    assert run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf").code == 0


def test_zeros_are_no_zeroed_blocks(tmp_path: Path) -> None:
    array = weights(0, 2, 64)
    array[1] = 0
    array[0, :32] = -0.0
    write_safetensors(tmp_path / "x.safetensors", {"w": array})
    assert run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf").code == 0


# ---- targets


def test_a_file_that_exists_is_kept_unless_forced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.write_bytes(b"precious")
    message = one_line(run_cli("convert", source, target))
    assert str(target) in message
    assert "--force" in message
    assert target.read_bytes() == b"precious"
    assert run_cli("convert", source, target, "--dry-run").code == 0
    assert target.read_bytes() == b"precious"
    assert run_cli("convert", source, target, "--force").code == 0
    valid(target)
    assert not Path(f"{target}.partial").exists()


def test_a_broken_link_at_the_target_is_kept_unless_forced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.symlink_to(tmp_path / "elsewhere")
    assert "--force" in one_line(run_cli("convert", source, target))
    assert target.is_symlink()
    assert run_cli("convert", source, target, "--force").code == 0
    assert not target.is_symlink()
    valid(target)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("directory", "is a directory"),
        ("", "is a directory"),
        ("none/m.qf", "does not exist"),
        ("file/m.qf", "file"),
        ("x" * 250 + ".qf", "too long"),
        ("x" * 300 + ".qf", "too long"),
        ("pipe", "not a regular file"),
    ],
)
def test_targets_that_cannot_be(name: str, says: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    target = tmp_path / name
    before = sorted(tmp_path.rglob("*"))
    for result in run_all(["convert", source, target], ["convert", source, target, "--force"]):
        message = one_line(result)
        assert str(target) in message
        assert says in message or (name == "pipe" and "exists already" in message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["directory", "file", "link", "broken link", "pipe"])
def test_what_stands_where_the_workspace_would(kind: str, source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "m.qf.partial"
    other = tmp_path / "other"
    if kind == "directory":
        partial.mkdir()
        (partial / "m.qf").write_bytes(b"precious")
    elif kind == "file":
        partial.write_bytes(MAGIC)
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.symlink_to(other)
        if kind == "link":
            other.mkdir()
            (other / "m.qf").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    assert f"{partial}: is in the way" in one_line(run_cli("convert", source, tmp_path / "m.qf", "--resume"))
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_bytes() == b"precious" for path in tmp_path.rglob("m.qf"))


def test_a_workspace_of_a_killed_run_is_taken_over(source: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "m.qf", tmp_path / "m.qf.partial"
    for rest in ({}, {"m.qf.lock": b""}, {"m.qf.lock": b"qformat workspace\n", "m.qf": b"x", "m.qf.draft": b"x"}):
        partial.mkdir(0o700)
        for name, data in rest.items():
            (partial / name).write_bytes(data)
        assert run_cli("convert", source, target, "--force").code == 0
        valid(target)
        assert not partial.exists()
        assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_directory_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o500)
    if os.access(directory, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "not writable" in one_line(run_cli("convert", source, directory / "m.qf"))


def limit_file_size(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_size_limit(tmp_path: Path) -> None:
    source, target, full = tmp_path / "x.safetensors", tmp_path / "m.qf", tmp_path / "full.qf"
    write_safetensors(source, {"w": weights(0, 400, 400), "z": weights(1, 10)})
    assert run_cli("convert", source, full, "-t", "f32").code == 0
    size = full.stat().st_size
    for limit, before in (
        (0, None),
        (64, None),
        (1 << 19, None),
        (1 << 19, b"precious"),
        (size - 300, None),
        (size - 1, b"precious"),
    ):
        target.unlink(missing_ok=True)
        if before:
            target.write_bytes(before)
        options = ["-t", "f32", *(["--force"] if before else [])]
        message = one_line(run_cli("convert", source, target, *options, preexec_fn=limit_file_size(limit)))
        assert str(target) in message
        assert "file size" in message
        assert not Path(f"{target}.partial").exists()
        assert (target.read_bytes() if target.exists() else None) == before
    assert run_cli("convert", source, target, "-t", "f32", "--force", preexec_fn=limit_file_size(size)).code == 0
    assert target.read_bytes() == full.read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if not mount or not umount or subprocess.run([mount, *options], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no small file system can be mounted")
    yield directory
    subprocess.run([umount, str(directory)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", small_disk / "m.qf"
    write_safetensors(source, {"w": weights(0, 1000, 1000)})
    message = one_line(run_cli("convert", source, target, "-t", "f32"))
    assert str(target) in message
    assert "the disk is full" in message
    assert list(small_disk.iterdir()) == []
    assert run_cli("convert", source, target).code == 0  # q4_0 has room
    before = target.read_bytes()
    assert "the disk is full" in one_line(run_cli("convert", source, target, "--force"))
    assert list(small_disk.iterdir()) == [target]
    assert target.read_bytes() == before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_the_umask_is_respected(umask: int, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    for options in ([], ["--force"]):
        assert run_cli("convert", source, target, *options, preexec_fn=lambda: os.umask(umask)).code == 0
        assert target.stat().st_mode & 0o7777 == 0o666 & ~umask


# ---- interrupted and concurrent runs


def sparse_source(path: Path, megabytes: int) -> Path:
    """Make a checkpoint of zeros that takes no room on the disk, and some time to convert."""
    rows = megabytes * 256
    head = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + rows * 4096)
    return path


def default_signals() -> None:
    # Where tests run in the background of a shell, children would inherit that SIGINT is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def begun(source: Path, target: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a conversion and stop it when it has begun to write; it goes on with SIGCONT."""
    process = cli_start("convert", source, target, "-j1", *options, preexec_fn=default_signals)
    partial = Path(f"{target}.partial", target.name)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if partial.stat().st_size > 0:
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                assert partial.exists(), "it was too fast"
                return process
        time.sleep(0.001)
    raise AssertionError(cli_finish(process))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, force: bool, tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 2000), tmp_path / "m.qf"
    if force:
        target.write_bytes(b"precious")
    process = begun(source, target, *(["--force"] if force else []))
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    result = cli_finish(process)
    assert result.code != 0
    assert "Traceback" not in result.err
    assert "Exception" not in result.err
    assert not Path(f"{target}.partial").exists()
    if force:
        assert target.read_bytes() == b"precious"
    else:
        assert not target.exists()


def test_a_killed_run_leaves_no_file_and_the_next_one_succeeds(tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 300), tmp_path / "m.qf"
    process = begun(source, target)
    process.kill()
    cli_finish(process)
    assert not target.exists()
    assert Path(f"{target}.partial").exists()
    for path in (target, tmp_path / "other.qf"):
        assert run_cli("convert", source, path).code == 0
    assert not Path(f"{target}.partial").exists()
    assert target.read_bytes() == (tmp_path / "other.qf").read_bytes()


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    source, target = sparse_source(tmp_path / "x.safetensors", 2000), tmp_path / "m.qf"
    process = begun(source, target)
    try:
        for options in ([], ["--force"]):
            message = one_line(run_cli("convert", source, target, *options))
            assert str(target) in message
            assert "another process" in message
        assert Path(f"{target}.partial").exists()
    finally:
        process.kill()
        cli_finish(process)


@pytest.mark.parametrize("force", [False, True])
def test_writers_at_the_same_time(force: bool, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    running = [cli_start("convert", source, target, *(["--force"] if force else [])) for _ in range(6)]
    results = [cli_finish(process) for process in running]
    good = [result for result in results if result.code == 0]
    assert len(good) >= 1
    assert force or len(good) == 1
    for result in results:
        if result.code:
            assert re.search("another process|exists already|appeared there in the meantime", one_line(result))
    valid(target)
    assert not Path(f"{target}.partial").exists()


# ---- wrong usage


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-t", "q4_9"], "q4_9"),
        (
            ["-t", "q4_o"],
            "the types for weights are affine, bf16, f16, f32, f64, levels, lossless, lut, nlm, q4_0, q4_1, q5_0, q5_1, q8_0",
        ),
        (["-t", ""], "type"),
        (["-t", "q4_0:"], "q4_0:"),
        (["-t", "q4_0:nothing=1"], "nothing"),
        (["-t", "q4_0:search"], "search"),
        (["-t", "q4_0:search="], "search"),
        (["-t", "q4_0:search=none"], "none"),
        (["-t", "q4_0:search=naive,search=naive"], "search"),
        (["-t", "f16:bits=3"], "bits"),
        (["-t", " q4_0"], "q4_0"),
        (["-t", "x" * 5000], "no codec"),
        (["--tensor-type", "a.weight"], "a.weight"),
        (["--tensor-type", "=f16"], "=f16"),
        (["--tensor-type", "a.weight="], "a.weight="),
        (["--tensor-type", "a.weight=q4_9"], "q4_9"),
        (["--tensor-type", "nothing.*=f16"], "nothing.*"),
        (["--tensor-type", "b.ids=f16"], "b.ids"),
        (["--tensor-type", "a.weight=f16", "--tensor-type", "c=f16"], "c=f16"),
        (["-j", "0"], "0"),
        (["-j", "many"], "many"),
        (["--no-such-option"], "no-such-option"),
        (["more"], "more"),
    ],
)
def test_wrong_usage_of_convert(options: list[str], says: str, source: Path, tmp_path: Path) -> None:
    assert says in one_line(run_cli("convert", source, tmp_path / "m.qf", *options), code=2)
    nothing_at(tmp_path / "m.qf")


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "only-a-source"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["verify"],
        ["checksum"],
        ["quantize-stats"],
        ["quantize-stats", "x", "--include", "("],
        ["quantize-stats", "x", "--exclude", "*"],
        ["quantize-stats", "x", "-t", "q4_9"],
        ["no-such-command"],
        ["--no-such-option"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    one_line(run_cli(*arguments), code=2)


# ---- commands that read


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD_FILE = small_draft().pack()
DAMAGED = {
    "empty": b"",
    "truncated": GOOD_FILE[:-1],
    "half": GOOD_FILE[: len(GOOD_FILE) // 2],
    "header only": GOOD_FILE[:64],
    "header damaged": flip(GOOD_FILE, 40),
    "magic damaged": flip(GOOD_FILE, 3),
    "index damaged": flip(GOOD_FILE, len(GOOD_FILE) - 500),
    "trailer damaged": flip(GOOD_FILE, len(GOOD_FILE) - 100),
    "text mode": GOOD_FILE.replace(b"\n", b"\r\n"),
    "appended": GOOD_FILE + b"\n",
    "safetensors": GOOD,
    "text": b"hello\nworld\n" * 50,
    "random": np.random.default_rng(5).bytes(4000),
    "binary without lines": bytes(100_000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(DAMAGED[name])
    inspected, verified = run_all(["inspect", path], ["verify", "--json", path])
    assert str(path) in one_line(inspected)
    assert inspected.out == ""
    assert (verified.code, verified.err) == (1, "")
    report = json.loads(verified.out)
    assert report["ok"] is False
    assert [len(file["errors"]) for file in report["files"]] == [1]


@pytest.mark.parametrize("name", ["empty", "truncated", "index damaged", "random"])
def test_other_commands_on_damaged_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(DAMAGED[name])
    inspected, measured, verified, quick, summed = run_all(
        ["inspect", "--json", path],
        ["quantize-stats", path],
        ["verify", path],
        ["verify", "--quick", path],
        ["checksum", path],
    )
    for result in (inspected, measured):
        assert str(path) in one_line(result)
        assert result.out == ""
    for result in (verified, quick):
        assert (result.code, result.err) == (1, "")
        first, second = result.out.splitlines()
        assert first == f"{path}: FAILED"
        assert second.startswith("  ")
    assert summed == Result(0, f"{sha256(DAMAGED[name])}  {path}\n", "")


@pytest.mark.parametrize("kind", ["missing", "directory", "below a file"])
def test_paths_that_are_no_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(GOOD_FILE)
    (tmp_path / "directory").mkdir()
    path = {"missing": tmp_path / "none", "directory": tmp_path / "directory", "below a file": tmp_path / "file" / "x"}[
        kind
    ]
    file = tmp_path / "file"
    inspected, measured, summed, verified, both, both_summed = run_all(
        ["inspect", path],
        ["quantize-stats", path],
        ["checksum", path],
        ["verify", path],
        ["verify", path, file],
        ["checksum", path, file],
    )
    for result in (inspected, measured, summed, both_summed):
        assert str(path) in one_line(result)
        assert result.out == (f"{sha256(GOOD_FILE)}  {file}\n" if result is both_summed else "")
    for result in (verified, both):
        assert (result.code, result.err) == (1, "")
        first, second, *others = result.out.splitlines()
        assert first == f"{path}: FAILED"
        assert second.startswith("  ")
        assert others == ([f"{file}: OK"] if result is both else [])


def test_verify_names_the_damaged_tensor_and_segment(tmp_path: Path) -> None:
    index = small_draft().place().index
    assets, tensors = index["assets"], index["tensors"]
    at = [tensors[1]["segments"][0]["offset"], tensors[5]["segments"][0]["offset"] + 3, assets[0]["offset"]]
    data = GOOD_FILE
    for position in at:
        data = flip(data, position)
    path = tmp_path / "m.qf"
    path.write_bytes(data)
    result = run_cli("verify", path)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{path}: FAILED"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  asset 'LICENSE'",
        "  tensor 'b.weight', segment 'blocks'",
        "  tensor 'zhalf', segment 'data'",
    ]
    (file,) = json.loads(run_cli("verify", "--json", path).out)["files"]
    assert file["path"] == str(path)
    assert file["ok"] is False
    places = [(error["tensor"], error["asset"], error["segment"]) for error in file["errors"]]
    assert places == [(None, "LICENSE", None), ("b.weight", None, "blocks"), ("zhalf", None, "data")]
    assert all(re.search("SHA-256.*byte", error["what"]) for error in file["errors"])
    assert run_cli("verify", "--quick", path).code == 0
    assert run_cli("inspect", path).code == 0


def test_verify_says_where_padding_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(flip(GOOD_FILE, 127))
    (file,) = json.loads(run_cli("verify", "--json", path).out)["files"]
    assert ["padding" in error["what"] for error in file["errors"]] == [True]


def test_a_future_file_is_looked_at_as_far_as_it_goes(tmp_path: Path) -> None:
    draft = small_draft()
    put("tensors", "b.weight", "codec", "future")(draft)
    put("tensors", "zhalf", "must_understand", ["future"])(draft)
    draft.minor = 7
    path = tmp_path / "m.qf"
    path.write_bytes(draft.pack())
    assert run_cli("verify", path).code == 0
    result = run_cli("inspect", path)
    assert (result.code, result.err) == (0, "")
    assert "future" in result.out
    assert json.loads(run_cli("inspect", "--json", path).out)["format"] == {"major": 1, "minor": 7}


def test_a_pattern_without_a_match(small: Path) -> None:
    assert "'c.*'" in one_line(run_cli("inspect", small, "--tensor", "c.*"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: Path) -> None:
    draft = Draft(tensors=[raw_tensor("gewicht \u2603", "f32", weights(0, 3))], metadata={"\u2603": "\U0001f600"})
    path = tmp_path / "m.qf"
    path.write_bytes(flip(draft.pack(), 65))
    for command in (["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]):
        result = run_cli(*command, path, env={"PYTHONIOENCODING": encoding})
        assert result.code == (command[0] == "verify")
        assert result.err == ""
        assert "gewicht" in result.out


def test_nothing_in_a_file_reaches_the_terminal_as_a_control_code(tmp_path: Path) -> None:
    evil = "x\x1b[2J\r\x9b31m\u202eok\n"
    draft = Draft(
        tensors=[raw_tensor("w\x9b31m\u202e", "f32", weights(0, 3))],
        assets=[raw_asset("a\x9b31m.txt", b"x")],
        metadata={evil: evil},
    )
    path = tmp_path / "m.qf"
    path.write_bytes(draft.pack())
    result = run_cli("inspect", path)
    assert result.code == 0
    assert all(character.isprintable() or character == "\n" for character in result.out)
    assert len(result.out.splitlines()) == 7


NOT_UTF8 = os.fsdecode(b"m\xff.qf")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names or devices")


@needs_linux
@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"], ["checksum"]]
)
def test_file_names_that_are_not_utf8(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / NOT_UTF8
    path.write_bytes(GOOD_FILE)
    result = run_cli(*command, path)
    assert (result.code, result.err) == (0, "")
    if command == ["checksum"]:
        assert os.fsencode(result.out).endswith(b"m\xff.qf\n")


@needs_linux
def test_targets_whose_names_are_not_utf8(source: Path, tmp_path: Path) -> None:
    path = tmp_path / NOT_UTF8
    for options in ([], ["--json", "--force"]):
        result = run_cli("convert", source, path, *options)
        assert (result.code, result.err) == (0, "")
    valid(path)


@needs_linux
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["checksum"], ["verify", "--json"]])
def test_output_that_nobody_takes(command: list[str], small: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        message = one_line(cli_finish(cli_start(*command, small, stdout=full)))
    assert "No space left" in message
    reading, writing = os.pipe()
    os.close(reading)
    process = cli_start(*command, small, stdout=writing)
    os.close(writing)
    result = cli_finish(process)
    assert result.err == ""
    assert result.code != 0


# ---- lists


def digests(*paths: Path) -> str:
    return "".join(f"{sha256(path.read_bytes())}  {path.name}\n" for path in paths)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Return a folder with two files, and a list of them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.qf").write_bytes(GOOD_FILE)
    (folder / "b c.txt").write_bytes(b"some text")
    (folder / "SHA256SUMS").write_text(digests(folder / "a.qf", folder / "b c.txt"))
    return folder


def test_a_list_is_relative_to_itself(listed: Path, tmp_path: Path) -> None:
    result = run_cli("verify", listed / "SHA256SUMS", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: OK"]
    assert run_cli("verify", "SHA256SUMS", cwd=listed).code == 0
    assert run_cli("verify", "folder/SHA256SUMS", cwd=tmp_path).code == 0
    # and to nothing else: a file that is missing there is not looked for in the working directory
    shutil.move(listed / "SHA256SUMS", tmp_path / "SHA256SUMS")
    result = run_cli("verify", "../SHA256SUMS", cwd=listed)
    assert result.code == 1
    assert result.out.count("No such file") == 2


Rewrite = Callable[[str], str]
LISTS_THAT_HOLD: dict[str, Rewrite] = {
    "CR LF": lambda text: text.replace("\n", "\r\n"),
    "binary marker": lambda text: text.replace("  ", " *"),
    "upper case": lambda text: text.replace(text[:64], text[:64].upper()),
    "no line end": lambda text: text.rstrip("\n"),
    "comments and blank lines": lambda text: "# sums\n\n" + text.replace("\n", "\n\n# more\n"),
    "escaped though it need not be": lambda text: "\\" + text,
    "files twice": lambda text: text * 2,
}
LISTS_THAT_FAIL: dict[str, tuple[Rewrite, str, str]] = {
    "wrong digest": (lambda text: "0" * 64 + text[64:], "a.qf: FAILED", "does not match"),
    "missing file": (lambda text: text + "0" * 64 + "  none.qf\n", "none.qf: FAILED", "cannot be read"),
    "directory": (lambda text: text + "0" * 64 + "  .\n", "FAILED", "directory"),
    "short digest": (lambda text: text + "0" * 63 + "  a.qf\n", "SHA256SUMS: FAILED", "line 3"),
    "one space": (lambda text: text + "0" * 64 + " a.qf\n", "SHA256SUMS: FAILED", "line 3"),
    "no name": (lambda text: text + "0" * 64 + "  \n", "SHA256SUMS: FAILED", "line 3"),
    "junk": (lambda text: text + "junk\n", "SHA256SUMS: FAILED", "line 3"),
    "name with a NUL": (lambda text: text + "0" * 64 + "  a\0b\n", "FAILED", ""),
    "name too long": (lambda text: text + "0" * 64 + "  " + "n" * 300 + "\n", "FAILED", "too long"),
    "a file as a folder": (lambda text: text + "0" * 64 + "  a.qf/x\n", "x: FAILED", "cannot be read"),
}


@pytest.mark.parametrize("name", LISTS_THAT_HOLD)
def test_lists_that_hold(name: str, listed: Path) -> None:
    sums = listed / "SHA256SUMS"
    sums.write_bytes(LISTS_THAT_HOLD[name](sums.read_text()).encode())
    result = run_cli("verify", sums)
    assert (result.code, result.err) == (0, "")
    assert set(result.out.splitlines()) == {f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: OK"}


@pytest.mark.parametrize("name", LISTS_THAT_FAIL)
def test_lists_that_fail(name: str, listed: Path) -> None:
    change, line, says = LISTS_THAT_FAIL[name]
    sums = listed / "SHA256SUMS"
    sums.write_bytes(change(sums.read_text()).encode())
    result = run_cli("verify", sums)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert f"{listed / 'b c.txt'}: OK" in lines, "the other lines count all the same"
    (at,) = [i for i, text in enumerate(lines) if text.endswith("FAILED")]
    assert lines[at].endswith(line)
    assert says in lines[at + 1]
    report = json.loads(run_cli("verify", "--json", sums).out)
    assert report["ok"] is False
    assert [file["ok"] for file in report["files"]].count(False) == 1


def test_damage_shows_in_a_list(listed: Path) -> None:
    (listed / "b c.txt").write_bytes(b"some texT")
    result = run_cli("verify", listed / "SHA256SUMS")
    assert result.code == 1
    assert result.out.splitlines()[:2] == [f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: FAILED"]


STRANGE_NAMES = ["new\nline", "back\\slash", "both\\\n\\n", "  spaces ", "*star", "#hash", "-dash", "\\", "é ☃", "\x1b"]


def test_strange_names_go_there_and_back(tmp_path: Path) -> None:
    for i, name in enumerate([*STRANGE_NAMES, "return\r"]):
        (tmp_path / name).write_bytes(b"%d" % i)
    sums = run_cli("checksum", "--", *STRANGE_NAMES, "return\r", cwd=tmp_path)
    assert (sums.code, sums.err) == (0, "")
    (tmp_path / "SHA256SUMS").write_text(sums.out, newline="")
    assert len(sums.out.splitlines()) == len(STRANGE_NAMES) + 1
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
    (tmp_path / STRANGE_NAMES[2]).write_bytes(b"changed")
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_lists_are_those_of_sha256sum(tmp_path: Path) -> None:
    for i, name in enumerate(STRANGE_NAMES):
        (tmp_path / name).write_bytes(b"%d" % i)
    ours = run_cli("checksum", "--", *STRANGE_NAMES, cwd=tmp_path).out
    command = ["sha256sum", "--", *STRANGE_NAMES]
    theirs = subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout
    assert ours.encode() == theirs
    (tmp_path / "SHA256SUMS").write_bytes(theirs)
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], check=True, capture_output=True, cwd=tmp_path)
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
    binary = subprocess.run(["sha256sum", "-b", *command[1:]], check=True, capture_output=True, cwd=tmp_path).stdout
    (tmp_path / "SHA256SUMS").write_bytes(binary)
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
