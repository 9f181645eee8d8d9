"""Extract the bits that a mask selects, and deposit them again: one instruction with BMI2, a loop on other processors."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qformat.kernels.numba.compiler import has_feature, inline
from qformat.kernels.numba.simd import call_llvm

ONE = np.uint32(1)


AVAILABLE = has_feature("bmi2")


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


#: ``extract(value, mask)``: the bits of a uint32 that a mask selects, moved together at the lower end
extract = _instruction("llvm.x86.bmi.pext.32") if AVAILABLE else _extract
#: ``deposit(value, mask)``: the opposite, the lowest bits moved to where the mask has ones
deposit = _instruction("llvm.x86.bmi.pdep.32") if AVAILABLE else _deposit
