"""Tables of frequencies: ``numpy/frequencies.py``, compiled."""

from __future__ import annotations

from qformat.kernels.numba.compiler import U8, U32, kernel
from qformat.kernels.numpy import frequencies

write_table = kernel(f"int64({U32}, int64, int64, uint8[::1])")(frequencies.write_table)
read_table = kernel(f"int64({U8}, int64, int64, uint32[::1])")(frequencies.read_table)
symbol_frequencies = kernel(f"boolean({U32}, int64, int64, int64, uint32[::1])")(frequencies.symbol_frequencies)
