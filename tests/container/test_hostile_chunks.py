"""Wrong records and damaged chunks of entropy-coded tensors: both readers agree on each, and nothing worse happens."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.errors import FormatError
from qformat.readers.torch import load_file
from tests.helpers.files import Json, find, segment, sha256
from tests.helpers.hostile import (
    NUMBERS,
    ODD_VALUES,
    OTHER_SHAPES,
    PARAMETERS,
    SHAPES,
    WORDS,
    Records,
    bounded_memory,
    changed,
    edited,
    packed,
    read_package,
    read_reference,
    readable,
    taken_apart,
    verify_one,
)

TYPES = [
    *("ternary", "ternary:scale=tensor", "ternary:scale=group,group=64,dtype=bf16", "levels:dtype=f32"),
    *("levels:n=15,scale=tensor", "lossless", "q4_0:coded=true", "q5_1:coded=true", "q8_0:coded=true"),
    "nlm:block=64,coded=true",
]
every_type = pytest.mark.parametrize("type_", TYPES)


def values(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.normal(0, 0.05, shape) * rng.lognormal(0, 1, (*shape[:-1], 1))
    x[rng.random(shape) < 0.1] = 0
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Records:
    path, found = tmp_path_factory.mktemp("chunks") / "f.qf", Records()
    for type_ in TYPES:
        for shape in (*SHAPES, (1, 600_000)):
            array = values(*shape) if shape else np.float32(0.5).reshape(())
            qformat.save_file({"t": array}, path, {"t": type_}, overwrite=True)
            found[type_, shape] = taken_apart(path.read_bytes())
    return found


# ---- wrong records


def allowed(codec: str, params: Json) -> bool:
    """Apply the specification's rules once more."""

    def one_of(key: str, *choices: Any) -> bool:
        return any(type(params[key]) is type(choice) and params[key] == choice for choice in choices)

    levels = codec in ("ternary", "levels")
    keys = {"lossless": [], "nlm": ["block", "coded"]}.get(codec, ["scale", "group", "dtype"] if levels else ["coded"])
    if params.keys() != {*keys, *(["n"] if codec == "levels" else [])}:
        return False
    if not levels:
        return all(one_of(key, *{"block": (32, 64, 128), "coded": (True,)}[key]) for key in keys)
    group = params["group"]
    grouped = one_of("scale", "group")
    return (
        one_of("scale", "tensor", "row", "group")
        and (type(group) is int and group % 32 == 0 and 32 <= group <= 2**20 if grouped else one_of("group", 128))
        and one_of("dtype", *(("f16",) if one_of("scale", "tensor") else ("f16", "bf16", "f32")))
        and (codec == "ternary" or one_of("n", 3, 5, 7, 9, 11, 13, 15))
    )


@every_type
def test_unchanged_chunked_tensors_are_valid(written, type_, tmp_path):
    for shape in SHAPES:
        record = written[type_, shape]
        assert allowed(record["codec"], record["params"])
        assert readable(tmp_path / "f.qf", record)
        for dtype in ("f8_e4m3", "f8_e5m2", "f16", "bf16", "f64"):
            if type_ != "lossless":
                assert readable(tmp_path / "f.qf", record, dtype=dtype)
    for shape in ((0,), (1, 0, 3), (2**40, 0), (0, 2**50)):
        assert readable(tmp_path / "f.qf", written[type_, (0, 64)], shape=list(shape))


@every_type
def test_impossible_parameters_of_chunked_codecs_are_refused(written, type_, tmp_path):
    record = written[type_, (0, 64)]
    codec, params = record["codec"], record["params"]
    variants = [params | {key: value} for key in params for value in [*NUMBERS, *WORDS, *ODD_VALUES]]
    variants += [{k: v for k, v in params.items() if k != key} for key in params] + [{}]
    variants += [params | {key: 32} for key in [*PARAMETERS, "n", "dtype", "coded", "sparsity"] if key not in params]
    variants += [params | {"coded": False}, {k.upper(): v for k, v in params.items()}]
    scales = params.get("scale") != "tensor"
    for bad in variants:
        # Without elements all segments are empty, so that only the parameters can be wrong, and whether there are scales.
        expected = allowed(codec, bad) and (bad.get("scale") != "tensor") == scales
        assert readable(tmp_path / "f.qf", record, params=bad) == expected, bad


