"""Compile kernels once per user and machine.

numba's own cache has five traps, and each decision here avoids one:

* It looks at a kernel's own file only, so it would run old machine code after a change in a helper or an intrinsic. The directory
  is therefore named after a digest of all sources and versions that machine code depends on.
* It goes by the path of that file, so each virtual environment would compile everything anew. Here all of them share the directory.
* It compiles at the first call, in whichever thread makes it, once for each combination of argument types. Kernels have fixed
  signatures instead and are compiled when their module is imported, so that all waiting (and all failing) is in one place.
* With nowhere to write it raises at import, and a truncated file makes every later run fail. Here a missing cache costs time, one
  that cannot be written is read all the same, and a damaged one is deleted and made again.
* Its files are pickles: whoever may write them runs code as the user. Only a directory that belongs to the user or to root and that
  nobody else may write is trusted.

Compiling takes seconds, so it is announced, in programs that set up no logging as well.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from numba.core import caching, event, types
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.extending import models, register_model, typeof_impl

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_lock = threading.RLock()  # modules may be imported on several threads
_SILENCE = 60  # seconds after which compiling is announced again

# Input arrays in signatures: one-dimensional, C-contiguous, read-only or not.
_INPUTS = ("uint8", "uint16", "uint32", "float32", "float64")
U8, U16, U32, F32, F64 = (f"Array({element}, 1, 'C', readonly=True)" for element in _INPUTS)


@cache
def cache_directory() -> Path | None:
    """Return the directory for machine code, or None if none is safe and writable.

    ``QFORMAT_CACHE_DIR`` overrides ``$XDG_CACHE_HOME/qformat`` and ``~/.cache/qformat``.
    """
    try:
        own = os.environ.get("QFORMAT_CACHE_DIR")
        base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qformat"
        directory = base / f"kernels-{_digest()}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except (OSError, RuntimeError) as error:
        _log.warning("no cache for compiled kernels (%s): they are compiled anew in each run", error)
        return None
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.warning("%s is not safe to load code from: kernels are compiled anew in each run", directory)
        return None
    if not os.access(directory, os.R_OK | os.X_OK):
        _log.warning("%s cannot be read: kernels are compiled anew in each run", directory)
        return None
    return directory


class _Locator(caching._CacheLocator):  # type: ignore[misc]  # noqa: SLF001
    """Tells numba where machine code of this package is: in the directory of `cache_directory`, wherever the sources are."""

    def __init__(self, function: Any, directory: Path) -> None:
        self._line = function.__code__.co_firstlineno
        self._directory = directory

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:  # noqa: ARG003
        """Return the locator of a kernel; None for the user's own functions."""
        directory = cache_directory() if py_func.__module__.startswith(__package__ + ".") else None
        return cls(py_func, directory) if directory else None

    def get_cache_path(self) -> str:
        """Return the directory."""
        return str(self._directory)

    def get_source_stamp(self) -> str:
        """Return a constant: another source means another directory."""
        return ""

    def get_disambiguator(self) -> str:
        """Return what tells apart kernels of the same name in one module."""
        return str(self._line)


# the classes that numba asks in turn, for every function that is cached
caching.CompileResultCacheImpl._locator_classes.insert(0, _Locator)  # noqa: SLF001


class _Announcement(event.Listener):  # type: ignore[misc]
    """Announces the compilation of kernels, unless that has just been done."""

    def __init__(self) -> None:
        self._last = -float(_SILENCE)

    def on_start(self, event: Any) -> None:  # noqa: ARG002
        """Announce it, if need be."""
        if time.monotonic() - self._last > _SILENCE:
            _log.warning("compiling kernels, which happens once and takes some seconds")
        self._last = time.monotonic()

    def on_end(self, event: Any) -> None:  # noqa: ARG002
        """Take the time."""
        self._last = time.monotonic()


_announcement = _Announcement()


def _digest() -> str:
    """Return a digest of the sources of all kernels, in this folder and elsewhere, and of the versions in use."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), here.parent / "tables.py", here.parent / "numpy" / "frequencies.py"]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, platform.python_version(), platform.machine())
    digest.update(repr(versions).encode())
    return digest.hexdigest()[:16]


def kernel(*signatures: str) -> Callable[[_Function], _Function]:
    """Compile a function for the given numba signatures, without the GIL and without fast-math.

    Fast-math stays off because results must not depend on the processor: contraction to fused multiply-adds and reassociation round
    differently where they apply, and assuming that there is no NaN makes one undefined behaviour.
    """

    def compile_(function: _Function) -> _Function:
        with _lock, event.install_listener("numba:compile", _announcement):
            directory = cache_directory()
            for _ in range(2):
                if directory is None:
                    break
                try:
                    compiled: _Function = numba.njit(list(signatures), nogil=True, cache=True)(function)
                except numba.core.errors.NumbaError:
                    raise  # the kernel itself is wrong
                except OSError as error:
                    _log.info("kernels cannot be kept in %s: %s", directory, error)
                    break
                except Exception as error:  # noqa: BLE001  unpickling a damaged file may raise anything
                    _log.info("kernel cache in %s is damaged and made anew: %r", directory, error)
                    shutil.rmtree(directory, ignore_errors=True)
                    with suppress(OSError):
                        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                else:
                    return compiled
            uncached: _Function = numba.njit(list(signatures), nogil=True)(function)
            return uncached

    return compile_


@cache
def _features() -> frozenset[str]:
    """Return the features of the processor that numba compiles for: the machine's, unless its settings name others."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(features.split(","))


def has_feature(name: str) -> bool:
    """Return whether the processor that numba compiles for has a feature."""
    return f"+{name}" in _features()


def inline(function: _Function) -> _Function:
    """Mark a helper that kernels call; it is compiled into each of them, and LLVM decides on inlining."""
    helper: _Function = numba.njit(inline="never", nogil=True)(function)
    return helper


class Step:
    """A helper that a kernel passes to another helper, which calls it.

    Each step is a type of its own, so that numba compiles the called helper anew for each. (An ordinary compiled function may be an
    argument too, but its address goes into the machine code, which then cannot be cached.)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.dispatcher = numba.njit(inline="never", nogil=True)(function)


class _StepType(types.Dispatcher):
    """The type of one step; its values carry no data."""


@typeof_impl.register(Step)
def _typeof_step(step: Step, context: Any) -> _StepType:  # noqa: ARG001
    return _StepType(step.dispatcher)


register_model(_StepType)(models.OpaqueModel)


@lower_constant(_StepType)
def _step_constant(context: Any, builder: Any, kind: Any, value: Any) -> Any:  # noqa: ARG001
    return context.get_dummy_value()
