"""The exact optimum of a block with scale and minimum, by enumeration: milliseconds for each block, to judge searches with."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=False)
def _gain(n: int, q: float, qq: float, xq: float) -> float:
    """Return by how much a least-squares line through (q, x) lowers the sum of squares of x, whose mean is 0."""
    variance = qq - q * q / n
    return xq * xq / variance if variance > 0 else 0.0


@numba.njit(cache=False)
def exact_q4_1(x: np.ndarray, top: int = 15) -> float:
    """Return the least sum of squared errors of ``x`` over all scales, minima (real numbers) and codes 0 to ``top``.

    The codes of an optimum are the nearest ones for its line, ``q = round(u x + v)`` clipped, so they belong to a cell of the plane
    (u, v) that the lines ``u x[i] + v = k + 1/2`` cut. Every cell has an edge on such a line (or codes that are all equal). So
    this walks along each line, with u from 0 to infinity (a negative u mirrors the codes), keeps the sums that
    least squares needs as one code after the other changes, and looks at the codes on both sides of the line.
    """
    n = x.size
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    spread = (x * x).sum()
    best = 0.0
    where = np.empty(n * top)
    who = np.empty(n * top, np.int64)
    for i in range(n):
        twins, their_sum = 0.0, 0.0  # elements equal to x[i]: their codes change with its own
        for j in range(n):
            if x[j] == x[i]:
                twins += 1
                their_sum += x[j]
        for k in range(top):  # the line u (x[j] - x[i]) + k + 1/2
            q, qq, xq, steps = 0.0, 0.0, 0.0, 0
            for j in range(n):
                distance = x[j] - x[i]
                code = k + 1.0 if distance > 0 else float(k)
                q += code
                qq += code * code
                xq += x[j] * code
                if distance > 0:
                    for level in range(k + 1, top):
                        where[steps], who[steps] = (level - k) / distance, j
                        steps += 1
                elif distance < 0:
                    for level in range(k):
                        where[steps], who[steps] = (level - k) / distance, j
                        steps += 1
            order = np.argsort(where[:steps])
            code_of = np.empty(n)
            for j in range(n):
                code_of[j] = k + 1.0 if x[j] > x[i] else float(k)
            for step in range(-1, steps):
                if step >= 0:
                    j = who[order[step]]
                    change = 1.0 if x[j] > x[i] else -1.0
                    q += change
                    qq += 2 * change * code_of[j] + 1
                    xq += change * x[j]
                    code_of[j] += change
                for above in range(2):  # the codes of x[i] and its twins are k or k + 1
                    gain = _gain(n, q + above * twins, qq + above * twins * (2 * k + 1), xq + above * their_sum)
                    best = max(best, gain)
    return max(spread - best, 0.0)
