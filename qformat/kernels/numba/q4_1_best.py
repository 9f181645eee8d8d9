"""Search ``best`` for Q4_1 blocks, compiled. Twin of ``numpy/q4_1_best.py``."""

from __future__ import annotations

from qformat.kernels.numba.compiler import F32, kernel
from qformat.kernels.numba.q4_1_search import search


@kernel(f"void({F32}, uint16[::1], uint16[::1])")
def choose(x, scales, minima):
    """Choose binary16 scales and minima for blocks of 32: as `q4_1_als.choose`, then with more starts and two turns from each."""
    search(x, scales, minima, True)
