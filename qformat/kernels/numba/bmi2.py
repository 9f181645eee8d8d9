"""Gather bits that a mask chooses, and put them back: instructions of most x86 processors (BMI2), and loops for the others."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from qformat.kernels.numba.compiler import inline
from qformat.kernels.numba.simd import call_llvm

ONE = np.uint32(1)


def _available() -> bool:
    """Return whether what numba compiles for has them: the machine's processor, unless its variables name another one."""
    if config.CPU_FEATURES is not None:
        return "+bmi2" in config.CPU_FEATURES
    return config.CPU_NAME is None and bool(llvmlite.binding.get_host_cpu_features().get("bmi2", False))


AVAILABLE = _available()


def _instruction(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, value: Any, mask: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
            return call_llvm(builder, name, ir.IntType(32), list(args))

        return types.uint32(types.uint32, types.uint32), generate

    return operation


@intrinsic
def count_ones(typing: Any, value: Any) -> Any:  # noqa: ARG001
    """Return how many bits of a uint32 are set."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.ctpop(args[0])

    return types.uint32(types.uint32), generate


@inline
def _extract(value, mask):
    result, place = np.uint32(0), np.uint32(0)
    while mask:
        lowest = np.uint32(mask & (np.uint32(0) - mask))
        if value & lowest:
            result |= np.uint32(ONE << place)
        mask = np.uint32(mask ^ lowest)
        place = np.uint32(place + ONE)
    return result


@inline
def _deposit(value, mask):
    result = np.uint32(0)
    while mask:
        lowest = np.uint32(mask & (np.uint32(0) - mask))
        if value & ONE:
            result |= lowest
        mask = np.uint32(mask ^ lowest)
        value = np.uint32(value >> ONE)
    return result


#: gather the bits of a uint32 that a mask chooses, in order, at the lower end
extract = _instruction("llvm.x86.bmi.pext.32") if AVAILABLE else _extract
#: do the opposite: put the lowest bits where the mask has ones
deposit = _instruction("llvm.x86.bmi.pdep.32") if AVAILABLE else _deposit
