"""Find the state dict in an object that torch saved: by structure, since every project has its own name for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qformat.converters.wording import and_more
from qformat.errors import SourceError

Keys = tuple[str, ...]

#: the key of everything that has a name
WHOLE = "."
# Far more than in any checkpoint; pickles may refer to themselves, or to the same lists over and over
_MOST_NODES = 1_000_000
_MOST_VALUES = 100_000_000
_DEEPEST = 50
# A second state dict with this share of the weights makes the choice ambiguous
_RIVAL = 0.1
_NODES = (Mapping, list, tuple, torch.Tensor)
# The keys of the state of torch's optimizers
_OPTIMIZER = {"state", "param_groups"}
_SHOWN = 8


@dataclass(frozen=True)
class StateDict:
    """A state dict, and the rest of the object in which it was found.

    Attributes
    ----------
    key
        Its key in the object.
    tensors
        Its tensors by name.
    extras
        Everything else, by keys with dots between them.
    """

    key: str
    tensors: Mapping[str, torch.Tensor]
    extras: Mapping[str, Any]


def find_state_dict(root: object, key: str | None = None) -> StateDict:
    """Return the state dict in an object.

    It is the mapping (or list) that holds the most elements in tensors of its own, optimizers aside. With a key, it is everything
    below that key, the names of nested tensors joined with dots.

    Parameters
    ----------
    root
        The saved object.
    key
        The state dict to take: keys from the outermost to the innermost with dots between them, or `WHOLE`.

    Raises
    ------
    SourceError
        If there is none, none with this key, or the choice is ambiguous; the message does not name the file.
    """
    found = _tensors(root)
    if not found:
        raise SourceError("holds no tensors that have names")
    if () in found:
        raise SourceError(
            "holds one tensor without a name; save it in a dict, as in torch.save({'weight': tensor}, ...)"
        )
    groups: dict[Keys, dict[Keys, torch.Tensor]] = {}
    for keys, tensor in found.items():
        groups.setdefault(keys[:-1], {})[keys] = tensor
    if key is None:
        chosen, taken = _largest(groups)
    else:
        chosen, taken = _below(found, key)
        if not taken:
            raise SourceError(f"holds no state dict {key!r}, but {_listed(groups)}")
    used = {keys[:end] for keys in taken for end in range(len(keys) + 1)}
    names: dict[str, torch.Tensor] = {}
    for keys, tensor in taken.items():
        name = ".".join(keys[len(chosen) :])
        if name in names:
            raise SourceError(f"holds two tensors named {name!r}; choose a part with --state-dict-key KEY")
        names[name] = tensor
    return StateDict(_dotted(chosen), names, {_dotted(keys): value for keys, value in _extras(root, (), used)})


def _tensors(root: object) -> dict[Keys, torch.Tensor]:
    found: dict[Keys, torch.Tensor] = {}
    waiting: list[tuple[Keys, object]] = [((), root)]
    nodes = values = 0
    while waiting:
        keys, node = waiting.pop()
        if isinstance(node, torch.Tensor):
            if keys in found:
                raise SourceError(f"holds two tensors under the key {_dotted(keys)!r}, one as a number and one as text")
            found[keys] = node
            continue
        nested = [(name, child) for name, child in _children(node) if isinstance(child, _NODES)]
        nodes += len(nested)
        values += len(node) if isinstance(node, _NODES) else 0
        if nodes > _MOST_NODES or values > _MOST_VALUES or len(keys) > _DEEPEST:
            raise SourceError("is nested like no real checkpoint; do not use it")
        waiting.extend(((*keys, name), child) for name, child in reversed(nested))
    return found


def _children(node: object) -> Iterable[tuple[str, object]]:
    """Return the named or numbered children of a node, except of optimizers."""
    if isinstance(node, Mapping):
        if node.keys() >= _OPTIMIZER or not all(type(key) in (str, int) for key in node):
            return ()
        return ((str(key), child) for key, child in node.items())
    if isinstance(node, list | tuple):
        return ((str(i), child) for i, child in enumerate(node))
    return ()


def _largest(groups: Mapping[Keys, dict[Keys, torch.Tensor]]) -> tuple[Keys, dict[Keys, torch.Tensor]]:
    likely = {
        keys: group for keys, group in groups.items() if not any("optim" in key.lower() for key in keys)
    } or groups
    first, *others = sorted(likely, key=lambda keys: -_elements(likely[keys]))
    enough = _RIVAL * _elements(likely[first])
    if any(_elements(likely[keys]) >= enough or _belongs(first, keys, likely[keys]) for keys in others):
        raise SourceError(
            f"holds several state dicts: {_listed(likely)}; choose one with --state-dict-key KEY: the key of what contains "
            f"several takes all of them, and {WHOLE} takes everything"
        )
    return first, likely[first]


def _belongs(first: Keys, keys: Keys, group: Mapping[Keys, torch.Tensor]) -> bool:
    """Return whether a group has matrices in the same tree as the largest state dict, like another part of one model."""
    near = bool(first) and keys[:1] == first[:1]
    return near and any(tensor.dim() > 1 and tensor.is_floating_point() for tensor in group.values())


def _below(found: Mapping[Keys, torch.Tensor], key: str) -> tuple[Keys, dict[Keys, torch.Tensor]]:
    if key == WHOLE:
        return (), dict(found)
    for keys in found:
        for end in range(1, len(keys)):
            if ".".join(keys[:end]) == key:
                chosen = keys[:end]
                return chosen, {other: tensor for other, tensor in found.items() if other[:end] == chosen}
    return (), {}


def _extras(node: object, keys: Keys, used: set[Keys]) -> Iterator[tuple[Keys, object]]:
    """Yield the outermost objects without any tensor of the state dict."""
    for name, child in _children(node):
        here = (*keys, name)
        if here in used:
            yield from _extras(child, here, used)
        else:
            yield here, child


def _elements(group: Mapping[Keys, torch.Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in group.values())


def _dotted(keys: Keys) -> str:
    return ".".join(keys) or WHOLE


def _listed(groups: Mapping[Keys, dict[Keys, torch.Tensor]]) -> str:
    largest = sorted(groups, key=lambda keys: (-_elements(groups[keys]), keys))
    texts = [
        f"{_dotted(keys)!r} ({len(groups[keys])} tensors, {_elements(groups[keys]):,} weights)" for keys in largest
    ]
    return ", ".join(texts[:_SHOWN]) + and_more(texts, _SHOWN)