@every_type
@pytest.mark.parametrize("shape", [(3, 5, 3), (0, 64)])
def test_wrong_segments_of_chunked_tensors_are_refused(written, type_, shape, tmp_path):
    record = written[type_, shape]
    parts = record["segments"]
    wrong = [[], parts[::-1], parts[1:], [*parts, segment("extra", b"")], [segment("data", b""), *parts]]
    wrong += [[*parts, segment("blocks", b"")], [parts[1], parts[0], *parts[2:]]]
    for i, part in enumerate(parts):
        name, data, before, after = part["name"], part["bytes"], parts[:i], parts[i + 1 :]
        wrong += [[*before, *after], [*before, part, part, *after], [*before, segment(name + "s", data), *after]]
        wrong += [[*before, segment(name, data + bytes(more)), *after] for more in (1, 4, 600)]
        wrong += [[*before, segment(name, data[:-less]), *after] for less in (1, 2, 4, len(data)) if less > 0]
        wrong.append([*before, segment(name, data[1:] if data else b"\0"), *after])
    for bad in (bad for bad in wrong if bad != parts):
        assert not readable(tmp_path / "f.qf", record, segments=bad), bad


@every_type
def test_impossible_keys_in_records_of_chunked_tensors_are_refused(written, type_, tmp_path):
    wrong: Json = {"dtype": ["i32", "bool", "u8", "F32", "f128", "", ...], "params": [..., [], ""]}
    wrong |= {"codec": ["ternaries", "Lossless", "q4_2", ...], "shape": [[2, -1], [True, 0], [0, 0.0], ...]}
    wrong["error"] = [{"rmse": "inf", "max": "inf"}, {"rmse": "0.000000000e+00"}, {}]
    error = {"rmse": "1.000000000e-01", "max": "5.000000000e-01"}
    wrong["error"].append(error if type_ == "lossless" else ...)
    for shape in ((3, 5, 3), (0, 64)):
        for key, value in ((key, value) for key, several in wrong.items() for value in several):
            assert not readable(tmp_path / "f.qf", written[type_, shape], **{key: value}), (key, value)


@every_type
def test_shapes_that_chunks_do_not_fit_are_refused_in_little_memory(written, type_, tmp_path):
    beyond = [*OTHER_SHAPES, (2**20 + 1,), (2, 600_000), (600_000, 1), (2**30, 2**10), (1, 2**53 - 1), (2**53 - 1, 1)]
    for shape in ((2, 341), (0, 64)):
        count = int(np.prod(shape))
        for other in [*SHAPES, *beyond]:
            with bounded_memory(24 << 20):
                found = readable(tmp_path / "f.qf", written[type_, shape], shape=list(other))
            difference = abs(int(np.prod([float(n) for n in other])) - count)
            assert not found or difference <= 128  # fits the last blocks or symbols


@every_type
def test_wrong_chunk_lengths_are_refused_by_all_readers(written, type_, tmp_path):
    record = written[type_, (1, 600_000)]
    content, lengths = (one["bytes"] for one in record["segments"][:2])
    sizes = struct.unpack(f"<{len(lengths) // 4}I", lengths)
    first, *rest = sizes
    assert sum(sizes) == len(content)
    bad = [
        [0, *rest],
        [first + 1, *rest],
        [first, *rest[:-1], rest[-1] - 1] if rest else [first - 1],
        [2**32 - 1] * len(sizes),
    ]
    if rest:
        second = rest[0]
        bad += [[second, first], [first + 1, second - 1], [first - 1, second + 1], [0, first + second]]
        bad += [[first + second, 0], [first + second - 100, 100], [100, first + second - 100]]
        bad += [[(first + second + 2**32) % 2**32, 2**32 - 1]]
    for wrong in bad:
        if wrong != list(sizes):
            segments = changed(record, lengths=struct.pack(f"<{len(wrong)}I", *wrong))
            path = tmp_path / "f.qf"
            assert not readable(path, record, segments=segments), wrong
            with pytest.raises(FormatError, match="tensor 't'"):
                load_file(path)
            with qformat.safe_open(path) as file, pytest.raises(FormatError, match="'t' is damaged"):
                file.get_rows("t", [0])


