"""Compile kernels once per user and machine.

numba's own cache has four traps, and each decision here avoids one:

* It looks at a kernel's own file only, so it would run old machine code after a change in a helper or an intrinsic. The directory
  is therefore named after a digest of all sources and versions that machine code depends on.
* It compiles at the first call, in whichever thread makes it, once for each combination of argument types. Kernels have fixed
  signatures instead and are compiled when their module is imported, so that all waiting (and all failing) is in one place.
* With nowhere to write it raises at import, and a truncated file makes every later run fail. Here a missing cache costs time, and a
  damaged one is deleted and made again.
* Its files are pickles: whoever may write them runs code as the user. Only a directory that belongs to the user and that nobody
  else may write is trusted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
from numba.core import config, types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_lock = threading.RLock()  # numba's cache setting is global, and modules may be imported on several threads

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
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.warning("%s is not safe to load code from: kernels are compiled anew in each run", directory)
        return None
    if not os.access(directory, os.W_OK | os.X_OK):
        return None
    if not any(directory.iterdir()):
        _log.info("compiling kernels, which happens once and takes a few seconds")
    return directory


def _digest() -> str:
    """Return a digest of the sources of all kernels, in this folder and elsewhere, and of the versions in use."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), here.parent / "tables.py", here.parent / "numpy" / "frequencies.py"]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, platform.python_version(), platform.machine())
    digest.update(repr(versions).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _numba_cache(directory: Path) -> Iterator[None]:
    """Point numba at `directory` while a function is compiled; the user's own functions keep their setting."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def kernel(*signatures: str) -> Callable[[_Function], _Function]:
    """Compile a function for the given numba signatures, without the GIL and without fast-math.

    Fast-math stays off because results must not depend on the processor: contraction to fused multiply-adds and reassociation round
    differently where they apply, and assuming that there is no NaN makes one undefined behaviour.
    """

    def compile_(function: _Function) -> _Function:
        with _lock:
            directory = cache_directory()
            for _ in range(2):
                if directory is None:
                    break
                try:
                    with _numba_cache(directory):
                        compiled: _Function = numba.njit(list(signatures), nogil=True, cache=True)(function)
                except numba.core.errors.NumbaError:
                    raise  # the kernel itself is wrong
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


def has_feature(name: str) -> bool:
    """Return whether the processor that numba compiles for, the machine's unless its settings name another, has a feature."""
    if config.CPU_FEATURES is not None:
        return f"+{name}" in config.CPU_FEATURES
    return config.CPU_NAME is None and bool(llvmlite.binding.get_host_cpu_features().get(name, False))


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
