"""The codecs' part of the reference reader: from the segments of a tensor to its values.

`where` is the beginning of error messages. Numbers in comments and docstrings are sections of `codecs.md`, those after
"container" of `container.md`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from reference_streams import DENSITY, Cursor, SpecError, borders, chunks, digits, fail, from_bytes, symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy.typing as npt

    Params = Mapping[str, object]
    Segments = Sequence[tuple[str, bytes]]
    Float32 = npt.NDArray[np.float32]

T = TypeVar("T")

# Exponent and mantissa bits of the floating dtypes (2).
FLOATING = {
    "f8_e4m3": (4, 3),
    "f8_e5m2": (5, 2),
    "f8_e8m0": (8, 0),
    "f16": (5, 10),
    "bf16": (8, 7),
    "f32": (8, 23),
    "f64": (11, 52),
}
# The stored elements of each dtype (1). Those of bool, bf16 and f8 are widened afterwards.
DTYPES = {
    "bool": "u1",
    **{f"u{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"i{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    "f8_e4m3": "u1",
    "f8_e5m2": "u1",
    "f8_e8m0": "u1",
    "f16": "<f2",
    "bf16": "<u2",
    "f32": "<f4",
    "f64": "<f8",
}


# The dtypes that scales may have.
SCALES = ("f16", "bf16", "f32")


def get(record: Mapping[str, object], key: str, kind: type[T], where: str) -> T:
    """Return the value of a required key, of exactly this type: a bool is an int in Python, but not in the format.

    Parameters
    ----------
    record : mapping
        An object of the index.
    key : str
        The key.
    kind : type
        Type of the value.
    where : str
        Beginning of error messages.

    Returns
    -------
    object
        The value.

    Raises
    ------
    SpecError
        If the key is missing or its value has another type.
    """
    value = record.get(key)
    if not isinstance(value, kind) or type(value) is not kind:
        fail(where, f"{key!r} is missing or not of type {kind.__name__}")
    return value


def decode(
    codec: str, dtype: str, shape: tuple[int, ...], params: Params, segments: Segments, *, has_error: bool, where: str
) -> npt.NDArray[Any]:
    """Decode one tensor.

    Parameters
    ----------
    codec, dtype, shape, params
        Of the tensor's record.
    segments : sequence of (str, bytes)
        Name and bytes of each segment.
    has_error : bool
        Whether the record has an `error`.
    where : str
        Beginning of error messages.

    Returns
    -------
    numpy.ndarray
        The values in this shape, of the type that `reference.decode` documents.

    Raises
    ------
    SpecError
        If the codec or the dtype is unknown, or something does not fit the codec.
    """
    # container 3.7: an unknown codec or dtype makes this tensor unreadable and no other.
    if codec not in DTYPES and codec not in MATRIX_CODECS and codec != "lossless":
        fail(where, f"unknown codec {codec!r}")
    if dtype not in DTYPES:
        fail(where, f"unknown dtype {dtype!r}")
    lossless = _check_dtype(codec, dtype, where)
    if lossless == has_error:  # container 3.3: absent if and only if the codec preserves every tensor
        fail(where, f"{codec} of {dtype} must {'not ' if lossless else ''}have an error")
    values: npt.NDArray[Any]
    if codec in DTYPES:
        values = _decode_raw(codec, math.prod(shape), params, segments, where)
    elif codec == "lossless":
        values = _decode_lossless(dtype, *rows_cols(shape), params, segments, where)
    else:
        values = MATRIX_CODECS[codec](*rows_cols(shape), params, segments, where)
    return shaped(values, shape, where)


def shaped(values: npt.NDArray[Any], shape: tuple[int, ...], where: str) -> npt.NDArray[Any]:
    """Return values in the tensor's shape."""
    try:
        return values.reshape(shape)
    except ValueError:
        # Only without elements: numpy also bounds the product of those dimensions that are not 0.
        fail(where, f"shape {shape} is beyond what numpy holds")


# ---- rules that several codecs share


