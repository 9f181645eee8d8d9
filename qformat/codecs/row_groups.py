"""Groups of similar rows of floats, each coded with frequencies of its own (spec/codecs.md, "`lossless`")."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.entropy.frequencies import COST_BITS, log2
from qformat.kernels import load
from qformat.kernels.arrays import I64, U8

#: values of exponent and leading bits of the mantissa
VALUES = 1024
_FINEST = 8  # groups of about the same magnitude
_SHORT = 2  # groups of fewer bits of mantissa
_WORTH = 1 << 15  # elements from which on several groups by magnitude may pay
_OVERHEAD = 250  # approximate bytes of a group besides its symbols


def group_rows(patterns: NDArray[Any], exponent: int) -> tuple[U8, I64]:
    """Group rows whose floats have similar magnitudes, or equally few bits of mantissa.

    Parameters
    ----------
    patterns
        A matrix of floats, as unsigned integers.
    exponent
        Bits of the exponent: 8 for bfloat16 and binary32.

    Returns
    -------
    tuple of (array, array)
        The group of each row, and the counts of magnitudes in each group, of shape (groups, `VALUES`): by the exponent and two bits
        of mantissa if the exponent has 8 bits, else by its upper byte without the sign.
    """
    rows, cols = patterns.shape
    if patterns.itemsize == 8:
        return np.zeros(rows, np.uint8), np.zeros((1, VALUES), np.int64)
    if patterns.itemsize == 4:
        upper = np.ascontiguousarray(patterns.view("<u2")[:, 1::2])
    else:
        upper = patterns.astype(np.uint16, copy=False)
    shift, mask = (5, VALUES - 1) if exponent == 8 else (8 * (patterns.itemsize - 1), 127)
    flat, kernels = upper.reshape(-1), load("float_parts")
    sums = np.empty(rows, np.int64)
    kernels.row_sums(flat, cols, shift, mask, sums)
    classes = _classes(sums, _mantissas(patterns))
    counts = np.zeros((_FINEST + _SHORT) * VALUES, np.int64)
    kernels.count_rows(flat, cols, classes, shift, mask, counts)
    fine = counts.reshape(-1, VALUES)
    groups = _best(fine, rows) if rows * cols >= _WORTH else _joined(fine, 1)
    return groups[classes], _merged(fine, groups)


def _mantissas(patterns: NDArray[Any]) -> U8:
    """Return for each row of binary32 how many of the two lowest bytes are 0 throughout; zeros if that is the same for all."""
    if patterns.itemsize != 4:
        return np.zeros(len(patterns), np.uint8)
    used = np.empty(len(patterns), np.uint32)
    load("float_parts").row_bits(patterns.reshape(-1), patterns.shape[1], used)
    unused: U8 = (used & 0xFFFF == 0).astype(np.uint8) + (used & 0xFF == 0)
    return unused if unused.max() != unused.min() else np.zeros_like(unused)


def _classes(sums: I64, mantissas: U8) -> U8:
    """Return the finest class of each row: rows of full mantissas in equal shares by magnitude, then the others."""
    classes = (mantissas + np.uint8(_FINEST - 1)).astype(np.uint8)
    full = np.flatnonzero(mantissas == 0)
    order = full[np.argsort(sums[full], kind="stable")]
    classes[order] = np.arange(full.size) * _FINEST // max(1, full.size)
    return classes


def _joined(fine: I64, number: int) -> U8:
    """Return the group of each class if the classes by magnitude form this number of groups; groups without rows get no number."""
    target = np.append(np.arange(_FINEST) * number // _FINEST, number + np.arange(_SHORT))
    used = np.unique(target[fine.any(axis=1)])
    return np.searchsorted(used, target).clip(0, used.size - 1).astype(np.uint8)


def _merged(fine: I64, groups: U8) -> I64:
    """Return the counts of groups from those of classes."""
    merged = np.zeros((int(groups.max()) + 1, fine.shape[1]), np.int64)
    for class_ in np.flatnonzero(fine.any(axis=1)):
        merged[groups[class_]] += fine[class_]
    return merged


def _best(fine: I64, rows: int) -> U8:
    """Return the groups with the fewest bits, by estimate."""
    occurring = fine[:, fine.any(axis=0)]
    choices = [_joined(fine, number) for number in (1, 2, 4, 8)]
    return min(choices, key=lambda groups: _cost(_merged(occurring, groups), rows))


def _cost(counts: I64, rows: int) -> int:
    """Estimate the size of magnitudes and groups, in units of 2^-16 bits."""
    totals = counts.sum(axis=1)
    occurring = counts[counts > 0]
    symbols = int((totals * log2(totals)).sum() - (occurring * log2(occurring)).sum())
    return symbols + (8 * _OVERHEAD * len(counts) << COST_BITS) + rows * int(log2(np.array([len(counts)]))[0])
