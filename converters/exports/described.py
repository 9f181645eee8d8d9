"""The files that describe a Hugging Face model, and the refusal of one that GGUF cannot describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from qformat.errors import SourceError

JsonObject = dict[str, Any]

CONFIG = "config.json"


class Description:
    """The files of a model beside its weights, by name; `label` names the model in messages."""

    def __init__(self, assets: Mapping[str, bytes], label: str) -> None:
        self.assets = assets
        self.label = label
        self.config = self.json(CONFIG) or self.refuse(f"there is no {CONFIG}")

    def json(self, name: str) -> JsonObject | None:
        """Return the object in a file, or None if there is no such file."""
        if name not in self.assets:
            return None
        try:
            value = json.loads(self.assets[name])
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self.refuse(f"its {name} is not valid")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of config.json."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 1 << 31:
            self.refuse(f"{key} of {CONFIG} is {value!r}, and not a positive integer")
        return value

    def real(self, key: str, values: JsonObject) -> float:
        """Return a positive number of config.json, or of an object in it."""
        value = values.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
            self.refuse(f"{key} of {CONFIG} is {value!r}, and not a positive number")
        return float(value)  # type: ignore[arg-type]

    def refuse(self, cause: str) -> NoReturn:
        """Raise `SourceError`."""
        raise SourceError(
            f"{self.label}: cannot become a GGUF file: {cause}; export it --to hf and use llama.cpp's convert_hf_to_gguf.py"
        )
