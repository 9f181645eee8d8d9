"""Find the state dict in an object that torch saved: by structure, since every project has its own name for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qformat.converters.sources.pickles import StandIn
from qformat.converters.sources.torch_pickle import OddTensor, PickledArray, SavedTensor, Storage
from qformat.converters.wording import and_more
from qformat.errors import SourceError

Keys = tuple[str, ...]
Tensor = SavedTensor | OddTensor | PickledArray
Group = dict[Keys, Tensor]

#: the key of everything that has a name
WHOLE = "."
# Far more than in any checkpoint; pickles may refer to themselves, or to the same lists over and over
_MOST_NODES = 1_000_000
_MOST_VALUES = 100_000_000
_DEEPEST = 50
# A second state dict with this share of the weights makes the choice ambiguous
_RIVAL = 0.1
_TENSORS = (SavedTensor, OddTensor, PickledArray)
_CONTAINERS = (dict, list, tuple)
_NAMES = (str, int)
# The keys of the state of torch's optimizers, words for optimizers, and the tensors that they have for each weight
_OPTIMIZER = {"state", "param_groups"}
_OPTIMIZERS = {"optim", "optims", "optimizer", "optimizers", "optimiser", "optimisers"}
_SLOTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"}
# Words in the key of a whole model, and in that of a part that belongs to another
_MODEL = {"model", "models", "state", "net", "network", "module", "weights", "ema", "generator"}
_PARTS = {"buffer", "buffers"}
# Bytes of the largest state of a random number generator
_GENERATOR = 5056
_SHOWN = 8


@dataclass(frozen=True)
class StateDict:
    """A state dict, and the rest of the object in which it was found."""

    key: str  # in the object
    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any]  # everything else, by keys with dots between them


@dataclass
class _Found:
    """The tensors of an object."""

    tensors: Group = field(default_factory=dict)
    unnamed: dict[Keys, dict[object, Tensor]] = field(
        default_factory=dict
    )  # tensors whose keys are no names, by mapping
    optimizers: int = 0
    objects: list[str] = field(default_factory=list)  # classes of objects that hold tensors


def find_state_dict(root: object, key: str | None = None) -> StateDict:
    """Return the state dict in an object.

    It is the mapping (or list) that holds the most elements in tensors of its own, optimizers aside. With a key (keys from the
    outermost to the innermost with dots between them, or `WHOLE`), it is everything below, nested names joined with dots.

    Raises `SourceError` if there is none, or the choice is ambiguous; the message does not name the file.
    """
    found = _search(root)
    if () in found.tensors:
        raise SourceError(
            "holds one tensor without a name; save it in a dict, as in torch.save({'weight': tensor}, ...)"
        )
    groups: dict[Keys, Group] = {}
    for keys, tensor in found.tensors.items():
        groups.setdefault(keys[:-1], {})[keys] = tensor
    if key is None:
        chosen, taken = _largest(groups, found)
    else:
        chosen, taken = _below(found.tensors, key)
        if not taken:
            raise SourceError(f"holds no state dict {key!r}, but {_listed(groups) or 'no tensors that have names'}")
    used = {keys[:end] for keys in taken for end in range(len(keys) + 1)}
    names: dict[str, Tensor] = {}
    for keys, tensor in taken.items():
        name = ".".join(keys[len(chosen) :])
        if name in names:
            raise SourceError(f"holds two tensors named {name!r}; choose a part with --state-dict-key KEY")
        names[name] = tensor
    return StateDict(_dotted(chosen), names, {_dotted(keys): value for keys, value in _extras(root, (), used)})


def _search(root: object) -> _Found:
    found = _Found()
    waiting: list[tuple[Keys, object]] = [((), root)]
    nodes = values = 0
    while waiting:
        keys, node = waiting.pop()
        if isinstance(node, _TENSORS):
            if keys in found.tensors:
                raise SourceError(f"holds two tensors under the key {_dotted(keys)!r}, one as a number and one as text")
            found.tensors[keys] = node
        elif isinstance(node, StandIn):
            if holds_tensors(node):
                found.objects.append(node.title)
        elif _is_optimizer(node):
            found.optimizers += holds_tensors(node)
        elif isinstance(node, _CONTAINERS):
            if unnamed := _unnamed(node):
                found.unnamed[keys] = unnamed
            nested = [
                (name, child)
                for name, child in _children(node)
                if isinstance(child, (*_CONTAINERS, *_TENSORS, StandIn))
            ]
            nodes += len(nested)
            values += len(node)
            if nodes > _MOST_NODES or values > _MOST_VALUES or len(keys) > _DEEPEST:
                raise SourceError("is nested like no real checkpoint; do not use it")
            waiting.extend(((*keys, name), child) for name, child in reversed(nested))
    _drop_values(found.tensors)
    return found


def _drop_values(tensors: Group) -> None:
    """Leave arrays of numpy that are values beside a checkpoint: they are tensors beside tensors, or if there are no others."""
    groups = {keys[:-1] for keys, tensor in tensors.items() if not isinstance(tensor, PickledArray)}
    for keys, tensor in [*tensors.items()]:
        if isinstance(tensor, PickledArray) and (tensor.value is None or (groups and keys[:-1] not in groups)):
            del tensors[keys]


def _children(node: object) -> Iterable[tuple[str, object]]:
    """Return the named or numbered children of a node."""
    if isinstance(node, dict):
        return ((str(key), child) for key, child in node.items() if type(key) in _NAMES)
    if isinstance(node, list | tuple):
        return ((str(i), child) for i, child in enumerate(node))
    return ()


def _unnamed(node: object) -> dict[object, Tensor]:
    """Return the tensors whose keys are no names."""
    if not isinstance(node, dict):
        return {}
    return {key: child for key, child in node.items() if type(key) not in _NAMES and isinstance(child, _TENSORS)}


def _is_optimizer(node: object) -> bool:
    """Return whether an object has the keys of the state of torch's optimizers."""
    return isinstance(node, dict) and node.keys() >= _OPTIMIZER