def _check_dtype(codec: str, dtype: str, where: str) -> bool:
    """Check that this codec may store this dtype; return whether it preserves every tensor of it bit for bit."""
    if dtype == codec:
        return True
    if dtype not in FLOATING or (codec in DTYPES and codec not in ("f16", "bf16", "f32", "f64")):
        fail(where, f"dtype {dtype} cannot be stored as {codec}")
    if codec == "lossless":
        return True
    return codec in DTYPES and all(a <= b for a, b in zip(FLOATING[dtype], FLOATING[codec], strict=True))


def rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of the matrix that a tensor is seen as (3)."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def check_keys(params: Params, known: Collection[str], where: str) -> None:
    """Check that there are no other parameters: with one, a reader MUST NOT decode (container 3.3)."""
    if unknown := sorted(set(params) - set(known)):
        fail(where, f"unknown params {unknown}")


def _choice(params: Params, key: str, allowed: Sequence[T], where: str) -> T:
    """Return a parameter that must be one of a few values, all of one type."""
    value = get(params, key, type(allowed[0]), where)
    if value not in allowed:
        fail(where, f"{key!r} is {value!r} and none of {list(allowed)}")
    return value


def _take(segments: Segments, layout: list[tuple[str, int]], n: int, where: str) -> list[bytes]:
    """Return the segments of a tensor of n elements, which must have these names, this order and these lengths."""
    needed = [(name, length if n else 0) for name, length in layout]  # 3: if n is 0, every segment is empty
    found = [(name, len(content)) for name, content in segments]
    if found != needed:  # container 8: before the result is allocated
        fail(where, f"segments are {found[:4]}, but the codec needs {needed}")
    return [content for _, content in segments]


def _widen(stored: npt.NDArray[Any], what: str, where: str) -> Float32:
    """Return scales and similar numbers, f16, f32 or the bits of bf16, as binary32; they must be finite (3)."""
    if stored.dtype.kind == "u":
        values: Float32 = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.astype(np.float32)
    if not np.all(np.isfinite(values)):
        fail(where, f"{what} {np.argmin(np.isfinite(values))} is infinite or NaN")
    return values


