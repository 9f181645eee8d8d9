"""Hot loops: arrays in, arrays out.

Each kernel module exists twice, with the same functions and bit-identical results: in ``numba`` (compiled, with explicit vectors)
and in ``numpy`` (the fallback without numba, and the oracle of the tests). `load` picks one. Kernels do not check bounds: the
shapes and ranges that their docstrings name are the caller's to guarantee.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

from qformat.errors import QFormatError

_log = logging.getLogger(__name__)


@cache
def load(name: str) -> ModuleType:
    """Return the kernel module `name`, compiled if numba can be imported.

    The environment variable ``QFORMAT_KERNELS`` may be ``numba`` or ``numpy`` to force one of them.

    Raises
    ------
    ImportError
        If numba is forced and cannot be imported.
    QFormatError
        If the variable is something else.
    """
    wanted = os.environ.get("QFORMAT_KERNELS", "")
    if wanted not in ("", "numba", "numpy"):
        raise QFormatError(f"QFORMAT_KERNELS is {wanted!r}: it may be 'numba' or 'numpy'")
    folder = wanted or ("numba" if _has_numba() else "numpy")
    return import_module(f"qformat.kernels.{folder}.{name}")


@cache
def _has_numba() -> bool:
    """Return whether numba can be imported; cached, so that a fallback is reported once per process."""
    try:
        if import_module("numba").config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
        import_module("qformat.kernels.numba.compiler")
    except ImportError as error:
        _log.warning("numba cannot be used (%s): falling back to the slower numpy kernels", error)
        return False
    return True
