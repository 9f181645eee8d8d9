"""Find what the files of a checkpoint say about quantization, and where they say it: in any of them, at any depth.

Importers take the statements as claims about the tensors; exporters remove them once the tensors are plain numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

#: the file name of statements in the headers of files of weights
HEADER = "the header"

# Names of files that may hold statements among other things, and of files that hold nothing else
_MIXED = ("config.json", "params.json", "model_index.json", "generation_config.json")
_ALONE = ("*quant*.json", "*qmap*.json", "qconfig.json", "bitblas_config.json")
#: what servers are asked for, which cannot be searched
USUAL_FILES = (
    "config.json",
    "params.json",
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quant_model_description.json",
    "quanto_qmap.json",
)

# Keys of objects, and of plain values
_OBJECTS = re.compile(
    r"(hf_|bnb_|mlx_|weight_)?(quantization|quantize|quant|quantized|compression)(_config|_args|_params|_settings|_scheme)?|qconfig"
)
_VALUES = re.compile(
    r"quantization_bits?|quant_bits?|w_?bits?|weight_bits|load_in_(8|4)bit|load_in_low_bit|(\w+_)?low_bit|quantized|is_quantized"
    r"|quant_(method|algo|type|mode_name)|quantization(_method|_type|_scheme|_format)?|quantize(_type)?|qformat_weight"
    r"|weight_quant\w*|pre_quantized"
)
_NEUTRAL = (
    "",
    "none",
    "null",
    "false",
    "no",
    "0",
    "fp32",
    "fp16",
    "f32",
    "f16",
    "bf16",
    "float32",
    "float16",
    "bfloat16",
)
# Headers name the classes of torchao and of quanto, and ComfyUI's and nunchaku's layouts
_HEADER = re.compile(r".*quant.*|tensor_names|low_bit|bits|w_?bits|group_?size")
_HEADER_CLASS = re.compile(r'"_type"|"quant_\w+"|"quantization\w*"')
_DEPTH = 12


@dataclass(frozen=True)
class Statement:
    """An object about quantization.

    Attributes
    ----------
    file
        The name of the file, `HEADER` for the metadata of files of weights.
    path
        The keys that lead to the object, or to the value; empty if the whole file is about quantization.
    content
        The object; a plain value with its key.
    """

    file: str
    path: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def scope(self) -> str:
        """The part of a composite model that this is about, such as ``thinker`` of ``thinker_config``; empty for all of it."""
        return next((key.removesuffix("_config") for key in reversed(self.path[:-1]) if key.endswith("_config")), "")


def may_state(name: str) -> bool:
    """Return whether a file of this name may say something about quantization."""
    return name in _MIXED or is_alone(name)


def is_alone(name: str) -> bool:
    """Return whether a file of this name is about quantization as a whole."""
    return any(fnmatchcase(name, pattern) for pattern in _ALONE)


def find(configs: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str] | None = None) -> list[Statement]:
    """Return the statements in configuration files by name, given as JSON objects, and in the metadata of headers."""
    found = []
    for name in sorted(configs, key=lambda name: (not is_alone(name), name)):
        if is_alone(name):
            content = configs[name]
            inner = content.get("quantization")  # of ModelOpt
            if content:
                found.append(Statement(name, (), {**content, **inner} if isinstance(inner, Mapping) else content))
        elif name in _MIXED:
            found += [Statement(name, path, content) for path, content in _within(configs[name], ())]
    return [*found, *_in_header(metadata or {})]


def without(content: Mapping[str, Any], statements: Iterable[Statement]) -> dict[str, Any]:
    """Return the content of a file without some statements in it."""
    rest = deepcopy(dict(content))
    for statement in statements:
        inner: Any = rest
        for key in statement.path[:-1]:
            inner = inner[key]
        del inner[statement.path[-1]]
    return rest


def _within(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for key, value in content.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            if _OBJECTS.fullmatch(key):
                if value:
                    yield here, value
            elif len(here) < _DEPTH:
                yield from _within(value, here)
        elif _VALUES.fullmatch(key) and _says_something(value):
            yield here, {key: value}


def _says_something(value: object) -> bool:
    """Return whether a value is not one that means that nothing is quantized."""
    if isinstance(value, str):
        return value.lower() not in _NEUTRAL
    return isinstance(value, (bool, int, float)) and 0 < value < 16  # more bits are those of plain numbers


def _in_header(metadata: Mapping[str, str]) -> Iterator[Statement]:
    for key, text in sorted(metadata.items()):
        says = _HEADER.fullmatch(key.lower()) and text.lower() not in _NEUTRAL
        if not says and not _HEADER_CLASS.search(text):
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        yield Statement(HEADER, (key,), value if isinstance(value, dict) else {key: value})
