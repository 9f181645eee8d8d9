"""Compile kernels once per user and machine.

numba's own cache has traps: it does not notice a change in another file (an intrinsic, say), it raises at import when nothing is
writable, and a truncated cache file makes every run fail. So kernels are compiled for fixed signatures when their module is
imported, into a directory of the user's own whose name contains a digest of everything that the machine code depends on.
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

import llvmlite
import numba
from numba.core import config, types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_lock = threading.RLock()  # numba's setting is global, and kernels may be imported on several threads

# Types of inputs, for signatures: read-only arrays are taken too.
_INPUTS = ("uint8", "uint16", "uint32", "float32", "float64")
U8, U16, U32, F32, F64 = (f"Array({element}, 1, 'C', readonly=True)" for element in _INPUTS)


@cache
def cache_directory() -> Path | None:
    """Return the directory for machine code, or None if there is none that is safe and writable.

    ``QFORMAT_CACHE_DIR`` overrides ``$XDG_CACHE_HOME/qformat`` and ``~/.cache/qformat``. The files in it are pickles, so it must
    belong to the user and be writable by nobody else.
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
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), here.parent / "tables.py"]:
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

    Fast-math stays off because contraction and reassociation give other results on other processors.
    """

    def compile_(function: _Function) -> _Function:
        with _lock:
            return compile_alone(function)

    def compile_alone(function: _Function) -> _Function:
        directory = cache_directory()
        attempts = 2 if directory is not None else 0
        for _ in range(attempts):
            assert directory is not None
            try:
                with _numba_cache(directory):
                    compiled: _Function = numba.njit(list(signatures), nogil=True, cache=True)(function)
            except numba.core.errors.NumbaError:
                raise  # the kernel itself is wrong
            except Exception as error:  # noqa: BLE001  whatever a damaged cache raises
                _log.info("kernel cache in %s is damaged and made anew: %r", directory, error)
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(OSError):
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                return compiled
        uncached: _Function = numba.njit(list(signatures), nogil=True)(function)
        return uncached

    return compile_


def inline(function: _Function) -> _Function:
    """Mark a helper that kernels call; it is compiled into them."""
    helper: _Function = numba.njit(inline="never", nogil=True)(function)
    return helper


class Step:
    """A helper that one kernel hands to another helper, which calls it: ``step(function)``.

    numba compiles the callee anew for each step. (It takes plain compiled functions as arguments, too, but puts their addresses
    into the machine code, which then cannot be cached.)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.dispatcher = numba.njit(inline="never", nogil=True)(function)


class _StepType(types.Dispatcher):
    """The type of one step; its values carry nothing."""


@typeof_impl.register(Step)
def _typeof_step(step: Step, context: Any) -> _StepType:  # noqa: ARG001
    return _StepType(step.dispatcher)


register_model(_StepType)(models.OpaqueModel)


@lower_constant(_StepType)
def _step_constant(context: Any, builder: Any, kind: Any, value: Any) -> Any:  # noqa: ARG001
    return context.get_dummy_value()
