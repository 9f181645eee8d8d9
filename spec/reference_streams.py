"""The reference reader's part for chunks and streams, which entropy-coded codecs use, written from `codecs.md` alone.

Numbers in comments and docstrings are sections of `codecs.md`. `where` is the beginning of error messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

CHUNK_ELEMENTS = 2**19  # elements of a chunk, as far as rows and alignment allow (11.1)
DENSITY = 1024  # largest number of elements for each byte of a chunk (11.3)


class SpecError(ValueError):
    """The bytes break a rule of the specification, or need something that this reader does not know."""


def fail(where: str, what: str) -> NoReturn:
    """Raise `SpecError`.

    Parameters
    ----------
    where, what : str
        The two halves of the message.

    Raises
    ------
    SpecError
        Always.
    """
    raise SpecError(f"{where}: {what}")


class Cursor:
    """A reader of consecutive bytes; `rest` holds the bytes that were not taken yet.

    Parameters
    ----------
    content : bytes
        The bytes.
    where : str
        Beginning of error messages.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self.rest = content
        self.where = where

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; `SpecError` if there are fewer."""
        if count > len(self.rest):
            fail(self.where, f"{count} bytes are needed, {len(self.rest)} are left")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def number(self, size: int) -> int:
        """Return the next `size` bytes as an unsigned integer; `SpecError` if there are fewer."""
        return int.from_bytes(self.take(size), "little")


# ---- chunks


def borders(rows: int, cols: int, alignment: int) -> list[tuple[slice, slice]]:
    """Return the rows and the columns of each chunk (11.1).

    Parameters
    ----------
    rows, cols : int
        Size of the matrix.
    alignment : int
        The chunk alignment, in columns.

    Returns
    -------
    list of (slice, slice)
        Rows and columns of the matrix, in the order of the chunks.
    """
    if rows * cols == 0:
        return []
    padded = -(-cols // alignment) * alignment
    high, wide = max(1, CHUNK_ELEMENTS // padded), cols
    if padded > max(CHUNK_ELEMENTS, alignment):
        high, wide = 1, max(1, CHUNK_ELEMENTS // alignment) * alignment
    starts = [(row, col) for row in range(0, rows, high) for col in range(0, cols, wide)]
    return [(slice(r, min(r + high, rows)), slice(c, min(c + wide, cols))) for r, c in starts]


def chunks(
    content: bytes, lengths: bytes, places: list[tuple[slice, slice]], where: str, *, padded: bool = True
) -> Iterator[tuple[slice, slice, Cursor]]:
    """Cut the segment `chunks`, and check after each chunk that the caller took all of it but the padding (11.2, 11.3).

    Parameters
    ----------
    content, lengths : bytes
        The segments `chunks` and `lengths`.
    places : list of (slice, slice)
        The result of `borders`.
    where : str
        Beginning of error messages.
    padded : bool
        Whether chunks have a least length and are padded to it.

    Yields
    ------
    (slice, slice, Cursor)
        Rows, columns and bytes of a chunk.

    Raises
    ------
    SpecError
        If a length does not fit, or bytes are left over.
    """
    sizes = [int(size) for size in np.frombuffer(lengths, "<u4")]
    if sum(sizes) != len(content):
        fail(where, f"the lengths of its chunks have the sum {sum(sizes)}, but there are {len(content)} bytes")
    every = Cursor(content, where)
    for number, (size, (rows, cols)) in enumerate(zip(sizes, places, strict=True)):
        elements = (rows.stop - rows.start) * (cols.stop - cols.start)
        least = -(-elements // DENSITY) if padded else 0
        if size < least:
            fail(where, f"chunk {number} of {elements} elements has {size} bytes, fewer than {least}")
        cursor = Cursor(every.take(size), f"{where}: chunk {number}")
        yield rows, cols, cursor
        if cursor.rest and (size != least or any(cursor.rest)):
            fail(cursor.where, f"{len(cursor.rest)} bytes are left over")


# ---- streams


def digits_per_symbol(s: int) -> int:
    """Return k, the largest number for which s^k is at most 256 (12.1)."""
    k = 1
    while s ** (k + 1) <= 256:
        k += 1
    return k


def symbols(cursor: Cursor, count: int, s: int = 256) -> Bytes:
    """Read a stream (12.1, 12.2).

    Parameters
    ----------
    cursor : Cursor
        Positioned at the beginning of the stream.
    count : int
        Number of symbols.
    s : int
        The base of the digits.

    Returns
    -------
    numpy.ndarray
        The symbols, uint8.

    Raises
    ------
    SpecError
        If the stream is invalid.
    """
    found: Bytes
    body = Cursor(cursor.take(cursor.number(4)), f"{cursor.where}: stream")
    k = digits_per_symbol(s)
    size = s**k
    if count == 0:
        found = np.empty(0, np.uint8)
    else:
        mode = body.number(1)
        if mode == 0:
            found = np.frombuffer(body.take(count), np.uint8)
        elif mode == 1:
            found = np.full(count, body.number(1), np.uint8)
        elif mode == 2 or (mode == 3 and k > 1):
            found = _coded(body, count, s, k if mode == 3 else 0)
        else:
            fail(body.where, f"unknown mode {mode}")
        if found.max() >= size:
            fail(body.where, f"symbol {found.max()} is not below {size}")
    if body.rest:
        fail(body.where, f"{len(body.rest)} bytes are left over")
    return found


def digits(cursor: Cursor, count: int, s: int) -> Bytes:
    """Read a stream of `count` digits in base `s`, without the padding of its last symbol (12.1)."""
    k = digits_per_symbol(s)
    found = symbols(cursor, -(-count // k), s).astype(np.int64)
    each = found[:, None] // np.array([s**i for i in range(k)]) % s
    result: Bytes = each.reshape(-1)[:count].astype(np.uint8)
    return result


def _coded(body: Cursor, count: int, s: int, k: int) -> Bytes:
    """Read precision, table, states and words (12.3 to 12.6); with k > 0, the table is one of digits."""
    precision = body.number(1)
    if not 8 <= precision <= 15:
        fail(body.where, f"precision {precision} is not 8 to 15")
    frequencies = _table(body, s if k else s ** digits_per_symbol(s), precision)
    if k:
        frequencies = _symbol_frequencies(frequencies, s, k, precision, body.where)
    lanes = next((w for w, below in ((4, 2**12), (16, 2**16), (32, 2**17)) if count < below), 64)
    states = np.frombuffer(body.take(4 * lanes), "<u4").astype(np.uint64)
    if len(body.rest) % 2:
        fail(body.where, "half a word is left")
    words = np.frombuffer(body.take(len(body.rest)), "<u2").astype(np.uint64)
    f = np.array(frequencies, np.uint64)
    c = np.cumsum(f) - f
    symbol_at = np.repeat(np.arange(len(frequencies)), frequencies)
    found = np.empty(count, np.uint8)
    used = 0
    for start in range(0, count, lanes):
        x = states[: min(lanes, count - start)]  # one symbol of each lane
        y = x % np.uint64(2**precision)
        symbol = symbol_at[y]
        found[start : start + len(x)] = symbol
        x[:] = f[symbol] * (x >> np.uint64(precision)) + y - c[symbol]
        short = np.flatnonzero(x < 2**16)  # lanes that take a word each, in the order of their symbols
        if used + len(short) > len(words):
            fail(body.where, f"{len(words)} words are too few")
        x[short] = x[short] * np.uint64(2**16) + words[used : used + len(short)]
        used += len(short)
    if used != len(words):
        fail(body.where, f"{len(words) - used} words are left over")
    if any(states != 2**16):
        fail(body.where, "a state does not end at 2^16")
    return found


def _table(body: Cursor, entries: int, precision: int) -> list[int]:
    """Read a table of frequencies (12.4)."""
    bits = _Bits(body)
    table: list[int] = []
    length = 0
    while sum(table) < 2**precision:
        if len(table) == entries:
            fail(body.where, f"frequencies have the sum {sum(table)}")
        z = 0
        while z <= 2 * precision + 2 and bits.next():  # more are never valid
            z += 1
        length += (z + 1) // 2 if z % 2 else -z // 2
        if not 0 <= length <= precision + 1:
            fail(body.where, f"a frequency of {length} bits")
        low = sum(bits.next() << i for i in range(length - 1))
        table.append(2 ** (length - 1) + low if length else 0)
    if sum(table) > 2**precision:
        fail(body.where, f"frequencies have the sum {sum(table)}")
    if any(bits.left):
        fail(body.where, "the padding of the table is not 0")
    return table + [0] * (entries - len(table))


class _Bits:
    """A reader of bits, the lowest of a byte first; `left` holds those of the last byte that were not taken yet."""

    def __init__(self, body: Cursor) -> None:
        self._body = body
        self.left: list[int] = []

    def next(self) -> int:
        if not self.left:
            byte = self._body.number(1)
            self.left = [byte >> i & 1 for i in range(8)]
        return self.left.pop(0)


def _symbol_frequencies(table: list[int], s: int, k: int, precision: int, where: str) -> list[int]:
    """Return the frequencies of symbols from those of their digits (12.5)."""
    result: list[int] = []
    for symbol in range(s**k):
        chosen = [table[symbol // s**i % s] for i in range(k)]
        product = 2**30
        for frequency in chosen:
            product = product * frequency // 2**precision
        result.append(product // 2 ** (30 - precision) or int(all(chosen)))
    largest = result.index(max(result))
    result[largest] += 2**precision - sum(result)
    if result[largest] < 1:
        fail(where, "the frequencies of symbols do not fit")
    return result


def from_bytes(parts: list[Bytes]) -> npt.NDArray[Any]:
    """Return unsigned integers (uint64) from arrays of their bytes, the highest first."""
    total = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        total = total * np.uint64(256) + part
    return total
