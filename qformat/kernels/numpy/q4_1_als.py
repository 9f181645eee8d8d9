"""Search ``als`` for Q4_1 blocks, in numpy. Twin of ``numba/q4_1_als.py``."""

from __future__ import annotations

from qformat.kernels.arrays import F32, U16
from qformat.kernels.numpy.q4_1_search import search


def choose(x: F32, scales: U16, minima: U16) -> None:
    """Choose scales and minima for blocks of 32, from a few starts."""
    search(x, scales, minima, thorough=False)
