"""Search ``als`` for Q4_1 blocks, compiled. Twin of ``numpy/q4_1_als.py``."""

from __future__ import annotations

from qformat.kernels.numba.compiler import F32, kernel
from qformat.kernels.numba.q4_1_search import search


@kernel(f"void({F32}, uint16[::1], uint16[::1])")
def choose(x, scales, minima):
    """Choose binary16 scales and minima for blocks of 32 from a few starts."""
    search(x, scales, minima, False)
