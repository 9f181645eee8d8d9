"""Checkpoints that cannot be converted: one line names the file or tensor, the cause and a way out, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from tests.helpers.checkpoints import HOME, INDEX, ONE, SHARDS, TWO, safetensors_bytes, weights, write_safetensors
from tests.helpers.cli import nothing_at, one_line, run_all, run_cli, valid
from tests.helpers.files import small_draft


def test_an_unchanged_checkpoint_of_two_shards_converts(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    result = run_cli("convert", source, target)
    assert (result.code, result.err) == (0, "")
    valid(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.qf", "model"]


# ---- bad checkpoints

SINGLE = "model.safetensors"


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
        for shard, seed in ((ONE, 7), (TWO, 8)):
            write_safetensors(directory / shard, SHARDS[shard] | {"twice": weights(seed, 3)})
        map_is(weight_map)(directory)

    return change


def header_is(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + body


def entry(dtype: str = "F32", shape: Sequence[Any] = (2, 3), offsets: Sequence[Any] = (0, 24)) -> bytes:
    return json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


GOOD = safetensors_bytes({"a.weight": ("f32", (8, 40), weights(0, 8, 40).tobytes())})

OVERLAPPING = json.dumps(
    {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}
).encode()

# name: (how to break it, parts of the message)
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (lambda d: (d / TWO).unlink(), (TWO, "missing")),
    "half a shard": (shard_is(lambda data: data[: len(data) // 2]), (TWO, "cut short")),
    "shard without its last byte": (shard_is(lambda data: data[:-1]), (TWO, "cut short")),
    "shard of 4 bytes": (shard_is(lambda data: data[:4]), (TWO, "cut short")),
    "shard with only its header": (shard_is(lambda data: data[:40]), (TWO, "cut short")),
    "shard with a byte too many": (shard_is(lambda data: data + b"\0"), (TWO, "by its header")),
    "empty shard": (shard_is(b""), (TWO, "empty")),
    "shard of zeros": (shard_is(bytes(3000)), (TWO,)),
    "shard of garbage": (shard_is(np.random.default_rng(3).bytes(3000)), (TWO,)),
    "shard is a web page": (shard_is(b"<!DOCTYPE html><html>404</html>" * 40), (TWO,)),
    "shard is a pointer of git-lfs": (shard_is(b"version https://git-lfs.github.com/spec/v1\n"), (TWO,)),
    "shard is a directory": (replace_by_directory(TWO), (TWO, "is a directory")),
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
    "index names 300 characters": (map_is(HOME | {"c": "x" * 300}), ("xxx",)),
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
    "no weights": (lambda d: [(d / name).unlink() for name in (ONE, TWO, INDEX)], ("model.safetensors",)),
    "single file: empty": (only(b""), (SINGLE, "empty")),
    "single file: half": (only(GOOD[: len(GOOD) // 2]), (SINGLE, "cut short")),
    "single file: garbage": (only(np.random.default_rng(4).bytes(500)), (SINGLE,)),
    "single file: is a directory": (
        lambda d: (only(b"")(d), replace_by_directory(SINGLE)(d)),
        (SINGLE, "is a directory"),
    ),
    "single file: header of 2^63 bytes": (only(b"\xff" * 7 + b"\x7f{" + bytes(100)), (SINGLE,)),
    "single file: header is no JSON": (only(header_is(b'{"a.weight": ' + b" " * 20)), (SINGLE,)),
    "single file: header is an array": (only(header_is(b"[1, 2, 3]")), (SINGLE,)),
    "single file: offsets overlap": (only(header_is(OVERLAPPING, bytes(12))), (SINGLE,)),
    "single file: offsets beyond the end": (only(header_is(entry(offsets=(24, 48)), bytes(24))), (SINGLE,)),
    "single file: offsets backwards": (only(header_is(entry(offsets=(24, 0)), bytes(24))), (SINGLE,)),
    "single file: shape and length differ": (only(header_is(entry(shape=(2, 4)), bytes(24))), (SINGLE,)),
    "single file: absurd shape": (only(header_is(entry(shape=(2**40, 2**40)), bytes(24))), (SINGLE,)),
    "single file: negative shape": (only(header_is(entry(shape=(-2, -3)), bytes(24))), (SINGLE,)),
    "single file: unknown dtype": (only(header_is(entry(dtype="Q9"), bytes(24))), (SINGLE,)),
}


MEASURED = ("missing shard", "half a shard", "index is not JSON", "no weights")  # by quantize-stats too


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_convert_and_quantize_stats_refuse_bad_checkpoints(name: str, source: Path, tmp_path: Path) -> None:
    change, says = BAD_SOURCES[name]
    change(source)
    before = sorted(source.rglob("*"))
    target = tmp_path / "m.qf"
    commands = [["convert", source, target], *([["quantize-stats", source]] if name in MEASURED else [])]
    for result in run_all(*commands):
        message = one_line(result)
        assert all(text in message for text in (str(source), *says)), message
        assert len(message) < 1000
    nothing_at(target)
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (GOOD[: len(GOOD) // 2], "cut short"),
        (GOOD[:5], "cut short"),
        (b"PK\x03\x04" + bytes(100), "not a whole zip archive"),
        (bytes(100), "by its header"),
        (small_draft().pack()[:200], "truncated"),
    ],
)
def test_bad_files_of_weights_are_refused(data: bytes, says: str, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    source.write_bytes(data)
    message = one_line(run_cli("convert", source, tmp_path / "m.qf"))
    assert str(source) in message
    assert says in message
    nothing_at(tmp_path / "m.qf")


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    for command in (["convert", tmp_path / "none", tmp_path / "m.qf"], ["quantize-stats", tmp_path / "none"]):
        assert str(tmp_path / "none") in one_line(run_cli(*command))
    nothing_at(tmp_path / "m.qf")


def test_a_failed_conversion_leaves_the_existing_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.qf"
    target.write_bytes(b"precious")
    (source / TWO).unlink()
    one_line(run_cli("convert", source, target, "--force"))
    write_safetensors(source / TWO, {"b.weight": np.full((8, 33), np.nan, np.float32), "b.ids": np.arange(5)})
    one_line(run_cli("convert", source, target, "--force"))
    assert target.read_bytes() == b"precious"
    assert not Path(f"{target}.partial").exists()


def test_codes_are_refused_if_the_index_does_not_list_their_scales(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["q.weight"] = TWO
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(
        source / TWO,
        SHARDS[TWO] | {"q.weight": np.ones((4, 32), np.uint8), "q.weight_scale": np.ones((4, 1), np.float32)},
    )
    assert one_line(run_cli("convert", source, tmp_path / "m.qf")) == (
        f"{source}: model.safetensors.index.json does not list tensor 'q.weight_scale', without which 'q.weight' cannot be "
        "decoded; add it there"
    )


def test_a_tensor_that_the_index_does_not_list_is_left_out_and_named(source: Path, tmp_path: Path) -> None:
    write_safetensors(source / TWO, SHARDS[TWO] | {"extra": weights(9, 3), "extra 2": weights(9, 4)})
    result = run_cli("convert", source, tmp_path / "m.qf")
    assert result.code == 0
    assert result.err == "Warning: model.safetensors.index.json does not list tensor 'extra' and 1 more: left out\n"
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.keys() == sorted(HOME)


def test_a_tensor_in_two_shards_is_read_from_the_one_in_the_index(source: Path, tmp_path: Path) -> None:
    in_both_shards(HOME | {"twice": TWO})(source)
    assert run_cli("convert", source, tmp_path / "m.qf").code == 0
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.get_tensor("twice").tobytes() == weights(8, 3).tobytes()


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31mb", "n" * 1025])
def test_tensor_names_that_the_format_excludes_are_refused(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": weights(0, 3), name: weights(0, 4)})
    assert "name" in one_line(run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf"))
    nothing_at(tmp_path / "m.qf")


@pytest.mark.parametrize("name", [b"a:b.json", b"a\\b.json", b"a\nb.json", b"\xff.json"])
def test_assets_whose_names_the_format_excludes_are_left_out_with_a_warning(
    name: bytes, source: Path, tmp_path: Path
) -> None:
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
def test_tensors_with_nan_or_infinity_are_refused_or_kept_unquantized(dtype: str, bits: int, tmp_path: Path) -> None:
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
def test_nan_is_refused_for_every_target_type_and_by_quantize_stats(dtype: str, tmp_path: Path) -> None:
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


def test_compiled_kernels_find_nan_and_infinity(tmp_path: Path) -> None:
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


def test_infinity_in_the_last_element_of_a_large_tensor_is_refused(tmp_path: Path) -> None:
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


def test_the_suggested_tensor_type_option_works_for_names_with_special_characters(tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "m.qf"
    name = "a[0] 'b' \"c\" * ? $HOME !d\\e"
    write_safetensors(source, {name: np.full((2, 40), 1e6, np.float32), "a0": weights(0, 2, 40)})
    message = one_line(run_cli("convert", source, target))
    assert run_cli("convert", source, target, "--tensor-type", the_way_out(message)).code == 0
    with qformat.safe_open(target) as file:
        assert (file.info(name).codec, file.info("a0").codec) == ("f32", "q4_0")


@pytest.mark.parametrize("name", TOO_LARGE)
def test_values_too_large_for_the_type_are_refused_with_a_tensor_type_that_keeps_them(
    name: str, tmp_path: Path
) -> None:
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
def test_quantize_stats_of_values_beyond_binary32_are_refused_or_finite(value: float, tmp_path: Path) -> None:
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
def test_blocks_that_would_be_zeroed_are_refused_with_two_ways_out(name: str, tmp_path: Path) -> None:
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
def test_tiny_values_among_others_and_blocks_of_zeros_are_accepted(dtype: str, tiny: float, tmp_path: Path) -> None:
    array, zeros = weights(0, 2, 40).astype(dtype), weights(0, 2, 64)
    array[1, 3] = tiny
    zeros[1] = 0
    zeros[0, :32] = -0.0
    write_safetensors(tmp_path / "x.safetensors", {"w": array, "zeros": zeros})
    assert run_cli("convert", tmp_path / "x.safetensors", tmp_path / "m.qf").code == 0
