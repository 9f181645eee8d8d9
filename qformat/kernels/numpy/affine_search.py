"""Scales and zeros of least squared error, in numpy. Twin of ``numba/affine_search.py``, which documents the functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.kernels.arrays import F32, F64, I64, U8
from qformat.kernels.numpy.affine import nearest
from qformat.kernels.numpy.blocks import fold, reciprocal

F16, BF16 = 0, 1
ROUNDS = 3


class _Groups:
    """All groups of some rows, padded to the same number of runs."""

    def __init__(self, x: F32, cols: int, group: int) -> None:
        padded = -(-cols // 32) * 32
        width = min(group, padded)
        starts = np.arange(0, cols, group)
        rows = x.reshape(-1, padded)
        whole = np.pad(rows, ((0, 0), (0, starts.size * width - padded)))
        counts = np.tile(np.minimum(group, cols - starts), len(rows))
        self.values = whole.reshape(-1, width // 32, 32)
        self.valid = (np.arange(width) < counts[:, None]).reshape(self.values.shape)

    def ends(self) -> tuple[F32, F32]:
        """Return the smallest and the largest value of each group."""
        values = np.where(self.valid, self.values, self.values[:, :1, :1]).reshape(len(self.values), -1)
        return values.min(axis=1), values.max(axis=1)

    def sums(self, inverse: F32, low: F32, high: F32) -> tuple[F64, F64]:
        """Return Σxu and Σuu."""
        xu, uu = (np.zeros((len(self.values), 32), np.float32) for _ in range(2))
        for i in range(self.values.shape[1]):
            values = self.values[:, i]
            levels = nearest(values, inverse[:, None], low[:, None], high[:, None])
            levels = np.where(self.valid[:, i], levels, np.float32(0))
            xu += values * levels
            uu += levels * levels
        return fold(xu).astype(np.float64), fold(uu).astype(np.float64)

    def distance(self, scale: F32, low: F32, high: F32) -> F32:
        """Return the squared errors."""
        inverse = reciprocal(scale)
        total = np.zeros((len(self.values), 32), np.float32)
        for i in range(self.values.shape[1]):
            values = self.values[:, i]
            error = values - nearest(values, inverse[:, None], low[:, None], high[:, None]) * scale[:, None]
            error = np.where(self.valid[:, i], error, np.float32(0))
            total += error * error
        return fold(total)

    def final(self, naive: F32, naive_zero: I64, scale: F32, zero: I64, top: int, kind: int) -> tuple[F32, F32, I64]:
        """Return the error, scale and zero of the best of the naive choice and the found scale or its neighbour."""
        chosen, chosen_zero = _rounded(naive, kind), naive_zero
        least = self.distance(chosen, _f32(-naive_zero), _f32(top - naive_zero))
        near = _rounded(scale, kind)
        for candidate in (near, _other(scale, near, kind)):
            error = self.distance(candidate, _f32(-zero), _f32(top - zero))
            better = error < least
            least = np.where(better, error, least)
            chosen, chosen_zero = np.where(better, candidate, chosen), np.where(better, zero, chosen_zero)
        return least, chosen, chosen_zero


def _f32(values: NDArray[Any]) -> F32:
    return values.astype(np.float32)


def _rounded(scale: F32, kind: int) -> F32:
    """Return scales as they can be stored."""
    if kind == F16:
        return scale.astype(np.float16).astype(np.float32)
    if kind == BF16:
        pattern = scale.view(np.uint32).astype(np.int64)
        even: F32 = ((pattern + 0x7FFF + ((pattern >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return even
    return scale


def _other(scale: F32, rounded: F32, kind: int) -> F32:
    """Return the storable numbers on the other side of scales."""
    step = np.where(np.abs(rounded) > np.abs(scale), -1, 1)
    if kind == F16:
        halves = rounded.astype(np.float16).view(np.uint16) + step
        return _f32(halves.astype(np.uint16).view(np.float16))
    if kind == BF16:
        patterns = rounded.view(np.uint32) + 0x10000 * step
        other: F32 = (patterns & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return other
    return rounded


def _score(xu: F64, uu: F64) -> tuple[F64, F32]:
    """Return by how much the error is reduced, and the scale that does it; 0 if all levels are 0."""
    usable = uu > 0
    safe = np.where(usable, uu, 1.0)
    return np.where(usable, xu * xu / safe, 0.0), _f32(xu / safe)


@np.errstate(all="ignore")
def symmetric(x: F32, cols: int, group: int, width: int, kind: int, choices: F32, scales: F32) -> None:
    """Choose the scales of groups with codes of `width` bits and the zero in the middle."""
    groups = _Groups(x, cols, group)
    smallest, largest = groups.ends()
    extreme = np.where(-smallest > largest, smallest, largest)
    middle = np.full(extreme.size, 1 << (width - 1))
    top = (1 << width) - 1
    low, high = _f32(-middle), _f32(middle - 1)
    best: F64 = np.zeros(extreme.size)
    scale: F32 = np.zeros(extreme.size, np.float32)
    for i in range(len(choices) + ROUNDS):
        inverse = choices[i] / extreme if i < len(choices) else reciprocal(scale)
        score, fitted = _score(*groups.sums(inverse, low, high))
        better = score > best
        best, scale = np.where(better, score, best), np.where(better, fitted, scale)
    least, chosen, _ = groups.final(_f32(extreme / low), middle, scale, middle, top, kind)
    absolute = _rounded(_f32(extreme / high), kind)
    chosen = np.where(groups.distance(absolute, low, high) < least, absolute, chosen)
    scales[:] = np.where(extreme == 0, np.float32(0), chosen)


def _clamp(zero: F64) -> I64:
    """Return the nearest zeros that can be stored; 0 for a NaN."""
    return np.where(zero > 0, np.where(zero >= 255, 255.0, np.floor(zero + 0.5)), 0.0).astype(np.int64)


@np.errstate(all="ignore")
def asymmetric(x: F32, cols: int, group: int, width: int, kind: int, choices: F32, scales: F32, zeros: U8) -> None:
    """Choose scales and zeros."""
    groups = _Groups(x, cols, group)
    smallest, largest = groups.ends()
    span = largest - smallest
    top = (1 << width) - 1
    turned = smallest > 0
    naive = _f32(np.where(turned, -span, span) / np.float32(top))
    end = np.where(turned, largest, smallest).astype(np.float64)
    naive_zero = np.where(naive != 0, _clamp(-end / naive), 0)
    centre = (smallest.astype(np.float64) + largest.astype(np.float64)) * 0.5
    best: F64 = np.zeros(span.size)
    scale: F32 = np.zeros(span.size, np.float32)
    zero: I64 = np.zeros(span.size, np.int64)
    for i in range(len(choices) + ROUNDS):
        if i < len(choices):
            inverse = np.where(turned, -choices[i], choices[i]) / span
            near = _clamp(top * 0.5 - centre * inverse.astype(np.float64))
        else:
            inverse, near = reciprocal(scale), zero
        for candidate in (near - 1, near, near + 1):
            score, fitted = _score(*groups.sums(inverse, _f32(-candidate), _f32(top - candidate)))
            better = (score > best) & (candidate >= 0) & (candidate <= 255)
            best, scale = np.where(better, score, best), np.where(better, fitted, scale)
            zero = np.where(better, candidate, zero)
    _, chosen, chosen_zero = groups.final(naive, naive_zero, scale, zero, top, kind)
    flat = ~(span > 0)
    scales[:] = np.where(flat, _rounded(largest + np.float32(0), kind), chosen)
    zeros[:] = np.where(flat, 0, chosen_zero)
