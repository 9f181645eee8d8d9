"""Options for single layers in quantization configurations: by name, by patterns, or by groups of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: keys of options by the name of a layer, or by a pattern of names
PER_LAYER = ("dynamic", "extra_config", "regex_config", "quantized_layers", "layer_configs", "module_quant_configs")
_GROUPS = "config_groups"
_REGEX = "re:"
_EXCLUDED = "-:"

# A pattern comes from a file: one that could take for ever does not match
_LONGEST = 300
_MOST_REPEATS = 8
_NESTED = re.compile(r"[*+?}]\)*\s*\)[*+{]|\)[*+{]")


def for_layer(content: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """Return the options of a layer, given its name: those for all layers, where it has none of its own."""
    own: dict[str, Any] = {}
    for options in _own(content, layer):
        own = {**options, **own}
    if own:
        content = {key: value for key, value in content.items() if key not in PER_LAYER} | own
    groups = content.get(_GROUPS)
    if isinstance(groups, Mapping):
        chosen = {key: group for key, group in groups.items() if _is_target(group, layer)}
        if chosen:
            content = {**content, _GROUPS: chosen}
    return content


def _own(content: Mapping[str, Any], layer: str) -> Iterator[Mapping[str, Any]]:
    """Yield what is said for a layer, the most special first."""
    tables = [table for key in PER_LAYER if isinstance(table := content.get(key), Mapping)]
    for table in (content, *tables):
        if isinstance(table.get(layer), Mapping):
            yield table[layer]
    for table in tables:
        for pattern, options in table.items():
            if pattern != layer and _matches(pattern, layer):
                if isinstance(options, Mapping) and not pattern.startswith(_EXCLUDED):
                    yield options
                break


def _is_target(group: object, layer: str) -> bool:
    """Return whether a group of compressed-tensors is about a layer by name; others are about classes of layers."""
    targets = group.get("targets") if isinstance(group, Mapping) else None
    for target in targets if isinstance(targets, list) else ():
        if isinstance(target, str) and (target == layer or (target.startswith(_REGEX) and _matches(target[3:], layer))):
            return True
    return False


def _matches(pattern: str, layer: str) -> bool:
    """Return whether a pattern is about a layer: a name, the end of one, or a regular expression, maybe after ``+:``."""
    expression = pattern[2:] if pattern[:2] in ("+:", _EXCLUDED) else pattern
    if expression == layer or layer.endswith(f".{expression}"):
        return True
    if (
        len(expression) > _LONGEST
        or expression.count("*") + expression.count("+") > _MOST_REPEATS
        or _NESTED.search(expression)
    ):
        return False
    try:
        return bool(re.match(expression, layer))
    except re.error:
        return False
