"""Peers of `scm`: M. Pais's significance coding at a constant rate, and uniform quantizers of a single rate.

**Significance coding.** A block of 32 binary16 weights is sent bit plane by bit plane, the highest magnitudes first: 5 bits say at
which exponent it starts; then each plane names those of the still insignificant weights that become significant, gives their signs,
and one more bit of each weight that was significant before. Where the bits of the block are spent, reads give zeros: positions that
are cut off name no weight, a weight whose sign is cut off is dropped, and bits that are cut off are unknown.

**Uniform quantizers** have codes round(x / step), coded by how often they occur, and decode to the mean of each code's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np

from qformat.entropy.streams import StreamWriter

SIZE = 32
#: the ways to send positions: only the plain bitset, or the shortest of four, which 2 bits name
POSITIONS = ("best", "bitset")
_POINT = 24  # bits of the fixed point: binary16 is a multiple of 2^-24
_MANTISSA = 10
_HEAD = 5  # bits for the exponent of the largest weight
_WAYS = 2  # bits for the way in which positions are sent: bitset, halves, gaps in gamma codes, gaps in Rice's codes
_RICE, _RICE_NAME = 4, 2  # how many of Rice's codes there are, and the bits that name one
_LEAST_SUBNORMAL = 9  # plane of the largest bit of a number without an exponent

_CHUNK = 1 << 19  # weights whose codes are coded together
_ESCAPE = 255  # the symbol of all codes that are too large
_MOST_CODES = 1 << 22
_CLOSE = 2e-5  # bits for each weight


def _gap_costs() -> np.ndarray:
    """Return the bits of each gap up to a block's size: Rice's codes with 0 to 3 low bits, and Elias's gamma code of one more."""
    gaps = np.arange(SIZE + 1)
    rice = [(gaps >> low) + 1 + low for low in range(_RICE)]
    gamma = 2 * np.floor(np.log2(gaps + 1)).astype(np.int64) + 1
    return np.stack([*rice, gamma], axis=1)


_GAP_COSTS = _gap_costs()


@numba.njit(nogil=True)
def _gaps(before: np.ndarray, count: int) -> int:
    """Return the bits of the gaps before each new weight and before the end, in the code that needs the fewest."""
    costs = np.zeros(_RICE + 1, np.int64)
    gap = 0
    for i in range(count + 1):
        if i < count and before[i + 1] == before[i]:
            gap += 1
            continue
        for code in range(_RICE + 1):
            costs[code] += _GAP_COSTS[gap, code]
        gap = 0
    return min(_RICE_NAME + costs[:_RICE].min(), costs[_RICE])


@numba.njit(nogil=True)
def _halves(before: np.ndarray, count: int, starts: np.ndarray, ends: np.ndarray) -> int:
    """Return the bits of halving: is there any in this half? Where the first one has none, the second one needs no bit.

    `before` counts the new weights before each place; the other two are room for a stack.
    """
    bits = 1
    if not before[count]:
        return bits
    starts[0], ends[0], depth = 0, count, 1
    while depth:
        depth -= 1
        start, end = starts[depth], ends[depth]
        if end - start == 1:
            continue
        middle = (start + end + 1) // 2
        first = before[middle] > before[start]
        second = before[end] > before[middle]
        bits += 1 + first
        if first:
            starts[depth], ends[depth] = start, middle
            depth += 1
        if second:
            starts[depth], ends[depth] = middle, end
            depth += 1
    return bits


