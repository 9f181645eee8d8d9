"""Chunked tensors made from the text of spec/codecs.md, decoded by the independent reader."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from tests.helpers.reference import decode, reference
from tests.helpers.stream_encoder import (
    BY_DIGITS,
    CHUNK_ELEMENTS,
    CODED,
    CONSTANT,
    RAW,
    bits_to_bytes,
    chunked,
    join,
    padded,
    random_symbols,
    stream,
)

ERROR = {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}


# ---- chunks

TERNARY = {"scale": "tensor", "group": 128, "dtype": "f16"}
BOOK = np.array([-1.5, 0, 2], "<f4")
ROW = {"scale": "row", "group": 128, "dtype": "f16"}
G96 = {"scale": "group", "group": 96, "dtype": "f16"}
G_WIDE = {"scale": "group", "group": 2**20, "dtype": "f16"}
N = CHUNK_ELEMENTS


def each(*cols: range) -> list[tuple[range, range]]:
    """The chunks of two rows that are cut one by one."""
    return [(range(i, i + 1), one) for i in range(2) for one in cols]


# Params, shape, and for each chunk the rows and the columns, from the text by hand.
PLACES: dict[str, tuple[dict[str, Any], tuple[int, int], list[tuple[range, range]]]] = {
    "rows": (TERNARY, (5, 200_000), [(rows, range(200_000)) for rows in (range(2), range(2, 4), range(4, 5))]),
    "all rows": (TERNARY, (2, N // 2), [(range(2), range(N // 2))]),
    "a full row": (TERNARY, (2, N), each(range(N))),
    "parts of rows": (TERNARY, (2, N + 3), each(range(N), range(N, N + 3))),
    # floor(2^19 / 96) × 96 = 524256
    "parts of groups": (G96, (1, N + 3), [(range(1), range(524_256)), (range(1), range(524_256, N + 3))]),
    "padded groups": (G96, (2, N // 2), each(range(N // 2))),
    "long rows": (ROW, (2, N + 3), each(range(N + 3))),
    "long groups": (G_WIDE, (2, N + 3), each(range(N + 3))),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_reference_cuts_ternary_tensors_into_chunks_as_the_spec_says(name: str) -> None:
    params, shape, places = PLACES[name]
    expected = np.empty(shape, np.float32)
    chunks = []
    for i, (rows, cols) in enumerate(places):
        expected[rows.start : rows.stop, cols.start : cols.stop] = BOOK[i % 3]
        symbol = i % 3 * 121  # five digits that are equal
        chunks.append(padded(stream([symbol], 3, CONSTANT), len(rows) * len(cols)))
    width = {"row": shape[1], "group": min(params["group"], shape[1])}.get(params["scale"], 0)
    scales = {"scales": np.ones(shape[0] * -(-shape[1] // width), "<f2").tobytes()} if width else {}
    segments = chunked(chunks, codebook=BOOK.tobytes(), **scales)
    assert decode("ternary", shape, params, segments).tobytes() == expected.tobytes()
    with pytest.raises(reference.SpecError, match="segments are"):
        decode("ternary", shape, params, segments | {"lengths": segments["lengths"] + bytes(4)})


CONSTANT_CHUNK = bytes.fromhex("0200000001f2")  # ten thousand elements of the code 2, which need 10 bytes


def test_the_reference_requires_padding_of_short_chunks() -> None:
    book = {"codebook": BOOK.tobytes()}
    right = chunked([CONSTANT_CHUNK + bytes(4)], **book)
    assert np.all(decode("ternary", (10_000,), TERNARY, right) == 2)
    right = chunked([CONSTANT_CHUNK], **book)
    assert np.all(decode("ternary", (6 * 1024,), TERNARY, right) == 2)
    for wrong, count, message in (
        (CONSTANT_CHUNK + bytes(5), 10_000, "5 bytes are left over"),
        (CONSTANT_CHUNK + b"\0\0\0\1", 10_000, "4 bytes are left over"),
        (CONSTANT_CHUNK + bytes(3), 10_000, "9 bytes of chunks are too few"),
        (CONSTANT_CHUNK, 6 * 1024 + 1, "6 bytes of chunks are too few"),
        (CONSTANT_CHUNK + bytes(1), 6 * 1024, "1 bytes are left over"),
        (CONSTANT_CHUNK[:-1], 5, "are needed"),
        (b"", 5, "too few"),
    ):
        with pytest.raises(reference.SpecError, match=message):
            decode("ternary", (count,), TERNARY, chunked([wrong], **book))


def test_the_reference_refuses_wrong_chunk_lengths() -> None:
    """Three chunks, two of which have 512 bytes and the last one 6."""
    shape = (1, 2 * CHUNK_ELEMENTS + 3)
    segments = chunked([CONSTANT_CHUNK + bytes(506)] * 2 + [CONSTANT_CHUNK], codebook=BOOK.tobytes())
    assert np.all(decode("ternary", shape, TERNARY, segments) == 2)
    for lengths, message in (
        ((512, 512, 5), "sum 1029, but there are 1030"),
        ((512, 512, 7), "sum 1031, but there are 1030"),
        ((2**32 - 1, 512, 519), "sum"),  # the sum is 1030 modulo 2^32
        ((511, 513, 6), "chunk 0 .* fewer than 512"),
        ((512, 518, 0), "chunk 2 .* fewer than 1|chunk 1.*left over"),
    ):
        wrong = segments | {"lengths": struct.pack("<3I", *lengths)}
        with pytest.raises(reference.SpecError, match=message):
            decode("ternary", shape, TERNARY, wrong)


# Codec, params and the other segments, all empty.
EMPTY: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "q4_0": ("q4_0", {"coded": True}, []),
    "q5_1": ("q5_1", {"coded": True}, []),
    "nlm": ("nlm", {"coded": True, "block": 64}, []),
    "ternary": ("ternary", TERNARY, ["codebook"]),
    "levels row": ("levels", ROW | {"n": 5}, ["codebook", "scales"]),
    "levels group": ("levels", G96 | {"n": 15}, ["codebook", "scales"]),
    "lossless": ("lossless", {}, []),
}


@pytest.mark.parametrize("name", EMPTY)
def test_the_reference_refuses_wrong_segments_of_chunked_tensors(name: str) -> None:
    codec, params, others = EMPTY[name]
    segments = dict.fromkeys(["chunks", "lengths", *others], b"")
    for shape in ((0,), (0, 70), (3, 0), (0, 2**53 - 1), (2**53 - 1, 0)):
        assert decode(codec, shape, params, segments).shape == shape
        for key in segments:
            with pytest.raises(reference.SpecError, match="segments are"):
                decode(codec, shape, params, segments | {key: bytes(4)})
    backwards = dict(reversed(segments.items()))
    without = [{key: b"" for key in segments if key != left_out} for left_out in segments]
    for wrong in (backwards, segments | {"more": b""}, {"blocks": b""}, {}, *without):
        with pytest.raises(reference.SpecError, match="segments are"):
            decode(codec, (0,), params, wrong)
    # Refused before the list of chunks or the result is made; there are not even the bytes for one chunk in 2^33.
    for shape in ((2**53 - 1,), (2**50, 8), (1, 2**52), (2**26, 2**26)):
        with pytest.raises(reference.SpecError, match="too few"):
            decode(codec, shape, params, segments | {"chunks": b"\0", "lengths": bytes(4)})
    with pytest.raises(reference.SpecError, match="cannot be stored"):
        decode(codec, (0,), params, segments, "i32")
    tensor = reference.Tensor("t", (0,), "f32", codec, {"params": params, "error": ERROR}, tuple(segments.items()), "")
    if codec == "lossless":
        with pytest.raises(reference.SpecError, match="must not have an error"):
            reference.decode(tensor)
    else:
        del tensor.record["error"]
        with pytest.raises(reference.SpecError, match="must have an error"):
            reference.decode(tensor)


@pytest.mark.parametrize(
    ("codec", "params", "wrong"),
    [
        ("q8_0", {"coded": True}, [{"coded": False}, {"coded": 1}, {"coded": "true"}, {"block": 32}]),
        ("nlm", {"coded": True, "block": 32}, [{"coded": False}, {"coded": 1}, {"block": 16}]),
        ("ternary", TERNARY, [{"n": 3}, {"coded": True}, {"group": 32}, {"dtype": "f32"}, {"scale": "block"}]),
        ("levels", TERNARY | {"n": 3}, [{"n": n} for n in (1, 2, 4, 17, True, "3")]),
        ("levels", ROW | {"n": 7}, [{"group": 64}, {"dtype": "f64"}, {"dtype": 16}, {"scale": True}]),
        ("levels", G96 | {"n": 7}, [{"group": g} for g in (0, 48, 2**20 + 32, True, "row", "96")]),
        ("lossless", {}, [{"coded": True}, {"n": 3}]),
    ],
)
def test_the_reference_refuses_impossible_parameters_of_chunked_codecs(
    codec: str, params: dict[str, Any], wrong: list[dict[str, Any]]
) -> None:
    names = ["codebook"] * (codec in ("ternary", "levels")) + ["scales"] * (params.get("scale") in ("row", "group"))
    segments = dict.fromkeys(["chunks", "lengths", *names], b"")
    assert decode(codec, (0,), params, segments).shape == (0,)
    missing = [{key: value for key, value in params.items() if key != name} for name in params if name != "coded"]
    for bad in [*(params | change for change in wrong), *missing]:
        with pytest.raises(
            reference.SpecError, match=r"params|'coded'|is missing|is .* none of|'group' .* not possible"
        ):
            decode(codec, (0,), bad, segments)


# ---- entropy-coded blocks

# Bytes of d, m or h, then of codes; how many elements.
BLOCKS = {"q4_0": (2, 16, 32), "q4_1": (4, 16, 32), "q5_0": (2, 20, 32), "q5_1": (4, 20, 32), "q8_0": (2, 32, 32)}
BLOCKS |= {f"nlm {block}": (3, block // 2, block) for block in (32, 64, 128)}


def some_blocks(name: str, count: int) -> np.ndarray:
    """Blocks with finite scales: one row of bytes each."""
    head, codes, _ = BLOCKS[name]
    rng = np.random.default_rng(count)
    blocks = rng.integers(0, 256, (count, head + codes), np.uint8)
    if name.startswith("nlm"):
        # h < 2^24 with bits 5 to 9 and 17 to 20 (of the exponents) not all ones
        h = rng.integers(0, 2**24, count) & ~(1 << 9 | 1 << 20)
        blocks[:, :3] = h[:, None] >> np.array([0, 8, 16]) & 255
    else:
        halves = rng.normal(size=(count, head // 2)).astype("<f2")
        blocks[:, :head] = halves.view(np.uint8)
    return blocks


def block_chunk(name: str, blocks: np.ndarray, mode: int = CODED) -> bytes:
    """A chunk of these blocks (Coded blocks)."""
    head, _, _ = BLOCKS[name]
    parts = [[int(byte) for byte in blocks[:, i]] for i in range(head)]
    if head == 4:
        for block in range(len(blocks)):
            d, m = (parts[i][block] + 256 * parts[i + 1][block] for i in (0, 2))
            parts[3][block], parts[2][block] = divmod((m - d) % 2**16, 256)
    streams = [stream(part, 256, mode) for part in parts]
    codes = blocks[:, head:].reshape(-1)
    if name.startswith("q5"):
        values = []
        for block in blocks[:, head:].tolist():
            fifth = int.from_bytes(bytes(block[:4]), "little")
            low = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
            values += [low[j] + 16 * (fifth >> j & 1) for j in range(32)]
        return b"".join([*streams, stream(values, 32, mode)])
    return b"".join([*streams, stream(codes, 256 if name == "q8_0" else 16, mode)])


def block_codec(name: str) -> tuple[str, dict[str, Any]]:
    codec, _, block = name.partition(" ")
    return codec, {"block": int(block)} if block else {}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_decodes_entropy_coded_blocks_to_the_uncoded_ones(name: str) -> None:
    codec, params = block_codec(name)
    for shape in ((), (5,), (3, 70), (2, 3, 50), (7, 128)):
        rows = shape[0] if len(shape) > 1 else 1
        blocks = some_blocks(name, rows * -(-(int(np.prod(shape)) // rows) // BLOCKS[name][2]))
        expected = decode(codec, shape, params, {"blocks": blocks.tobytes()})
        for mode in (RAW, CODED):
            segments = chunked([block_chunk(name, blocks, mode)])
            values = decode(codec, shape, params | {"coded": True}, segments)
            assert values.dtype == np.float32
            assert values.shape == shape
            assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_cuts_entropy_coded_blocks_into_chunks_as_the_spec_says(name: str) -> None:
    """Rows are counted with their padding, and columns are cut at blocks."""
    codec, params = block_codec(name)
    head, _, size = BLOCKS[name]
    high = CHUNK_ELEMENTS // size
    # Shape; for each chunk its blocks and its elements.
    cases: list[tuple[tuple[int, int], list[tuple[int, int]]]] = [
        ((high + 9, 1), [(high, high), (9, 9)]),
        ((2, CHUNK_ELEMENTS + 1), [(high, CHUNK_ELEMENTS), (1, 1)] * 2),
    ]
    for shape, places in cases:
        chunks, blocks = [], []
        for i, (count, elements) in enumerate(places):
            block = some_blocks(name, 4)[i : i + 1]
            block[:, head:] = 0x11 * (i + 1)
            if name.startswith("q5"):
                block[:, head : head + 4] = 255 * (i % 2)
            # All streams are constant, for one block as for many.
            chunks.append(padded(block_chunk(name, block, CONSTANT), elements))
            blocks.append(np.repeat(block, count, axis=0))
        expected = decode(codec, shape, params, {"blocks": np.concatenate(blocks).tobytes()})
        found = decode(codec, shape, params | {"coded": True}, chunked(chunks))
        assert found.tobytes() == expected.tobytes()


def test_the_minimum_of_an_entropy_coded_block_is_relative_to_its_scale() -> None:
    """d 0x3c00, m 0xb400: (m - d) mod 2^16 is 0x7800; all codes are 3."""
    chunk = bytes.fromhex("020000000100 02000000013c 020000000100 020000000178 020000000133")
    assert decode("q4_1", (2,), {"coded": True}, chunked([chunk])).tolist() == [2.75, 2.75]
    # d 0xbc00, m 0x3c00: 0x8000; the code is 17.
    chunk = bytes.fromhex("020000000100 0200000001bc 020000000100 020000000180 020000000111")
    assert decode("q5_1", (2,), {"coded": True}, chunked([chunk])).tolist() == [-16, -16]


def test_the_reference_refuses_wrong_entropy_coded_blocks() -> None:
    for name in BLOCKS:
        codec, params = block_codec(name)
        params["coded"] = True
        blocks = some_blocks(name, 2)
        right = block_chunk(name, blocks)
        infinite = blocks.copy()
        infinite[1, : BLOCKS[name][0]] = 0xFF if name.startswith("nlm") else 0x7C
        for chunk, message in (
            (right + b"\0", "1 bytes are left over"),
            (right[:-1], "are needed"),
            (right[: 4 + right[0]], "are needed"),  # only the first stream
            (block_chunk(name, blocks[:1]), r"left over|are needed|too few|end at"),
            (block_chunk(name, infinite), "infinite or NaN"),
        ):
            with pytest.raises(reference.SpecError, match=message):
                decode(codec, (BLOCKS[name][2] + 1,), params, chunked([chunk]))
    chunk = bytes.fromhex("020000000100 02000000013c 020000000120")  # a code of 32
    with pytest.raises(reference.SpecError, match="symbol 32 is not below 32"):
        decode("q5_0", (2,), {"coded": True}, chunked([chunk]))


# ---- ternary and levels

NUMPY = {"f16": "<f2", "bf16": "<u2", "f32": "<f4"}


def narrow(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bf16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(NUMPY[dtype]).tobytes()


@pytest.mark.parametrize("n", [3, 5, 7, 9, 11, 13, 15])
@pytest.mark.parametrize(
    ("scale", "group", "dtype"),
    [
        ("tensor", 128, "f16"),
        *(("row", 128, dtype) for dtype in NUMPY),
        *(("group", group, dtype) for group, dtype in ((32, "f16"), (64, "bf16"), (2**20, "f32"))),
    ],
)
def test_the_reference_decodes_levels_with_every_kind_of_scale(n: int, scale: str, group: int, dtype: str) -> None:
    rng = np.random.default_rng(n)
    rows, cols = 5, 150
    codes = np.array(random_symbols(rows * cols, n, n)).reshape(rows, cols)
    book = rng.normal(size=n).astype("<f4")  # in any order
    book[n // 2] = 0
    params: dict[str, Any] = {"scale": scale, "group": group, "dtype": dtype}
    others = {"codebook": book.tobytes()}
    expected = book[codes]
    if scale != "tensor":
        width = cols if scale == "row" else min(group, cols)
        # Few bits, so that every dtype holds them; of both signs, and a zero.
        scales = (rng.integers(-64, 65, (rows, -(-cols // width))) / 16).astype(np.float32)
        scales[0, 0] = 0
        others["scales"] = narrow(scales, dtype)
        expected = expected * np.repeat(scales, width, axis=1)[:, :cols]
    for mode in (RAW, CODED, BY_DIGITS):
        chunk = stream(join(codes.reshape(-1).tolist(), n, n // 2), n, mode)
        segments = chunked([chunk], **others)
        values = decode("levels", (rows, 15, 10), params | {"n": n}, segments)
        assert values.dtype == np.float32
        assert values.shape == (rows, 15, 10)
        assert values.tobytes() == expected.astype(np.float32).tobytes()
        if n == 3:
            assert decode("ternary", (rows, cols), params, segments).tobytes() == values.tobytes()


def test_products_of_levels_and_scales_are_rounded_once() -> None:
    """0x3eaaaaab = 11184811 × 2^-25, and 3 × that = 33554433 × 2^-25 is rounded to 1."""
    book = bytes.fromhex("000000bf 00000000 abaaaa3e")
    chunk = bytes.fromhex("0300000000 4b 01")  # codes 0, 1, 2, 2, 0: 0 + 3 + 18 + 54 = 75; then 1
    segments = chunked([chunk], codebook=book, scales=bytes.fromhex("0042 00c2"))  # 3 and -3
    values = decode("ternary", (2, 3), ROW, segments)
    assert values.tolist() == [[-1.5, 0, 1], [-1, 1.5, 0]]
    assert np.signbit(values).tolist() == [[True, False, False], [True, False, True]]


def test_the_reference_decodes_a_million_ternary_elements() -> None:
    chunks, codes = [], []
    for half in range(2):  # of 2^19 elements, in more than 2^16 symbols
        codes.append(random_symbols(CHUNK_ELEMENTS, 3, half))
        chunks.append(stream(join(codes[-1], 3, 1), 3, BY_DIGITS))
    values = decode("ternary", (2, CHUNK_ELEMENTS), TERNARY, chunked(chunks, codebook=BOOK.tobytes()))
    assert values.tobytes() == BOOK[np.array(codes)].tobytes()


def test_the_reference_refuses_wrong_levels() -> None:
    chunk = bytes.fromhex("0300000000 4b 01")
    right = chunked([chunk], codebook=BOOK.tobytes(), scales=bytes.fromhex("0042 00c2"))
    decode("ternary", (2, 3), ROW, right)
    for change, message in (
        ({"codebook": bytes.fromhex("000080bf 00000034 0000803f")}, "middle entry"),
        ({"codebook": bytes.fromhex("000080ff 00000000 0000803f")}, "codebook entry 0 is infinite"),
        ({"codebook": bytes.fromhex("000080bf 00000000 0100c07f")}, "codebook entry 2 is infinite"),
        ({"codebook": bytes.fromhex("000080bf 0000c07f 0000803f")}, "codebook entry 1 is infinite"),
        ({"codebook": BOOK.tobytes() + bytes(8)}, "segments are"),
        ({"scales": bytes.fromhex("0042 007c")}, "scale 1 is infinite"),
        ({"scales": bytes.fromhex("01fe 0042")}, "scale 0 is infinite"),
        ({"scales": bytes(8)}, "segments are"),
        ({"chunks": bytes.fromhex("0300000000 4b f3")}, "symbol 243"),
        ({"chunks": bytes.fromhex("0300000000 4b"), "lengths": b"\6\0\0\0"}, "are needed"),
        ({"chunks": bytes.fromhex("0400000000 4b 01 01"), "lengths": b"\x08\0\0\0"}, "left over"),
    ):
        with pytest.raises(reference.SpecError, match=message):
            decode("ternary", (2, 3), ROW, right | change)
    with pytest.raises(reference.SpecError, match="segments are"):
        decode("ternary", (2, 3), TERNARY, right)
    with pytest.raises(reference.SpecError, match="segments are"):
        decode("levels", (2, 3), ROW | {"n": 5}, right)


# ---- lossless

SIZES = {"f8_e4m3": 1, "f8_e5m2": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


def elements_of(group: list[int], dtype: str, sparse: bool, plain: bool, base: int, mode: int) -> bytes:
    """A group of a chunk, from its elements as integers."""
    size = SIZES[dtype]
    if not group:
        return b""
    result = bytes([sparse + 2 * plain])
    if sparse:
        bits = "".join("1" if element else "0" for element in group)
        result += stream(bits_to_bytes(bits), 256, mode)
        group = [element for element in group if element]
        if not group:
            return result
    if plain or dtype not in {"bf16", "f32"}:
        return result + b"".join(stream([e >> 8 * i & 255 for e in group], 256, mode) for i in reversed(range(size)))
    upper = [element >> 8 * size - 16 for element in group]
    places = [((h // 32 % 1024) - base) % 1024 for h in upper]
    result += struct.pack("<H", base) + stream([min(place, 255) for place in places], 256, mode)
    result += b"".join(
        struct.pack("<H", h // 32 % 1024) for h, place in zip(upper, places, strict=True) if place >= 255
    )
    result += stream(join([h % 16 for h in upper], 16), 16, mode)
    result += stream(join([2 * (h >> 15) + h // 16 % 2 for h in upper], 4), 4, mode)
    if dtype == "f32":
        result += stream([e >> 8 & 255 for e in group], 256, mode) + stream([e & 255 for e in group], 256, mode)
    return result


def lossless_chunk(
    rows: list[list[int]], dtype: str, groups: list[int], marks: list[tuple[bool, bool, int]], mode: int = CODED
) -> bytes:
    """A chunk of these rows; for each group whether it is sparse and plain, and B."""
    result = bytes([len(marks)])
    if len(marks) > 1:
        result += stream(groups, 256, mode)
    for number, (sparse, plain, base) in enumerate(marks):
        members = [element for row, group in zip(rows, groups, strict=True) if group == number for element in row]
        result += elements_of(members, dtype, sparse, plain, base, mode)
    return result


def patterns(dtype: str, rows: int, cols: int, seed: int = 0) -> list[list[int]]:
    """Of all kinds: zeros of both signs, ones that are infinite or NaN, random ones."""
    size = SIZES[dtype]
    rng = np.random.default_rng(seed)
    found = [[int.from_bytes(rng.bytes(size), "little") for _ in range(cols)] for _ in range(rows)]
    for row in found:
        row[:4] = [0, 0, 1 << 8 * size - 1, (1 << 8 * size) - 1]
    return found


def check_lossless(
    dtype: str, rows: list[list[int]], chunks: list[bytes], shape: tuple[int, ...] | None = None
) -> None:
    """Assert that chunks decode to the values of the raw codec."""
    data = b"".join(element.to_bytes(SIZES[dtype], "little") for row in rows for element in row)
    shape = shape or (len(rows), len(rows[0]))
    expected = decode(dtype, shape, {}, {"data": data}, dtype)
    values = decode("lossless", shape, {}, chunked(chunks), dtype)
    assert values.dtype == expected.dtype
    assert values.shape == shape
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", [RAW, CODED])
@pytest.mark.parametrize("dtype", SIZES)
def test_the_reference_decodes_lossless_groups_of_every_kind(dtype: str, mode: int) -> None:
    rows = patterns(dtype, 6, 21)
    rows[2] = [0] * 21  # of a sparse group without an element that is not 0
    plains = [False, True] if dtype in {"bf16", "f32"} else [False]
    for plain in plains:
        for sparse in (False, True):
            for base in (0, 500, 1023):
                one = [(sparse, plain, base)]
                check_lossless(dtype, rows, [lossless_chunk(rows, dtype, [0] * 6, one, mode)], (6, 7, 3))
    marks = [(False, False, 300), (True, False, 1000), (True, plains[-1], 7), (False, plains[-1], 0)]
    marks += [(False, False, 0)] * 12  # without rows
    groups = [3, 0, 1, 2, 0, 2]
    check_lossless(dtype, rows, [lossless_chunk(rows, dtype, groups, marks, mode)])
    check_lossless(dtype, rows, [lossless_chunk(rows, dtype, [g + 12 for g in groups], marks[4:] + marks[:4])])
    check_lossless(dtype, [[7]], [lossless_chunk([[7]], dtype, [0], [(False, False, 0)], RAW)], ())


def test_the_reference_cuts_lossless_tensors_into_chunks_as_the_spec_says() -> None:
    """Rows of zeros, but the last element of each chunk is not 0."""
    for shape, sizes in (
        ((5, 200_000), [400_000, 400_000, 200_000]),
        ((2, CHUNK_ELEMENTS + 1), [CHUNK_ELEMENTS, 1] * 2),
        ((CHUNK_ELEMENTS + 1,), [CHUNK_ELEMENTS, 1]),
    ):
        chunks, elements = [], []
        for number, size in enumerate(sizes):
            elements += [0] * (size - 1) + [number + 1]
            rows = [elements[-size:]]
            # One group, that of the one row as which the chunk is seen here.
            chunks.append(padded(lossless_chunk(rows, "f16", [0], [(True, False, 0)]), size))
        check_lossless("f16", [elements], chunks, shape)


# bf16 0xc123 and 0x0000, in two rows. v = 0x209 = 521 and 0; B = 521; 0 is elsewhere: 0 - 521 mod 1024 is 503.
# h mod 16: 3, 0; 2 × sign + bit 4: 2 × 1 + 0, 0.
TWO_ROWS = bytes.fromhex("01 00 0902 0300000000 00 ff 0000 020000000003 020000000002")
# The same in two groups, the second one of zeros and sparse.
TWO_GROUPS = bytes.fromhex("02 0300000000 00 01  00 0902 020000000100 020000000103 020000000102  01 020000000000")
# Of f8: 0x80 and 0; plain is not known. One group, sparse: bits 1, 0.
SPARSE = bytes.fromhex("01 01 020000000001 020000000080")


def test_the_reference_decodes_lossless_chunks_made_by_hand() -> None:
    for chunk in (TWO_ROWS, TWO_GROUPS):
        check_lossless("bf16", [[0xC123], [0]], [chunk])
    check_lossless("f8_e4m3", [[0x80, 0]], [SPARSE])


@pytest.mark.parametrize(
    ("dtype", "chunk", "old", "new", "message"),
    [
        ("bf16", TWO_ROWS, "01 00 0902", "00 00 0902", "0 groups"),
        ("bf16", TWO_ROWS, "01 00 0902", "11 00 0902", "17 groups"),
        ("bf16", TWO_ROWS, "01 00 0902", "01 04 0902", "marked with 4"),
        ("bf16", TWO_ROWS, "01 00 0902", "01 80 0902", "marked with 128"),
        ("bf16", TWO_ROWS, "01 00 0902", "01 00 0004", "not below 1024"),
        ("bf16", TWO_ROWS, "00 ff 0000", "00 ff 0004", "not below 1024"),
        ("bf16", TWO_ROWS, "00 ff 0000", "00 00 0000", "are needed"),  # two bytes that belong to no element
        ("bf16", TWO_ROWS, "00 ff 0000", "ff ff 0000", "are needed"),  # two bytes too few
        ("bf16", TWO_ROWS, "0000000002", "000000000200", "left over"),
        ("bf16", TWO_GROUPS, "00 01 00 0902", "00 02 00 0902", "group 2 is not below 2"),
        ("bf16", TWO_GROUPS, "01 020000000000", "01 020000000002", "past the last element"),
        ("bf16", TWO_GROUPS, "01 020000000000", "01 020000000001", "are needed"),
        ("bf16", TWO_GROUPS, "01 020000000000", "01 020000000000 00", "left over"),
        ("bf16", TWO_GROUPS, "01 020000000000", "", "are needed"),
        ("f8_e4m3", SPARSE, "01 01 02", "01 03 02", "marked with 3"),
        ("f8_e4m3", SPARSE, "01 01 02", "01 02 02", "marked with 2"),
        ("f8_e4m3", SPARSE, "0000000001", "0000000005", "past the last element"),
        ("f8_e4m3", SPARSE, "0000000080", "0000000000", "marked as not 0"),
        ("f8_e4m3", SPARSE, "0000000001", "0000000003", "are needed"),
    ],
)
def test_the_reference_refuses_wrong_lossless_chunks(
    dtype: str, chunk: bytes, old: str, new: str, message: str
) -> None:
    assert chunk.count(bytes.fromhex(old)) == 1
    wrong = chunk.replace(bytes.fromhex(old), bytes.fromhex(new))
    shape = (2, 1) if dtype == "bf16" else (1, 2)
    with pytest.raises(reference.SpecError, match=message):
        decode("lossless", shape, {}, chunked([wrong]), dtype)


def test_truncated_or_changed_chunks_raise_only_spec_errors() -> None:
    """No other error than `SpecError` leaves the reader."""
    rng = np.random.default_rng(0)
    rows = patterns("f32", 6, 40)
    marks = [(False, False, 200), (True, False, 1000), (True, True, 0)]
    blocks = some_blocks("q5_1", 9)
    for codec, shape, params, chunk, others in (
        ("lossless", (6, 40), {}, lossless_chunk(rows, "f32", [2, 0, 1, 1, 0, 2], marks), {}),
        ("q5_1", (3, 70), {"coded": True}, block_chunk("q5_1", blocks), {}),
        ("ternary", (400,), TERNARY, stream(random_symbols(80, 243), 3, BY_DIGITS), {"codebook": BOOK.tobytes()}),
    ):
        decode(codec, shape, params, chunked([chunk], **others))
        refused = 0
        for end in rng.integers(0, len(chunk), 60):
            with pytest.raises(reference.SpecError):
                decode(codec, shape, params, chunked([chunk[:end]], **others))
        for _ in range(120):
            changed = bytearray(chunk)
            changed[rng.integers(len(chunk))] ^= rng.integers(1, 256)
            try:
                decode(codec, shape, params, chunked([bytes(changed)], **others))
            except reference.SpecError:
                refused += 1
        assert refused > 80
