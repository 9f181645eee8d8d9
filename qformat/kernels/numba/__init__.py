"""Kernels compiled by numba. ``compiler`` compiles and caches, ``simd`` has the explicit vectors; the rest are kernels."""
