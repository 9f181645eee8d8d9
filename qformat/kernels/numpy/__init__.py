"""Kernels in numpy: the fallback without numba, and the oracle that the compiled ones are tested against."""
