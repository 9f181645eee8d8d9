"""ggml's quantizers in C, from a shared library; README.md describes how to build one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

VARIABLE = "QFORMAT_BENCH_GGML"
_FILE = "libggml-base.so"
#: by name of the type: bytes of a block, elements of a block
BLOCKS = {
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q8_0": (34, 32),
    "iq4_nl": (18, 32),
    "iq4_xs": (136, 256),
    "q4_K": (144, 256),
}
#: types whose quantizers search: a few million weights a second
SEARCHING = ("iq4_nl", "iq4_xs", "q4_K")
NONE = f"No library of ggml was found, so its rows are missing: see README.md (--ggml, {VARIABLE}, llama-cpp-python)."


@dataclass(frozen=True)
class Library:
    """A build of ggml.

    Parameters
    ----------
    name
        For the tables.
    path
        The shared library.
    """

    name: str
    path: Path

    @cached_property
    def _functions(self) -> ctypes.CDLL:
        # A library of ggml's quantizers alone lacks functions that only other parts call: bind lazily.
        return ctypes.CDLL(str(self.path), mode=os.RTLD_LAZY)

    def quantize(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Return the blocks of float32 rows whose length is a multiple of a block's."""
        nbytes, elements = BLOCKS[kind]
        _check(rows, elements)
        blocks = np.empty(rows.size // elements * nbytes, np.uint8)
        if kind in SEARCHING:
            function = getattr(self._functions, f"quantize_{kind}")
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
            written = function(rows.ctypes.data, blocks.ctypes.data, *rows.shape, None)
            assert written == blocks.size
        else:
            function = getattr(self._functions, f"quantize_row_{kind}_ref")
            function.restype = None
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            function(rows.ctypes.data, blocks.ctypes.data, rows.size)
        return blocks

    def dequantize(self, kind: str, blocks: np.ndarray, out: np.ndarray) -> None:
        """Decode blocks to float32 rows."""
        nbytes, elements = BLOCKS[kind]
        _check(out, elements)
        assert blocks.size == out.size // elements * nbytes
        function = getattr(self._functions, f"dequantize_row_{kind}")
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(blocks.ctypes.data, out.ctypes.data, out.size)


def _check(rows: np.ndarray, elements: int) -> None:
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    assert rows.shape[-1] % elements == 0


def libraries(options: Iterable[str]) -> list[Library]:
    """Return the libraries named by options and the environment, or else the one of the package llama_cpp.

    Each is a path or NAME=PATH; those of the environment stand like a search path, with colons between them.
    """
    wanted = [*options, *filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))]
    found = []
    for text in wanted:
        name, equals, path = text.partition("=")
        file = Path(path if equals else name)
        if not file.is_file():
            raise FileNotFoundError(f"no ggml library at {file}")
        found.append(Library(f"ggml {name}" if equals else "ggml", file))
    return found or _installed()


def _installed() -> list[Library]:
    spec = find_spec("llama_cpp")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "lib", _FILE)
        if file.is_file():
            return [Library("ggml of llama-cpp-python", file)]
    return []
