"""Hot loops: arrays in, arrays out.

Each kernel module stands here twice with the same functions and bit-identical results: in ``jit`` (numba, explicit vectors) and in
``plain`` (numpy: the fallback where numba cannot be had, and the oracle of the tests). `load` picks one.
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
    """Return the kernel module `name`, compiled if that is possible.

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
    if wanted != "numpy":
        try:
            return import_module(f"qformat.kernels.numba.{name}")
        except ImportError as error:
            if wanted == "numba":
                raise
            _log.warning("numba cannot be used (%s): falling back to the slower numpy kernels", error)
    return import_module(f"qformat.kernels.numpy.{name}")
