"""Magnitude pruning: the smallest weights of a checkpoint become zero before anything else sees them.

The bits of a float without its sign order magnitudes in every format, so the largest weight to go is found exactly, by counting
how often each value of 16 bits occurs, from the top ones down. No tensor is held in memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import CHUNK_ELEMENTS
from qformat.dtypes import DType, Elements
from qformat.errors import TypeSpecError
from qformat.pipeline.source import Checkpoint, SourceTensor

#: Embeddings and output heads, which lose the most: patterns of lower-case names that only an override prunes.
NOT_PRUNED = (
    "*embed*",  # also patch and time embeddings
    "*embd*",
    "*emb.weight",
    "*wte.weight",
    "*wpe.weight",
    "shared.weight",
    "*.shared.weight",
    "*lm_head*",
    "head.weight",
    "*.head.weight",
    "output.weight",
    "proj_out.weight",
    "score.weight",
    "*classifier*",
    "*predictions.decoder*",
)

_DIGIT = 16  # bits that are counted at once


@dataclass(frozen=True)
class Cut:
    """Where a tensor is cut.

    Attributes
    ----------
    bound
        Magnitudes below this one, as bits, become zero.
    zeros
        How many weights are zero then; more than asked for if several have the last magnitude that goes.
    """

    bound: int
    zeros: int


class Pruned(SourceTensor):
    """A floating tensor whose smallest weights are read as +0; all others keep their bits.

    Parameters
    ----------
    source
        The tensor before pruning. It is read in full at the first read of this one, up to four times.
    rank
        Weights up to the magnitude of the `rank`-th smallest become zero, at least one; those that are zero already count. NaN and
        infinity stay, for the stages that refuse them.
    """

    def __init__(self, source: SourceTensor, rank: int) -> None:
        self.name, self.dtype, self.shape = source.name, source.dtype, source.shape
        self.source, self.rank = source, rank
        self.elements = math.prod(source.shape)
        self._lock = threading.Lock()
        self._cut: Cut | None = None

    @property
    def zeros(self) -> int | None:
        """How many weights are zero now; None if it was not read yet."""
        return self._cut.zeros if self._cut else None

    def cut(self) -> Cut:
        """Return where it is cut, found by the first thread that asks."""
        with self._lock:
            if self._cut is None:
                self._cut = find_cut(self.source, self.rank)
            return self._cut

    def read(self, elements: slice) -> Elements:
        """Return some elements."""
        bound = self.cut().bound
        read = self.source.read(elements)
        bits = _bits(read)
        kept = np.where((bits & _magnitude(self.dtype)) < bound, bits.dtype.type(0), bits)
        return replace(read, data=kept.view(self.dtype.storage))


@dataclass(frozen=True)
class Pruning:
    """How much of which tensor to prune.

    Parameters
    ----------
    default
        Share of the weights, for floating tensors of two or more dimensions whose names match none of `NOT_PRUNED`.
    overrides
        (pattern, share): for all floating tensors of two or more dimensions whose name matches; the last match wins.
    """

    default: Fraction = Fraction(0)
    overrides: Sequence[tuple[str, Fraction]] = ()

    @classmethod
    def parse(cls, default: float | str, overrides: Iterable[str] | Mapping[str, float] = ()) -> Pruning:
        """Check what was asked for.

        Parameters
        ----------
        default
            A sparsity of at least 0 and less than 1.
        overrides
            ``PATTERN=SPARSITY`` strings, or a mapping from patterns to sparsities.

        Raises
        ------
        TypeSpecError
            If one is malformed or out of range.
        """
        pairs: Iterable[tuple[str, float | str]] = (
            overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
        )
        return cls(_sparsity(default), tuple((pattern, _sparsity(share)) for pattern, share in pairs))

    def sparsity_for(self, tensor: SourceTensor) -> Fraction:
        """Return the share of a tensor's weights that goes."""
        if not _prunable(tensor):
            return Fraction(0)
        lower = tensor.name.lower()
        sparsity = Fraction(0) if any(fnmatchcase(lower, no) for no in NOT_PRUNED) else self.default
        for pattern, override in self.overrides:
            if fnmatchcase(tensor.name, pattern):
                sparsity = override
        return sparsity

    def check_patterns(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise `TypeSpecError` if a pattern matches no tensor that can be pruned: it would be ignored silently."""
        every = list(tensors)
        for pattern, sparsity in self.overrides:
            matches = [tensor for tensor in every if fnmatchcase(tensor.name, pattern)]
            if not matches:
                raise TypeSpecError(f"no tensor matches the pattern of {pattern}={float(sparsity)}")
            if not any(_prunable(tensor) for tensor in matches):
                raise TypeSpecError(
                    f"{pattern}={float(sparsity)} matches only tensors that are never pruned, such as "
                    f"{matches[0].name!r}: give floating tensors of two or more dimensions"
                )

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as it reads when it is pruned; nothing is read yet.

        Of n weights, those up to the magnitude of the ``floor(sparsity * n)``-th smallest become zero.

        Raises
        ------
        TypeSpecError
            If a pattern matches no tensor that can be pruned.
        """
        self.check_patterns(checkpoint.tensors)
        tensors = [self._pruned(tensor) for tensor in checkpoint.tensors]
        warnings = list(checkpoint.warnings)
        wanted = self.default > 0 or any(sparsity > 0 for _, sparsity in self.overrides)
        if wanted and not any(isinstance(tensor, Pruned) for tensor in tensors):
            warnings.append(
                "nothing is pruned: no tensor is left that may be; name some with --prune-tensor GLOB=SPARSITY"
            )
        ranks = sorted((tensor.name, tensor.rank) for tensor in tensors if isinstance(tensor, Pruned))
        variant = f"{checkpoint.variant} pruned={ranks}" if ranks else checkpoint.variant
        return replace(checkpoint, tensors=tensors, warnings=warnings, variant=variant)

    def _pruned(self, tensor: SourceTensor) -> SourceTensor:
        rank = int(self.sparsity_for(tensor) * math.prod(tensor.shape))
        return Pruned(tensor, rank) if rank else tensor


def find_cut(tensor: SourceTensor, rank: int) -> Cut:
    """Find the magnitude of the `rank`-th smallest weight, reading the tensor once for every 16 bits of its dtype.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    found = below = 0
    for shift in range(max(8 * tensor.dtype.size - _DIGIT, 0), -1, -_DIGIT):
        first = shift + _DIGIT >= 8 * tensor.dtype.size
        counts = np.zeros(1 << _DIGIT, np.int64)
        for bits in _magnitudes(tensor):
            # of later digits only those count whose digits before are the ones found
            rest = bits if first else bits[bits >> (shift + _DIGIT) == found]
            counts += np.bincount((rest >> shift).astype(np.intp) & 0xFFFF, minlength=counts.size)
        if first:
            counts[_infinity(tensor.dtype) >> shift :] = 0
            rank = min(rank, int(counts.sum()))
            if rank == 0:
                return Cut(0, 0)
        upto = below + np.cumsum(counts)
        digit = int(np.searchsorted(upto, rank))
        below = int(upto[digit] - counts[digit])
        found = found << _DIGIT | digit
    return Cut(found + 1, int(upto[digit]))


def _magnitudes(tensor: SourceTensor) -> Iterator[NDArray[Any]]:
    """Yield the bits of all elements without their signs, chunk by chunk."""
    size = math.prod(tensor.shape)
    for start in range(0, size, CHUNK_ELEMENTS):
        yield _bits(tensor.read(slice(start, min(start + CHUNK_ELEMENTS, size)))) & _magnitude(tensor.dtype)


def _bits(elements: Elements) -> NDArray[Any]:
    bits: NDArray[Any] = elements.data.view(f"u{elements.dtype.size}")
    return bits


def _magnitude(dtype: DType) -> int:
    """Return the mask of all bits but the sign."""
    return (1 << (8 * dtype.size - 1)) - 1


def _infinity(dtype: DType) -> int:
    """Return the bits of the smallest magnitude that is no number; those below the first digit are 0."""
    if dtype.name == "f8_e4m3":  # has no infinity, and one NaN
        return 0x7F
    return ((1 << dtype.exponent) - 1) << dtype.mantissa


def _prunable(tensor: SourceTensor) -> bool:
    return tensor.dtype.floating and len(tensor.shape) >= 2


def _sparsity(value: float | str) -> Fraction:
    """Return a sparsity as the decimal number that was written: 0.29 of 100 weights are 29, though 0.29 * 100 is less."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeSpecError(f"{value!r} is no sparsity; give a number from 0 to less than 1, such as 0.5") from None
    if not 0 <= number < 1:
        raise TypeSpecError(f"a sparsity of {number} is out of range; give a number from 0 to less than 1, such as 0.5")
    return Fraction(repr(number))


def _split(item: str) -> tuple[str, str]:
    """Cut ``PATTERN=SPARSITY``, of which the pattern may hold more equals signs."""
    pattern, _, sparsity = item.rpartition("=")
    if not pattern or not sparsity:
        raise TypeSpecError(f"{item!r} is not of the form PATTERN=SPARSITY")
    return pattern, sparsity