def test_chunks_are_padded_to_a_byte_for_1024_elements(tmp_path):
    path = tmp_path / "f.qf"
    for type_ in ("ternary:scale=tensor", "lossless", "q8_0:coded=true"):
        qformat.save_file({"t": np.full((2, 600_000), 1e-3, np.float32)}, path, {"t": type_}, overwrite=True)
        record = taken_apart(path.read_bytes())
        content, lengths = (one["bytes"] for one in record["segments"][:2])
        sizes = list(struct.unpack(f"<{len(lengths) // 4}I", lengths))
        assert len(sizes) == 4
        assert sizes[::2] == [512, 512]
        assert readable(path, record)
        for i in range(4):
            at = sum(sizes[: i + 1])
            for step, part in ((-1, content[: at - 1] + content[at:]), (1, content[:at] + b"\0" + content[at:])):
                other = [size + step * (i == j) for j, size in enumerate(sizes)]
                new = changed(record, chunks=part, lengths=struct.pack("<4I", *other))
                assert not readable(path, record, segments=new)
            if sizes[i] == 512:  # padding has to be zeros
                new = changed(record, chunks=content[: at - 1] + b"\1" + content[at:])
                assert not readable(path, record, segments=new)


# ---- impossible numbers


@pytest.mark.parametrize("type_", TYPES[:5])
def test_nonfinite_levels_and_scales_are_refused(written, type_, tmp_path):
    record = written[type_, (2, 341)]
    path = tmp_path / "f.qf"
    book = np.frombuffer(find(record, "segments", "codebook", "bytes"), "<f4")
    for at in range(book.size):
        for wrong in (np.nan, np.inf, -np.inf, *([1e-45, -1.0] if at == book.size // 2 else [])):
            other = book.copy()
            other[at] = wrong
            assert not readable(path, record, segments=changed(record, codebook=other.tobytes())), (at, wrong)
            with qformat.safe_open(path) as file, pytest.raises(FormatError, match="'t' is damaged"):
                file.get_codes("t")
    other = book.copy()
    other[book.size // 2] = -0.0
    assert readable(path, record, segments=changed(record, codebook=other.tobytes()))
    other[:] = other[::-1]  # the order is the encoder's choice
    assert readable(path, record, segments=changed(record, codebook=other.tobytes()))
    if record["params"]["scale"] != "tensor":
        scales = find(record, "segments", "scales", "bytes")
        patterns = {"f16": b"\0\x7c", "bf16": b"\xc0\x7f", "f32": b"\0\0\x80\xff"}[record["params"]["dtype"]]
        for at in (0, len(scales) - len(patterns)):
            wrong = scales[:at] + patterns + scales[at + len(patterns) :]
            assert not readable(path, record, segments=changed(record, scales=wrong))
        with qformat.safe_open(path) as file, pytest.raises(FormatError, match="'t' is damaged"):
            file.get_codes("t")


@pytest.mark.parametrize("type_", ["levels:dtype=f32", "ternary:scale=group,group=64,dtype=bf16"])
def test_products_of_levels_and_scales_may_overflow(written, type_, tmp_path):
    record = written[type_, (2, 341)]
    book = np.frombuffer(find(record, "segments", "codebook", "bytes"), "<f4") * np.float32(1e38)
    scales = find(record, "segments", "scales", "bytes")
    large = {"f32": b"\xff\xff\x7f\x7f", "bf16": b"\x7f\x7f"}[record["params"]["dtype"]]
    segments = changed(record, codebook=book.tobytes(), scales=large * (len(scales) // len(large)))
    assert readable(tmp_path / "f.qf", record, segments=segments)  # warnings are errors
    with qformat.safe_open(tmp_path / "f.qf") as file:
        assert np.isinf(file.get_tensor("t")).any()


# ---- changed bytes


def check_damaged(path: Path, data: bytes) -> None:
    """Compare all readers; a scale that is not finite may be refused or not."""
    path.write_bytes(data)
    package, other = read_package(path), read_reference(data)
    assert package.refused is None
    assert verify_one(path).ok
    loose = [key for key, message in other.errors.items() if "infinite or NaN" in message]
    for key in package.errors.keys() | other.errors.keys() | package.values.keys():
        if key not in loose:
            assert (key in package.errors) == (key in other.errors), (package.errors, other.errors)
            assert package.values.get(key) == other.values.get(key)
    refused = bool(package.errors)
    try:
        loaded = load_file(path)
    except FormatError:
        assert refused
        loaded = {}
    with qformat.safe_open(path) as file:
        for name in file.keys():  # noqa: SIM118
            key = ("tensor", name)
            if not refused:
                assert loaded[name].contiguous().numpy().tobytes() == package.values[key][2]
            if len(file.info(name).shape) > 1:
                try:
                    rows = file.get_rows(name, slice(None))
                except FormatError:
                    assert key in package.errors
                else:
                    assert rows.tobytes() == package.values[key][2]
            if file.info(name).codec in ("ternary", "levels"):
                try:
                    codes = file.get_codes(name)
                except FormatError:
                    assert key in package.errors
                else:
                    assert key in package.values
                    assert np.abs(codes.codes).max() <= codes.levels.size // 2


@every_type
@given(data=st.data())
def test_all_readers_agree_on_changed_bytes_of_chunked_tensors(written, type_, data, tmp_path_factory):
    record = written[type_, data.draw(st.sampled_from([(2, 341), (3, 5, 3), (1,)]))]
    number = data.draw(st.sampled_from([0, 0, 0, *range(len(record["segments"]))]))
    name, content = (record["segments"][number][key] for key in ("name", "bytes"))
    segments = changed(record, **{name: edited(content, data)})
    check_damaged(tmp_path_factory.getbasetemp() / "changed.qf", packed(record, segments=segments))


@every_type
@given(content=st.binary(min_size=1, max_size=200))
def test_all_readers_agree_on_random_bytes_as_a_chunk(written, type_, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.qf"
    for shape in ((1,), (3, 5, 3)):
        record = written[type_, shape]
        segments = changed(record, chunks=content, lengths=struct.pack("<I", len(content)))
        check_damaged(path, packed(record, segments=segments))


@every_type
def test_all_readers_agree_on_changes_of_a_tensor_of_two_chunks(written, type_, tmp_path):
    record = written[type_, (1, 600_000)]
    content, lengths = (one["bytes"] for one in record["segments"][:2])
    first = struct.unpack_from("<I", lengths)[0]
    for at in {0, 5, 9, first - 1, min(first, len(content) - 1), len(content) - 1}:
        other = bytearray(content)
        other[at] ^= 0x10
        check_damaged(tmp_path / "f.qf", packed(record, segments=changed(record, chunks=bytes(other))))


def test_a_wrong_digest_of_chunks_is_reported_before_they_are_decoded(written, tmp_path):
    record = written["ternary", (2, 341)]
    data = packed(record)
    at = data.index(find(record, "segments", "chunks", "bytes"))
    path = tmp_path / "f.qf"
    path.write_bytes(data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :])
    assert sha256(path.read_bytes()) != sha256(data)
    for read in (lambda f: f.get_tensor("t"), lambda f: f.get_rows("t", 0), lambda f: f.get_codes("t")):
        with qformat.safe_open(path) as file, pytest.raises(FormatError, match="SHA-256"):
            read(file)
