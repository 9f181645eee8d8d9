"""Floats that are not weights, and tensors that a type would make larger: what a type for all tensors leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.base import Encoder
from qformat.codecs.raw import Raw
from qformat.pipeline.source import QuantizedSource, SourceTensor

# Elements that are looked at first: among so many weights, one is no whole number
_FEW = 64
_AT_ONCE = 1 << 20
# Larger tensors are weights: places and masks of 8192 tokens are not, and a pass over zeros would take its time
_MOST = 1 << 26
# Added to a score before softmax, it makes the score count for nothing; weights are not so large
_MASKED = -1000.0

Values = NDArray[Any]


def unlike_weights(tensor: SourceTensor, encoder: Encoder) -> str:
    """Return why a tensor does not get a type that is given for all, as a clause about it; nothing if it gets it.

    Of almost all tensors, only a few elements are read.
    """
    if isinstance(tensor, QuantizedSource) or not math.prod(tensor.shape):
        return ""
    draft = None if isinstance(encoder, Raw) else encoder.draft(tensor)
    if draft is not None and draft.nbytes > tensor.nbytes:
        return "it would be larger"
    if encoder.is_lossless(tensor.dtype) or math.prod(tensor.shape) > _MOST:
        return ""
    # one that is derived from another may need a pass over it before anything can be read
    tensor = getattr(tensor, "source", tensor)
    # numbers of places and the like have the shape of a batch of one
    if tensor.shape[0] == 1 and _all(tensor, _are_whole):
        return "whole numbers only"
    return "a mask" if _all(tensor, _are_zero_or_masked) and not _all(tensor, _are_zero) else ""


def _all(tensor: SourceTensor, check: Callable[[Values], bool]) -> bool:
    """Return whether all elements pass a check, until the first part of which one does not."""
    count = math.prod(tensor.shape)
    starts = [0, *range(min(_FEW, count), count, _AT_ONCE), count]
    with np.errstate(all="ignore"):  # NaN is no whole number
        return all(check(tensor.read(slice(start, stop)).to_f64()) for start, stop in pairwise(starts) if start < stop)


def _are_whole(values: Values) -> bool:
    return not np.isnan(values).any() and bool((np.trunc(values) == values).all())


def _are_zero_or_masked(values: Values) -> bool:
    return bool(((values == 0) | (values <= _MASKED)).all())


def _are_zero(values: Values) -> bool:
    return not values.any()
