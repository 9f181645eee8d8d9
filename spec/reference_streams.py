"""Chunks and streams: what the reference reader needs for the entropy-coded codecs, written from `codecs.md` alone.

The comments name sections of `codecs.md`. `where` is what an error message begins with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

PIECE = 2**19  # elements of a chunk, if rows and units allow it (Chunks)
DENSITY = 1024  # elements for each byte of a chunk, at most (Chunks)


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
    """Takes bytes from front to back.

    Parameters
    ----------
    content : bytes
        The bytes.
    where : str
        What an error message begins with.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self.rest = content
        self.where = where

    def take(self, count: int) -> bytes:
        """Take so many bytes; `SpecError` if there are fewer."""
        if count > len(self.rest):
            fail(self.where, f"{count} bytes are needed, {len(self.rest)} are left")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def number(self, size: int) -> int:
        """Take an unsigned integer of so many bytes; `SpecError` if there are fewer."""
        return int.from_bytes(self.take(size), "little")


# ---- chunks


def borders(rows: int, cols: int, unit: int) -> list[tuple[slice, slice]]:
    """Give the rows and the columns of each chunk (Chunks).

    Parameters
    ----------
    rows, cols : int
        The matrix.
    unit : int
        Columns that stay together.

    Returns
    -------
    list of (slice, slice)
        In the order of the chunks.
    """
    if rows * cols == 0:
        return []
    filled = -(-cols // unit) * unit
    high, wide = max(1, PIECE // filled), cols
    if filled > max(PIECE, unit):
        high, wide = 1, max(1, PIECE // unit) * unit
    starts = [(row, col) for row in range(0, rows, high) for col in range(0, cols, wide)]
    return [(slice(r, min(r + high, rows)), slice(c, min(c + wide, cols))) for r, c in starts]


def chunks(
    content: bytes, lengths: bytes, places: list[tuple[slice, slice]], where: str, *, filled: bool = True
) -> Iterator[tuple[slice, slice, Cursor]]:
    """Cut the segment `chunks`, and check after each chunk that the caller has left nothing over (Chunks).

    Parameters
    ----------
    content, lengths : bytes
        The segments `chunks` and `lengths`.
    places : list of (slice, slice)
        What `borders` gave.
    where : str
        What an error message begins with.
    filled : bool
        Whether a chunk has at least so many bytes for its elements, and is filled up to them.

    Yields
    ------
    (slice, slice, Cursor)
        Rows, columns and bytes of a chunk.

    Raises
    ------
    SpecError
        If a length does not fit, or something is left over.
    """
    sizes = [int(size) for size in np.frombuffer(lengths, "<u4")]
    if sum(sizes) != len(content):
        fail(where, f"the lengths of its chunks have the sum {sum(sizes)}, but there are {len(content)} bytes")
    every = Cursor(content, where)
    for number, (size, (rows, cols)) in enumerate(zip(sizes, places, strict=True)):
        elements = (rows.stop - rows.start) * (cols.stop - cols.start)
        least = -(-elements // DENSITY) if filled else 0
        if size < least:
            fail(where, f"chunk {number} of {elements} elements has {size} bytes, fewer than {least}")
        cursor = Cursor(every.take(size), f"{where}: chunk {number}")
        yield rows, cols, cursor
        if cursor.rest and (size != least or any(cursor.rest)):
            fail(cursor.where, f"{len(cursor.rest)} bytes are left over")


# ---- streams


def symbols_of_a_letter(s: int) -> int:
    """Give k, the largest number for which s^k is at most 256 (Streams)."""
    k = 1
    while s ** (k + 1) <= 256:
        k += 1
    return k


def letters(cursor: Cursor, count: int, s: int = 256) -> Bytes:
    """Take a stream (Streams).

    Parameters
    ----------
    cursor : Cursor
        Where it begins.
    count : int
        How many letters it has.
    s : int
        How many symbols there are.

    Returns
    -------
    numpy.ndarray
        The letters, uint8.

    Raises
    ------
    SpecError
        If it breaks a rule.
    """
    found: Bytes
    body = Cursor(cursor.take(cursor.number(4)), f"{cursor.where}: stream")
    k = symbols_of_a_letter(s)
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
            fail(body.where, f"unknown way {mode} of storing letters")
        if found.max() >= size:
            fail(body.where, f"letter {found.max()} is none of {size}")
    if body.rest:
        fail(body.where, f"{len(body.rest)} bytes are left over")
    return found


def symbols(cursor: Cursor, count: int, s: int) -> Bytes:
    """Take a stream of so many symbols, and give these; what fills up the last letter is ignored."""
    k = symbols_of_a_letter(s)
    found = letters(cursor, -(-count // k), s).astype(np.int64)
    each = found[:, None] // np.array([s**i for i in range(k)]) % s
    result: Bytes = each.reshape(-1)[:count].astype(np.uint8)
    return result


def _coded(body: Cursor, count: int, s: int, k: int) -> Bytes:
    """Take precision, table, states and words; with k, the table is one of symbols."""
    precision = body.number(1)
    if not 8 <= precision <= 15:
        fail(body.where, f"precision {precision} is not 8 to 15")
    frequencies = _table(body, s if k else s ** symbols_of_a_letter(s), precision)
    if k:
        frequencies = _of_letters(frequencies, s, k, precision, body.where)
    lanes = next((w for w, below in ((4, 2**12), (16, 2**16), (32, 2**17)) if count < below), 64)
    states = np.frombuffer(body.take(4 * lanes), "<u4").astype(np.uint64)
    if len(body.rest) % 2:
        fail(body.where, "half a word is left")
    words = np.frombuffer(body.take(len(body.rest)), "<u2").astype(np.uint64)
    f = np.array(frequencies, np.uint64)
    c = np.cumsum(f) - f
    letter_at = np.repeat(np.arange(len(frequencies)), frequencies)
    found = np.empty(count, np.uint8)
    used = 0
    for start in range(0, count, lanes):
        x = states[: min(lanes, count - start)]  # a letter for each lane
        y = x % np.uint64(2**precision)
        letter = letter_at[y]
        found[start : start + len(x)] = letter
        x[:] = f[letter] * (x >> np.uint64(precision)) + y - c[letter]
        short = np.flatnonzero(x < 2**16)  # which take a word each, in the order of their letters
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
    """Take a table of frequencies."""
    bits = _Bits(body)
    table: list[int] = []
    length = 0
    while sum(table) < 2**precision:
        if len(table) == entries:
            fail(body.where, f"frequencies have the sum {sum(table)}")
        z = 0
        while z <= 2 * precision + 2 and bits.next():  # more are never valid, and might be many
            z += 1
        length += (z + 1) // 2 if z % 2 else -z // 2
        if not 0 <= length <= precision + 1:
            fail(body.where, f"a frequency of {length} bits")
        low = sum(bits.next() << i for i in range(length - 1))
        table.append(2 ** (length - 1) + low if length else 0)
    if sum(table) > 2**precision:
        fail(body.where, f"frequencies have the sum {sum(table)}")
    if any(bits.left):
        fail(body.where, "what fills up the table is not 0")
    return table + [0] * (entries - len(table))


class _Bits:
    """Takes bits, the lowest of a byte first; `left` has those of the last byte that were not taken."""

    def __init__(self, body: Cursor) -> None:
        self._body = body
        self.left: list[int] = []

    def next(self) -> int:
        if not self.left:
            byte = self._body.number(1)
            self.left = [byte >> i & 1 for i in range(8)]
        return self.left.pop(0)


def _of_letters(table: list[int], s: int, k: int, precision: int, where: str) -> list[int]:
    """Give the frequencies of letters from those of their symbols."""
    result: list[int] = []
    for letter in range(s**k):
        chosen = [table[letter // s**i % s] for i in range(k)]
        product = 2**30
        for frequency in chosen:
            product = product * frequency // 2**precision
        result.append(product // 2 ** (30 - precision) or int(all(chosen)))
    largest = result.index(max(result))
    result[largest] += 2**precision - sum(result)
    if result[largest] < 1:
        fail(where, "the frequencies of letters do not fit")
    return result


def widened(parts: list[Bytes]) -> npt.NDArray[Any]:
    """Give unsigned integers from their bytes, the highest first."""
    total = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        total = total * np.uint64(256) + part
    return total
