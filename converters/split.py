"""Cut a checkpoint into shards: how much goes into each file, and what the files are called."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import TypeVar

from qformat.container.layout import align
from qformat.container.target import longest_name
from qformat.errors import TargetError
from qformat.pipeline.encode import Plan

_T = TypeVar("_T")
_FEW = 100  # bytes that nobody wants
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_DIGITS = 12
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB``, ``500MiB`` or ``1000000``; raise `ValueError` if it is malformed.

    A small number without a unit is refused: whoever writes 5 does not mean bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()] if match else 0
    if not 1 <= size < math.inf:
        raise ValueError(f"{text!r} is not a size such as 5GB or 500MiB")
    if size < _FEW and text.strip()[-1].isdigit():
        raise ValueError(f"{text} would be bytes; give a unit, as in {text}GB or {text}MB")
    return int(size)


def split(tensors: Iterable[_T], nbytes: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """Cut tensors, in their order, into shards that take no more than `limit` bytes, or are a single larger one.

    There is one shard at least, which is empty if there are no tensors.
    """
    shard: list[_T] = []
    total = 0
    for tensor in tensors:
        size = nbytes(tensor)
        if shard and total + size > limit:
            yield shard
            shard, total = [], 0
        shard.append(tensor)
        total += size
    yield shard


def stored_bytes(plan: Plan) -> int:
    """Return what a tensor takes in a file; if that depends on its values, what it takes in the source."""
    draft = plan.draft
    if draft is None:
        return align(plan.matrix.elements * plan.source.dtype.size)
    return sum(align(segment.length) for segment in draft.segments)


def shard_paths(output: Path, count: int) -> list[Path]:
    """Return the paths of the shards of a file without their digests: ``m-00001-of-00003.qf`` and so on beside ``m.qf``.

    Raises
    ------
    TargetError
        If there are more than can be numbered, or their names are too long.
    """
    if count > 99999:
        raise TargetError(f"{output}: would have {count} shards; give a larger --shard-size")
    paths = [output.with_name(f"{output.stem}-{i:05}-of-{count:05}{output.suffix}") for i in range(1, count + 1)]
    excess = len(os.fsencode(with_digest(paths[0].name, "0" * _DIGITS))) - longest_name(output.parent)
    if excess > 0:
        raise TargetError(f"{output}: the names of its shards are too long; give a name that is {excess} bytes shorter")
    return paths


def with_digest(name: str, root: str) -> str:
    """Return the name of a shard with the root digest of its content: ``m-00001-of-00003-0f1e2d3c4b5a.qf``.

    So shards of different content never have one name, and those of the old head and of the new one stand side by side.
    """
    path = PurePath(name)
    return f"{path.stem}-{root[:_DIGITS]}{path.suffix}"