def _halves(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the 4-bit codes of blocks: first all low halves of the bytes, then all high ones."""
    return np.concatenate([stored & 15, stored >> 4], axis=1)


def _unpack(stored: bytes, rows: int, cols: int, bits: int) -> npt.NDArray[np.int32]:
    """Return the codes of each row (6)."""
    each_bit = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little").reshape(rows, -1, bits)
    return each_bit[:, :cols].astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))


def _packed_length(rows: int, cols: int, bits: int) -> int:
    return rows * -(-cols // 32) * 4 * bits


# ---- raw


def _f8_table(exponent_bits: int, bias: int) -> Float32:
    """Return the value of each of the 256 codes, as if none were infinite or NaN."""
    bits, code = 7 - exponent_bits, np.arange(256)
    exponent, mantissa = (code & 0x7F) >> bits, code & (1 << bits) - 1
    mantissa += np.where(exponent > 0, 1 << bits, 0)
    magnitude = np.ldexp(mantissa.astype(np.float32), np.maximum(exponent, 1) - bias - bits)
    table: Float32 = np.where(code < 0x80, magnitude, -magnitude)
    return table


F8_TABLES = {"f8_e4m3": _f8_table(4, 7), "f8_e5m2": _f8_table(5, 15)}
F8_TABLES["f8_e4m3"][[0x7F, 0xFF]] = np.nan
F8_TABLES["f8_e5m2"].reshape(2, 128)[:, 0x7C:] = [[np.inf, *[np.nan] * 3], [-np.inf, *[np.nan] * 3]]

F8_TABLES["f8_e8m0"] = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)


def _decode_raw(codec: str, n: int, params: Params, segments: Segments, where: str) -> npt.NDArray[Any]:
    check_keys(params, (), where)
    dtype = np.dtype(DTYPES[codec])
    (data,) = _take(segments, [("data", n * dtype.itemsize)], n, where)
    return raw_values(codec, np.frombuffer(data, dtype).copy(), where)


def raw_values(codec: str, values: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Widen the stored elements of a raw codec, if numpy has no such dtype."""
    if codec == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif codec in F8_TABLES:
        values = F8_TABLES[codec][values]
    elif codec == "bool":
        if np.any(values > 1):
            fail(where, f"element {np.argmax(values > 1)} is neither 0 nor 1")
        values = values.astype(np.bool_)
    return values


# ---- blocks

# The fields of a block, and the number z that is subtracted from the codes (4).
BLOCK_FIELDS: dict[str, tuple[list[tuple[str, str, int]], int]] = {
    "q4_0": ([("scale", "<f2", 1), ("low", "u1", 16)], 8),
    "q4_1": ([("scale", "<f2", 1), ("minimum", "<f2", 1), ("low", "u1", 16)], 0),
    "q5_0": ([("scale", "<f2", 1), ("fifth", "u1", 4), ("low", "u1", 16)], 16),
    "q5_1": ([("scale", "<f2", 1), ("minimum", "<f2", 1), ("fifth", "u1", 4), ("low", "u1", 16)], 0),
    "q8_0": ([("scale", "<f2", 1), ("codes", "i1", 32)], 0),
}


def _decode_blocks(codec: str, rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("coded",), where)
    fields, z = BLOCK_FIELDS[codec]
    layout = np.dtype([(name, kind, (count,)) for name, kind, count in fields])
    data = _take_blocks(codec, rows, cols, 32, layout.itemsize, params, segments, where)
    if not data:
        return np.empty(0, np.float32)
    blocks = np.frombuffer(data, layout)
    codes = (blocks["codes"] if codec == "q8_0" else _halves(blocks["low"])).astype(np.float32)
    if codec in ("q5_0", "q5_1"):
        codes += 16 * np.unpackbits(blocks["fifth"], axis=1, bitorder="little")
    values: Float32 = _widen(blocks["scale"], "scale of block", where) * (codes - np.float32(z))
    if codec in ("q4_1", "q5_1"):
        values += _widen(blocks["minimum"], "minimum of block", where)
    return values.reshape(rows, -1)[:, :cols].reshape(-1)


def _take_blocks(
    codec: str, rows: int, cols: int, block: int, size: int, params: Params, segments: Segments, where: str
) -> bytes:
    """Return the blocks of `block` elements and `size` bytes, which may be coded (13)."""
    if "coded" not in params:
        (data,) = _take(segments, [("blocks", rows * -(-cols // block) * size)], rows * cols, where)
        return data
    if params["coded"] is not True:
        fail(where, "'coded' is there, but not true")
    places, (content, lengths) = _take_chunked(segments, rows, cols, block, [], where)
    every = np.empty((rows, -(-cols // block), size), np.uint8)
    before = {"nlm": 3, "q4_1": 4, "q5_1": 4}.get(codec, 2)
    for row, col, cursor in chunks(content, lengths, places, where):
        part = every[row, col.start // block : -(-col.stop // block)]
        blocks = np.empty((part.shape[0] * part.shape[1], size), np.uint8)
        for i in range(before):
            blocks[:, i] = symbols(cursor, len(blocks))
        if before == 4:  # stored in place of m: its difference to d
            d, m = (blocks[:, i].astype(np.uint16) + 256 * blocks[:, i + 1].astype(np.uint16) for i in (0, 2))
            blocks[:, 2:4] = (m + d).astype("<u2")[:, None].view(np.uint8)
        if codec in ("q5_0", "q5_1"):
            q = digits(cursor, 32 * len(blocks), 32).reshape(-1, 32)
            blocks[:, before : before + 4] = np.packbits(q >> 4, axis=1, bitorder="little")
            blocks[:, before + 4 :] = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
        else:
            count = len(blocks) * (size - before)
            blocks[:, before:] = symbols(cursor, count, 256 if codec == "q8_0" else 16).reshape(len(blocks), -1)
        part[:] = blocks.reshape(part.shape)
    return every.tobytes()


def _take_chunked(
    segments: Segments, rows: int, cols: int, alignment: int, layout: list[tuple[str, int]], where: str
) -> tuple[list[tuple[slice, slice]], list[bytes]]:
    """Return the borders and the segments of a chunked tensor; `layout` lists those after `lengths` (11)."""
    content, n = segments[0][1] if segments else b"", rows * cols
    if n > DENSITY * len(content):  # before the result, or a list of chunks, is allocated
        fail(where, f"{len(content)} bytes of chunks are too few for {n} elements")
    places = borders(rows, cols, alignment)
    return places, _take(segments, [("chunks", len(content)), ("lengths", 4 * len(places)), *layout], n, where)


# ---- nlm

NLM_LEVELS = (
    (0, 1092, 2185, 3277, 4369, 5461, 6554, 7646, 8738, 9830, 10923, 12015, 13107, 14199, 15292, 16384),
    (0, 1471, 2734, 3864, 4903, 5881, 6820, 7737, 8647, 9564, 10503, 11481, 12520, 13650, 14913, 16384),
    (0, 1821, 3177, 4292, 5267, 6154, 6989, 7794, 8590, 9395, 10230, 11117, 12092, 13207, 14563, 16384),
    (0, 2375, 3780, 4830, 5701, 6470, 7179, 7858, 8526, 9205, 9914, 10683, 11554, 12604, 14009, 16384),
)


def _decode_nlm(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("block", "coded"), where)
    block = _choice(params, "block", (32, 64, 128), where)
    data = _take_blocks("nlm", rows, cols, block, 3 + block // 2, params, segments, where)
    if not data:
        return np.empty(0, np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 3 + block // 2)
    h = blocks[:, :3] @ np.array([1, 1 << 8, 1 << 16], np.uint32)
    r = _widen(((h & 1023) << 5).astype(np.uint16).view(np.float16), "range of block", where)
    m = _widen(((h >> 10 & 4095) << 4).astype(np.uint16).view(np.float16), "minimum of block", where)
    levels = np.array(NLM_LEVELS, np.float32)[h >> 22] / np.float32(16384)
    steps = np.take_along_axis(levels, _halves(blocks[:, 3:]).astype(np.int64), axis=1)
    values: Float32 = m[:, None] + r[:, None] * steps
    return values.reshape(rows, -1)[:, :cols].reshape(-1)


# ---- affine


def _decode_affine(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    act_order = "act_order" in params
    check_keys(params, ("bits", "group", "sym", "scale", *(["act_order"] if act_order else [])), where)
    if act_order and get(params, "act_order", bool, where) is not True:
        fail(where, "'act_order' is there, but not true")
    bits = _choice(params, "bits", (2, 3, 4, 8), where)
    sym = get(params, "sym", bool, where)
    scale = _choice(params, "scale", SCALES, where)
    width = cols  # columns that share a scale
    if act_order or params.get("group") != "row":
        group = get(params, "group", int, where)
        least = 1 if act_order else 32
        if not least <= group <= 2**20 or group % least:
            fail(where, f"'group' {group} is not a multiple of {least} from {least} to 2^20")
        width = min(group, cols)
    groups = -(-cols // width) if cols else 0
    layout = [("scales", rows * groups * np.dtype(DTYPES[scale]).itemsize)]
    if not sym:
        layout.append(("zeros", rows * groups))
    if act_order:
        layout.append(("g_idx", 4 * cols))
    layout.append(("codes", _packed_length(rows, cols, bits)))
    scales, *zeros, codes = _take(segments, layout, rows * cols, where)
    if not scales:
        return np.empty(0, np.float32)
    group_of_column = np.arange(cols) // width
    if act_order:
        group_of_column = np.frombuffer(zeros.pop(), "<u4").astype(np.int64)
        if (group_of_column >= groups).any():
            fail(where, "a column is in a group that does not exist")
    d = _widen(np.frombuffer(scales, DTYPES[scale]), "scale", where).reshape(rows, groups)[:, group_of_column]
    q = _unpack(codes, rows, cols, bits)
    if sym:
        q -= 1 << (bits - 1)
    else:
        q -= np.frombuffer(zeros[0], np.uint8).reshape(rows, groups)[:, group_of_column]
    with np.errstate(over="ignore"):  # a product beyond binary32 rounds to an infinity
        values: Float32 = d * q.astype(np.float32)
    return values.reshape(-1)


# ---- fp8


def _decode_fp8(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("format", "rows", "cols", "scale"), where)
    code = _choice(params, "format", ("e4m3", "e5m2"), where)
    scale = _choice(params, "scale", SCALES, where)
    (each,), codes = _take_bands(rows, cols, params, [("scales", scale)], rows * cols, segments, where)
    if not codes:
        return np.empty(0, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are values here
        values: Float32 = F8_TABLES[f"f8_{code}"][np.frombuffer(codes, np.uint8)] * each.reshape(-1)
    return values


def _take_bands(
    rows: int, cols: int, params: Params, numbers: list[tuple[str, str]], codes: int, segments: Segments, where: str
) -> tuple[list[Float32], bytes]:
    """Return numbers, named and of a dtype, of bands and groups, for each element (rows x cols); and the codes (8.2)."""
    height, width = (_extent(params, key, count, where) for key, count in (("rows", rows), ("cols", cols)))
    listed = params["rows"] not in (1, "all")
    bands, groups = -(-rows // height), -(-cols // width)
    layout = [(name, bands * groups * np.dtype(DTYPES[dtype]).itemsize) for name, dtype in numbers]
    if listed:
        layout.append(("bands", 4 * rows))
    *found, stored = _take(segments, [*layout, ("codes", codes)], rows * cols, where)
    if not stored:
        return [np.empty((rows, cols), np.float32) for _ in numbers], b""
    band_of_row = np.frombuffer(found.pop(), "<u4").astype(np.int64) if listed else np.arange(rows) // height
    if (band_of_row >= bands).any():
        fail(where, "a row is in a band that does not exist")
    each = []
    for (name, dtype), content in zip(numbers, found, strict=True):
        values = _widen(np.frombuffer(content, DTYPES[dtype]), name, where).reshape(bands, groups)
        each.append(values[band_of_row][:, np.arange(cols) // width])
    return each, stored


def _extent(params: Params, key: str, count: int, where: str) -> int:
    """Return the rows of a band or the columns of a group; for `all`, `count` or 1."""
    if params.get(key) == "all":
        return max(count, 1)
    size = get(params, key, int, where)
    if not 1 <= size <= 2**20:
        fail(where, f"{key!r} {size} is not from 1 to 2^20")
    return size


# ---- scaled


def _decode_scaled(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("bits", "rows", "cols", "scale", "zero", "form", "offset"), where)
    bits = _choice(params, "bits", (1, 2, 3, 4, 5, 6, 8), where)
    scale = _choice(params, "scale", SCALES, where)
    zero = _choice(params, "zero", ("none", *SCALES), where)
    form = _choice(params, "form", ("add",) if zero == "none" else ("add", "sub"), where)
    offset = get(params, "offset", int, where)
    if not 0 <= offset < 1 << bits:
        fail(where, f"'offset' {offset} is not from 0 to 2^bits - 1")
    numbers = [("scales", scale), *([] if zero == "none" else [("zeros", zero)])]
    (d, *z), codes = _take_bands(rows, cols, params, numbers, _packed_length(rows, cols, bits), segments, where)
    if not codes:
        return np.empty(0, np.float32)
    values: Float32 = (_unpack(codes, rows, cols, bits) - offset).astype(np.float32)
    with np.errstate(over="ignore"):  # what is beyond binary32 rounds to an infinity
        if form == "sub":
            values = (values - z[0]) * d
        else:
            values = values * d
            values = values + z[0] if z else values
    return values.reshape(-1)


# ---- ggml


def _decode_ggml(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("type",), where)
    if params.get("type") != "tq2_0":
        fail(where, "this reader decodes only tq2_0 of the ggml types")
    (data,) = _take(segments, [("blocks", rows * -(-cols // 256) * 66)], rows * cols, where)
    if not data:
        return np.empty(0, np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 66)
    d = _widen(blocks[:, 64:].copy().view(np.float16)[:, 0], "scale", where)
    codes = np.stack([blocks[:, :64].reshape(-1, 2, 32) >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    values: Float32 = d[:, None] * (codes.reshape(-1, 256).astype(np.float32) - 1)
    return values.reshape(rows, -1)[:, :cols].reshape(-1)


# ---- lut


def _decode_lut(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("scope", "block", "size", "scale"), where)
    scope = _choice(params, "scope", ("tensor", "block"), where)
    block = _choice(params, "block", (128, 256) if scope == "block" else (128,), where)
    size = _choice(params, "size", (4, 8, 16), where)
    scale = _choice(params, "scale", ("tensor", "row") if scope == "tensor" else ("tensor",), where)
    bits = {4: 2, 8: 3, 16: 4}[size]
    books_per_row = -(-cols // block) if scope == "block" else 0
    books = rows * books_per_row if scope == "block" else 1
    layout = [("codebooks", books * size * 2)]
    if scale == "row":
        layout.append(("scales", rows * 2))
    layout.append(("codes", _packed_length(rows, cols, bits)))
    codebooks, *scales, codes = _take(segments, layout, rows * cols, where)
    if not codes:
        return np.empty(0, np.float32)
    entries = _widen(np.frombuffer(codebooks, "<f2"), "codebook entry", where).reshape(books, size)
    book = np.zeros((rows, cols), np.int64)
    if scope == "block":
        book = np.arange(rows)[:, None] * books_per_row + np.arange(cols) // block
    values: Float32 = entries[book, _unpack(codes, rows, cols, bits)]
    if scale == "row":
        values *= _widen(np.frombuffer(scales[0], "<f2"), "scale", where)[:, None]
    return values.reshape(-1)


# ---- codebook


def _decode_codebook(rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    transposed = "transposed" in params
    check_keys(params, ("bits", "group", "flat", "scale", "factor", *(["transposed"] if transposed else [])), where)
    bits = _choice(params, "bits", (4, 8), where)
    flat = get(params, "flat", bool, where)
    scale = _choice(params, "scale", ("f32", "f16", "bf16", "f8_e4m3", "f8_e8m0"), where)
    kind = _choice(params, "factor", ("none", "scale", "divisor", "value"), where)
    group = max(cols, 1)
    if flat or params.get("group") != "row":
        group = get(params, "group", int, where)
        if not 16 <= group <= 2**20 or group % 16:
            fail(where, f"'group' {group} is not a multiple of 16 from 16 to 2^20")
    inner = get(params, "transposed", int, where) if transposed else 1
    if not 1 <= inner < 2**31 or cols % inner or (transposed and flat):
        fail(where, f"'transposed' {inner} is not possible")
    count = -(-rows * cols // group) if flat else rows * -(-cols // group)
    layout = [("table", 4 << bits)]
    if kind != "none":
        layout.append(("factor", 4))
    layout.append(("scales", count * np.dtype(DTYPES[scale]).itemsize))
    if flat:
        layout.append(("starts", 8 * rows))
    layout.append(("codes", _packed_length(rows, cols, bits)))
    found = dict(zip([name for name, _ in layout], _take(segments, layout, rows * cols, where), strict=True))
    if not rows * cols:
        return np.empty(0, np.float32)
    table = _widen(np.frombuffer(found["table"], "<f4"), "entry", where)
    stored = np.frombuffer(found["scales"], DTYPES[scale])
    s = _widen(F8_TABLES[scale][stored] if scale in F8_TABLES else stored, "scale", where)
    f = _widen(np.frombuffer(found.get("factor", b""), "<f4"), "factor", where)
    column = np.arange(cols)
    if flat:
        starts = np.frombuffer(found["starts"], "<u8")
        if (starts > max(0, count * group - cols)).any():
            fail(where, "a row is beyond the last group")
        number = (starts.astype(np.int64)[:, None] + column) // group
    else:
        number = np.arange(rows)[:, None] * -(-cols // group) + column // group
    with np.errstate(all="ignore"):  # what overflows rounds to an infinity
        s = {"scale": lambda: s * f, "divisor": lambda: s / f}.get(kind, lambda: s)()
        values: Float32 = table[_unpack(found["codes"], rows, cols, bits)] * s[number]
        if kind == "value":
            values *= f
    return values.reshape(rows, -1, inner).transpose(0, 2, 1).reshape(-1) if transposed else values.reshape(-1)


# ---- ternary and levels


def _decode_levels(codec: str, rows: int, cols: int, params: Params, segments: Segments, where: str) -> Float32:
    check_keys(params, ("scale", "group", "dtype", *(["n"] if codec == "levels" else [])), where)
    n = _choice(params, "n", (3, 5, 7, 9, 11, 13, 15), where) if codec == "levels" else 3
    scale = _choice(params, "scale", ("tensor", "row", "group"), where)
    group = get(params, "group", int, where)
    if not 32 <= group <= 2**20 or group % 32 or (scale != "group" and group != 128):
        fail(where, f"'group' {group} is not possible")
    dtype = _choice(params, "dtype", ("f16",) if scale == "tensor" else ("f16", "bf16", "f32"), where)
    width = min(group, cols) if scale == "group" else cols  # columns that share a scale
    groups = -(-cols // width) if cols else 0
    layout = [("codebook", 4 * n)]
    if scale != "tensor":
        layout.append(("scales", rows * groups * np.dtype(DTYPES[dtype]).itemsize))
    alignment = 1 if scale == "tensor" else width
    places, (content, lengths, codebook, *scales) = _take_chunked(segments, rows, cols, alignment, layout, where)
    if not rows * cols:
        return np.empty(0, np.float32)
    entries = _widen(np.frombuffer(codebook, "<f4"), "codebook entry", where)
    if entries[n // 2] != 0:
        fail(where, f"the middle entry of the codebook is {entries[n // 2]}")
    values = np.empty((rows, cols), np.float32)
    for row, col, cursor in chunks(content, lengths, places, where):
        part = values[row, col]
        part[:] = entries[digits(cursor, part.size, n)].reshape(part.shape)
    if scales:
        d = _widen(np.frombuffer(scales[0], DTYPES[dtype]), "scale", where).reshape(rows, groups)
        with np.errstate(over="ignore"):  # a product beyond binary32 rounds to an infinity
            values *= d[:, np.arange(cols) // width]
    return values.reshape(-1)


# ---- lossless


def _decode_lossless(
    dtype: str, rows: int, cols: int, params: Params, segments: Segments, where: str
) -> npt.NDArray[Any]:
    check_keys(params, (), where)
    places, (content, lengths) = _take_chunked(segments, rows, cols, 1, [], where)
    size = np.dtype(DTYPES[dtype]).itemsize
    patterns = np.empty((rows, cols), np.uint64)
    for row, col, cursor in chunks(content, lengths, places, where):
        part = patterns[row, col]
        count = cursor.number(1)
        if not 1 <= count <= 16:
            fail(cursor.where, f"{count} groups of rows")
        group = symbols(cursor, len(part)) if count > 1 else np.zeros(len(part), np.uint8)
        if group.max() >= count:
            fail(cursor.where, f"group {group.max()} is not below {count}")
        for number in range(count):
            members = np.flatnonzero(group == number)
            elements = _group(cursor, len(members) * part.shape[1], dtype, size)
            part[members] = elements.reshape(len(members), part.shape[1])
    stored = patterns.astype(f"<u{size}").view(DTYPES[dtype])
    return raw_values(dtype, stored.reshape(-1), where)


def _group(cursor: Cursor, count: int, dtype: str, size: int) -> npt.NDArray[Any]:
    """Read the elements of a group of rows, as unsigned integers (15.2)."""
    if not count:
        return np.empty(0, np.uint64)
    mark = cursor.number(1)
    if mark > (3 if dtype in ("bf16", "f32") else 1):
        fail(cursor.where, f"a group is marked with {mark}")
    sparse, plain = mark % 2 == 1, mark >= 2
    used = np.ones(count, np.bool_)
    if sparse:
        bits = np.unpackbits(symbols(cursor, -(-count // 8)), bitorder="little")
        if np.any(bits[count:]):
            fail(cursor.where, "bits past the last element are not 0")
        used = bits[:count] == 1
    elements = np.zeros(count, np.uint64)
    stored = _parts(cursor, int(used.sum()), plain or dtype not in ("bf16", "f32"), size)
    if sparse and not np.all(stored):
        fail(cursor.where, "an element is 0, but marked as not 0")
    elements[used] = stored
    return elements


def _parts(cursor: Cursor, count: int, plain: bool, size: int) -> npt.NDArray[Any]:
    """Read the parts of `count` elements (15.3)."""
    if not count:
        return np.empty(0, np.uint64)
    if plain:
        return from_bytes([symbols(cursor, count) for _ in range(size)])
    base = cursor.number(2)
    v = symbols(cursor, count).astype(np.uint64)
    escaped = v == 255
    v = (v + np.uint64(base)) % np.uint64(1024)
    v[escaped] = np.frombuffer(cursor.take(2 * int(escaped.sum())), "<u2")
    if base >= 1024 or v.max() >= 1024:
        fail(cursor.where, "an exponent is not below 1024")
    low = digits(cursor, count, 16)
    high = digits(cursor, count, 4).astype(np.uint64)
    h = (high >> np.uint64(1) << np.uint64(15)) + (v << np.uint64(5)) + ((high & np.uint64(1)) << np.uint64(4)) + low
    rest = from_bytes([symbols(cursor, count) for _ in range(size - 2)]) if size > 2 else np.uint64(0)
    upper: npt.NDArray[Any] = (h << np.uint64(8 * size - 16)) + rest
    return upper


# The quantized codecs, which see a tensor as a matrix (3).
MATRIX_CODECS: dict[str, Callable[[int, int, Params, Segments, str], Float32]] = {
    **{codec: partial(_decode_blocks, codec) for codec in BLOCK_FIELDS},
    "nlm": _decode_nlm,
    "affine": _decode_affine,
    "fp8": _decode_fp8,
    "ggml": _decode_ggml,
    "scaled": _decode_scaled,
    "lut": _decode_lut,
    "codebook": _decode_codebook,
    **{codec: partial(_decode_levels, codec) for codec in ("ternary", "levels")},
}


# ---- encoder
def quantize_q4_0(x: npt.NDArray[np.float32]) -> bytes:
    """Encode to `q4_0` with the informative encoder ``search=naive`` (A.2).

    Parameters
    ----------
    x : numpy.ndarray
        The tensor: float32, all elements finite.

    Returns
    -------
    bytes
        The segment `blocks`. A block in which D is too large for binary16 gets an infinite scale.

    Raises
    ------
    SpecError
        If `x` is not float32 or not finite.
    """
    if x.dtype != np.float32 or not np.all(np.isfinite(x)):
        raise SpecError("quantize_q4_0: not float32 or not finite")
    if x.size == 0:
        return b""
    rows, cols = rows_cols(x.shape)
    padded = np.pad(x.reshape(rows, cols), ((0, 0), (0, -cols % 32))).reshape(-1, 32)
    m = np.take_along_axis(padded, np.argmax(np.abs(padded), axis=1, keepdims=True), axis=1)
    with np.errstate(all="ignore"):  # results of a zero or tiny D are replaced
        scale = m / np.float32(-8)
        reciprocal = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        levels = np.minimum(np.floor(padded * reciprocal + np.float32(8.5)), np.float32(15))
        codes = np.where(np.isinf(reciprocal), np.float32(0), levels).astype(np.uint8)
        half = scale.astype("<f2")
    return np.concatenate([half.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1).tobytes()