def holds_tensors(root: object) -> bool:
    """Return whether there is a tensor, or the bytes of one, anywhere in an object, also inside stand-ins."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (SavedTensor, OddTensor, Storage)):
            return True
        if id(node) in seen or not isinstance(node, (*_CONTAINERS, StandIn)):
            continue
        seen.add(id(node))
        waiting.extend(node.values() if isinstance(node, dict) else node.parts() if isinstance(node, StandIn) else node)
    return False


def _largest(groups: Mapping[Keys, Group], found: _Found) -> tuple[Keys, Group]:
    weights = {keys: group for keys, group in groups.items() if not _of_generators(group)}
    likely = {keys: group for keys, group in weights.items() if not _of_optimizer(keys)}
    if not likely:
        raise SourceError(_no_tensors(found, optimizer=bool(weights) or found.optimizers > 0, generators=bool(groups)))
    first, *others = sorted(likely, key=lambda keys: -_elements(likely[keys]))
    enough = _RIVAL * _elements(likely[first])
    for keys, unnamed in found.unnamed.items():
        if keys == first or _elements(unnamed) >= enough:
            raise SourceError(
                f"{_dotted(keys)!r} holds tensors under keys that are no names, such as {_example(unnamed)}"
            )
    if any(_elements(likely[keys]) >= enough or _belongs(first, keys, likely[keys]) for keys in others):
        raise SourceError(
            f"holds several state dicts: {_listed(likely)}; choose one with --state-dict-key KEY: the key of what contains "
            f"several takes all of them, and {WHOLE} takes everything"
        )
    return first, likely[first]


def _no_tensors(found: _Found, *, optimizer: bool, generators: bool) -> str:
    if found.objects:
        return (
            f"holds an object of the class {found.objects[0]} in place of a state dict; load it where it was made, and save "
            "only the state dict: torch.save(model.state_dict(), ...)"
        )
    if found.unnamed:
        return f"holds no tensors that have names, but keys such as {_example(next(iter(found.unnamed.values())))}"
    if optimizer:
        return "holds no tensors that have names, but the state of an optimizer; give the file with the model's weights"
    if generators:
        return "holds no weights, but the state of random number generators; give the file with the model's weights"
    return "holds no tensors that have names"


def _of_optimizer(keys: Keys) -> bool:
    return any(key in _SLOTS or _words(key) & _OPTIMIZERS for key in keys)


def _of_generators(group: Group) -> bool:
    """Return whether tensors can be states of random number generators, and nothing else."""
    return all(
        isinstance(tensor, SavedTensor)
        and tensor.dtype == "uint8"
        and len(tensor.shape) == 1
        and tensor.elements <= _GENERATOR
        for tensor in group.values()
    )


def _words(key: str) -> set[str]:
    """Return the words in a name, which may be joined with underscores, or be in camel case."""
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", key)}


def _belongs(first: Keys, keys: Keys, group: Group) -> bool:
    """Return whether a group is like another part of the model that the largest state dict is of."""
    if keys and _words(keys[-1]) & _PARTS:
        return True
    near = bool(first) and keys[:1] == first[:1]
    alike = bool(first) and len(keys) == len(first) and not _words(first[-1]) & _MODEL
    return (near or alike) and any(len(tensor.shape) > 1 and tensor.floating for tensor in group.values())


def _below(found: Group, key: str) -> tuple[Keys, Group]:
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
        if here not in used:
            yield here, child
        elif not isinstance(child, _TENSORS):
            yield from _extras(child, here, used)
    if isinstance(node, dict):
        yield from (((*keys, repr(key)[:80]), child) for key, child in node.items() if type(key) not in _NAMES)


def _example(unnamed: Mapping[object, Tensor]) -> str:
    return repr(next(iter(unnamed)))[:80]


def _elements(group: Mapping[Any, Tensor]) -> int:
    return sum(tensor.elements for tensor in group.values())


def _dotted(keys: Keys) -> str:
    return ".".join(keys) or WHOLE


def _listed(groups: Mapping[Keys, Group]) -> str:
    largest = sorted(groups, key=lambda keys: (-_elements(groups[keys]), keys))
    texts = [
        f"{_dotted(keys)!r} ({len(groups[keys])} tensors, {_elements(groups[keys]):,} weights)" for keys in largest
    ]
    return ", ".join(texts[:_SHOWN]) + and_more(texts, _SHOWN)