@numba.njit(nogil=True)
def _position_bits(news: np.ndarray, count: int, before: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> int:
    """Return the bits of the shortest way to send which of `count` weights are new."""
    before[0] = 0
    for i in range(count):
        before[i + 1] = before[i] + news[i]
    return _WAYS + min(count, _gaps(before, count), _halves(before, count, starts, ends))


@numba.njit(nogil=True)
def _decode(magnitudes: np.ndarray, bpw: float, limit: float, middle: bool, out: np.ndarray) -> None:
    """Encode and decode magnitudes; both sides in units of 2^-24.

    `limit` is the share of significant weights of a block from which on only bitsets are used.
    """
    tops, known = np.empty(SIZE, np.int64), np.empty(SIZE, np.int64)  # known: the lowest plane that was read
    news = np.empty(SIZE, np.bool_)
    before, starts, ends = np.empty(SIZE + 1, np.int64), np.empty(SIZE, np.int64), np.empty(SIZE, np.int64)
    for block in range(0, magnitudes.size, SIZE):
        size = min(SIZE, magnitudes.size - block)
        left = int(bpw * size) - _HEAD
        plane = _LEAST_SUBNORMAL
        for i in range(size):
            tops[i], known[i] = math.frexp(float(magnitudes[block + i]))[1] - 1, -1  # -1 for 0
            plane = max(plane, tops[i])
        significant = 0
        while plane >= 0 and left > 0:
            count = 0
            for i in range(size):
                if tops[i] <= plane and known[i] < 0:
                    news[count] = tops[i] == plane
                    count += 1
            if count:  # once all are significant, both sides know it
                by_bitset = significant >= limit * size
                left -= count if by_bitset else _position_bits(news, count, before, starts, ends)
            for i in range(size):
                if tops[i] == plane:
                    if left > 0:
                        known[i] = plane
                    left -= 1
            for i in range(size):
                # A weight has no bits below its mantissa
                if tops[i] > plane >= tops[i] - _MANTISSA and known[i] >= 0:
                    if left > 0:
                        known[i] = plane
                    left -= 1
            significant = size - count + np.sum(news[:count])
            plane -= 1
        for i in range(size):
            value = 0.0
            if known[i] >= 0:
                value = float(magnitudes[block + i] >> known[i] << known[i])
                if middle and known[i] > max(0, tops[i] - _MANTISSA):
                    value += 2.0 ** (known[i] - 1)
            out[block + i] = value


def decoded(values: np.ndarray, bpw: float, *, positions: str = "best", middle: bool, limit: float = 0.1) -> np.ndarray:
    """Return weights after encoding and decoding, as float32.

    Parameters
    ----------
    values
        The weights; they are rounded to binary16 first, which has to be able to hold them.
    bpw
        Bits for each weight, of each block.
    positions
        One of `POSITIONS`.
    middle
        Reconstruct a weight in the middle of what the bits allow for, and not, as in the source, where it is smallest.
    limit
        The share of significant weights of a block from which on "best" only takes the bitset.
    """
    if positions not in POSITIONS:
        raise ValueError(f"unknown way to send positions: {positions!r}")
    flat = np.ascontiguousarray(values).reshape(-1).astype(np.float16)
    magnitudes = np.ldexp(np.abs(flat).astype(np.float64), _POINT).astype(np.int64)
    out = np.empty(flat.size)
    _decode(magnitudes, bpw, limit if positions == "best" else 0.0, middle, out)
    return np.copysign(np.ldexp(out, -_POINT), flat).astype(np.float32).reshape(values.shape)


@numba.njit(nogil=True)
def _tally(values: np.ndarray, inverse: float, counts: np.ndarray, sums: np.ndarray) -> None:
    """Count the weights of each code, and add them up."""
    most = counts.size // 2
    for i in range(values.size):
        code = min(max(int(np.rint(values[i] * inverse)), -most), most) + most
        counts[code] += 1
        sums[code] += values[i]


def _tallied(values: np.ndarray, largest: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many weights the codes have that occur, and their sums."""
    most = min(_MOST_CODES, int(largest / step) + 1)
    counts, sums = np.zeros(2 * most + 1, np.int64), np.zeros(2 * most + 1)
    _tally(values, 1 / step, counts, sums)
    return counts[counts > 0], sums[counts > 0]


@numba.njit(nogil=True)
def _symbols(values: np.ndarray, inverse: float, symbols: np.ndarray, escaped: np.ndarray) -> int:
    """Write zigzag codes as symbols, and those that are too large also in full; return the number of these."""
    count = 0
    for i in range(values.size):
        code = int(np.rint(values[i] * inverse))
        zigzag = 2 * abs(code) - (code > 0)
        symbols[i] = min(zigzag, _ESCAPE)
        if zigzag >= _ESCAPE:
            escaped[count] = code
            count += 1
    return count


def _coded_bits(values: np.ndarray, step: float) -> int:
    """Return the size of the codes as this project's entropy coder codes them."""
    symbols, escaped = np.empty(_CHUNK, np.uint8), np.empty(_CHUNK, np.int32)
    size = 0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        count = _symbols(part, 1 / step, symbols, escaped)
        writer = StreamWriter()
        writer.stream(symbols[: part.size])
        writer.add(escaped[:count].tobytes())
        size += len(writer.chunk(part.size))
    return 8 * size


def _step(bits: Callable[[float], float], wanted: float, start: float) -> float:
    """Return the step at which `bits` is `wanted`; `bits` falls about as the logarithm of the step rises."""
    low, high, at = -math.inf, math.inf, math.log2(start)
    for _ in range(40):
        more = bits(2.0**at) - wanted
        if abs(more) < _CLOSE:
            break
        if more > 0:
            low = at
        else:
            high = at
        at += more
        if not low < at < high:
            at = (low + high) / 2
    return 2.0**at


class Uniform:
    """Uniform quantizers of a tensor.

    Parameters
    ----------
    values
        The weights, not all of them equal.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = np.ascontiguousarray(values, np.float32).reshape(-1)
        self._largest = float(np.abs(self._values).max())
        wide = self._values.astype(np.float64)
        self._squares = float(np.vdot(wide, wide))
        self._wide = math.sqrt(12 * self._squares / wide.size)  # the step of about as large an error as the weights are

    def _rmse(self, step: float) -> float:
        counts, sums = _tallied(self._values, self._largest, step)
        return math.sqrt(max(0.0, self._squares - float((sums * sums / counts).sum())) / self._values.size)

    def _entropy(self, step: float) -> float:
        counts, _ = _tallied(self._values, self._largest, step)
        return float((counts * np.log2(self._values.size / counts)).sum()) / self._values.size

    def ideal(self, bpw: float) -> float:
        """Return the root mean square error at which the entropy of the codes is `bpw` bits for each weight."""
        return self._rmse(_step(self._entropy, bpw, self._wide * 2**-bpw))

    def coded(self, bpw: float) -> float:
        """Return the root mean square error at which the coded codes take `bpw` bits for each weight, not counting their levels."""
        return self._rmse(
            _step(lambda step: _coded_bits(self._values, step) / self._values.size, bpw, self._wide * 2**-bpw)
        )
