"""Magnitude pruning: the smallest weights of a checkpoint are set to zero before it is converted.

Without the sign, the bits of floats are in the order of their magnitudes, in every format. So the threshold is found exactly by a
radix select: a histogram of the top 16 bits of all weights, then one of the next 16 bits. No tensor is held in memory.
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
from qformat.pipeline.patterns import check_patterns, last_match, split_items
from qformat.pipeline.source import Checkpoint, SourceTensor

#: patterns of lower-case names of embeddings and output heads, which suffer most from pruning: only an override prunes them
NOT_PRUNED = (
    "*embed*", "*embd*", "*emb.weight", "*wte.weight", "*wpe.weight", "shared.weight", "*.shared.weight", "*lm_head*",
    "head.weight", "*.head.weight", "output.weight", "proj_out.weight", "score.weight", "*classifier*", "*predictions.decoder*",
)  # fmt: skip

_DIGIT = 16  # bits of a histogram


@dataclass(frozen=True)
class Cut:
    """The threshold of a tensor.

    Attributes
    ----------
    bound
        Bits of a magnitude: all smaller ones are set to zero.
    zeros
        Number of weights that are zero then; more than the rank if several have the largest pruned magnitude.
    """

    bound: int
    zeros: int


class Pruned(SourceTensor):
    """A floating tensor whose smallest weights are read as +0; all others keep their bits.

    Parameters
    ----------
    source
        The tensor before pruning; the first read of the pruned one reads all of it, once for every 16 bits of its dtype.
    rank
        Number of weights to prune, at least 1: the smallest, among them those that are zero already, and all of the same magnitude
        as the last. NaN and infinity stay, for the stages that refuse them.
    """

    def __init__(self, source: SourceTensor, rank: int) -> None:
        self.name, self.dtype, self.shape = source.name, source.dtype, source.shape
        self.source, self.rank = source, rank
        self.elements = math.prod(source.shape)
        self._lock = threading.Lock()
        self._cut: Cut | None = None

    @property
    def zeros(self) -> int | None:
        """Number of zeros; None before the first read."""
        return self._cut.zeros if self._cut else None

    def cut(self) -> Cut:
        """Return the threshold; the first thread that needs it computes it."""
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
    """Sparsities by name.

    Parameters
    ----------
    default
        For floating tensors of two or more dimensions, except those in `NOT_PRUNED`.
    overrides
        (pattern, sparsity): for floating tensors of two or more dimensions whose name matches; the last match wins.
    """

    default: Fraction = Fraction(0)
    overrides: Sequence[tuple[str, Fraction]] = ()

    @classmethod
    def parse(cls, default: float | str, overrides: Iterable[str] | Mapping[str, float] = ()) -> Pruning:
        """Parse and check sparsities.

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
        pairs = split_items(overrides, "PATTERN=SPARSITY")
        return cls(_sparsity(default), tuple((pattern, _sparsity(value)) for pattern, value in pairs))

    def sparsity_for(self, tensor: SourceTensor) -> Fraction:
        """Return the share of a tensor's weights to prune."""
        if not _prunable(tensor):
            return Fraction(0)
        lower = tensor.name.lower()
        default = Fraction(0) if any(fnmatchcase(lower, pattern) for pattern in NOT_PRUNED) else self.default
        return last_match(tensor.name, self.overrides, default)

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the pruned checkpoint, without reading any tensor.

        Of n weights, those up to the magnitude of the ``floor(sparsity * n)``-th smallest are set to zero.

        Raises `TypeSpecError` if a pattern matches no tensor that can be pruned.
        """
        pairs = [(pattern, float(sparsity)) for pattern, sparsity in self.overrides]
        check_patterns(pairs, checkpoint.tensors, _prunable, _not_prunable)
        tensors = [self._pruned(tensor) for tensor in checkpoint.tensors]
        warnings = list(checkpoint.warnings)
        ranks = sorted((tensor.name, tensor.rank) for tensor in tensors if isinstance(tensor, Pruned))
        if not ranks and (self.default > 0 or any(sparsity > 0 for _, sparsity in self.overrides)):
            warnings.append("nothing is pruned: no tensor qualifies; name some with --prune-tensor GLOB=SPARSITY")
        variant = f"{checkpoint.variant} pruned={ranks}" if ranks else checkpoint.variant
        return replace(checkpoint, tensors=tensors, warnings=warnings, variant=variant)

    def _pruned(self, tensor: SourceTensor) -> SourceTensor:
        rank = int(self.sparsity_for(tensor) * math.prod(tensor.shape))
        return Pruned(tensor, rank) if rank else tensor


def find_cut(tensor: SourceTensor, rank: int) -> Cut:
    """Find the threshold for a number of weights, reading the tensor once for every 16 bits of its dtype.

    Raises `SourceError` if it cannot be read.
    """
    found = below = 0
    for shift in range(max(8 * tensor.dtype.size - _DIGIT, 0), -1, -_DIGIT):
        first = shift + _DIGIT >= 8 * tensor.dtype.size
        counts = np.zeros(1 << _DIGIT, np.int64)
        for bits in _magnitudes(tensor):
            # of the weights, only those that begin with the digits found so far
            candidates = bits if first else bits[bits >> (shift + _DIGIT) == found]
            counts += np.bincount((candidates >> shift).astype(np.intp) & 0xFFFF, minlength=counts.size)
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
    """Return the bits of infinity, or of the only NaN of a dtype without infinity; those below the first digit are 0."""
    if dtype.name == "f8_e4m3":
        return 0x7F
    return ((1 << dtype.exponent) - 1) << dtype.mantissa


def _prunable(tensor: SourceTensor) -> bool:
    return tensor.dtype.floating and len(tensor.shape) >= 2 and not tensor.fixed_because


def _not_prunable(tensor: SourceTensor) -> str:
    return f"tensors that are never pruned, such as {tensor.name!r}: give floating tensors of two or more dimensions"


def _sparsity(value: float | str) -> Fraction:
    """Return a sparsity as the exact decimal number: 0.29 of 100 weights are 29, though the float 0.29 * 100 is less."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeSpecError(f"{value!r} is not a sparsity; give a number from 0 to less than 1, such as 0.5") from None
    if not 0 <= number < 1:
        raise TypeSpecError(f"a sparsity of {number} is out of range; give a number from 0 to less than 1, such as 0.5")
    return Fraction(repr(number))
