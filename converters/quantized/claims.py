"""What configuration files say of how a checkpoint was quantized: a witness beside its tensors, and not a trusted one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qformat.errors import SourceError

_ALONE = ("quantize_config.json", "quantization_config.json")
_WITHIN = ("quantization_config", "compression_config")  # in config.json
# in these, layers may differ from what is said of the whole
_PER_LAYER = ("dynamic", "extra_config")


@dataclass(frozen=True)
class Claim:
    """A value, and the file and the key that it stands under."""

    where: str
    key: str
    value: Any

    def __str__(self) -> str:
        value = repr(self.value)[:60] if isinstance(self.value, (str, int, float)) else f"a {type(self.value).__name__}"
        return f"{self.where} says {self.key} {value}"


@dataclass(frozen=True)
class Claims:
    """All that the files beside a checkpoint say of its quantization.

    Parameters
    ----------
    objects
        (file, JSON object).
    """

    objects: Sequence[tuple[str, Mapping[str, Any]]] = ()

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]]) -> Claims:
        """Find the objects in parsed files."""
        found: list[tuple[str, Any]] = [(name, configs[name]) for name in _ALONE if name in configs]
        config = configs.get("config.json", {})
        nested = [config, config.get("text_config")]
        found += [("config.json", outer.get(key)) for outer in nested if isinstance(outer, Mapping) for key in _WITHIN]
        return cls([(where, content) for where, content in found if isinstance(content, Mapping)])

    def all(self, *keys: str) -> Iterator[Claim]:
        """Yield what every file says under some keys that mean the same, but null."""
        for where, content in self.objects:
            for key in keys:
                if content.get(key) is not None:
                    yield Claim(where, key, content[key])

    def get(self, *keys: str) -> Claim | None:
        """Return what the files say under some keys that mean the same, if any does.

        Raises
        ------
        SourceError
            If they say different things.
        """
        every = list(self.all(*keys))
        for claim in every[1:]:
            if claim.value != every[0].value:
                raise SourceError(f"{every[0]}, but {claim}; correct the one that is wrong")
        return every[0] if every else None

    def text(self, *keys: str) -> str:
        """Return a string that the files say under some keys, in lower case, or an empty one."""
        claim = self.get(*keys)
        return claim.value.lower() if claim and isinstance(claim.value, str) else ""

    @property
    def method(self) -> Claim | None:
        """The tool or scheme."""
        return self.get("quant_method", "method")

    @property
    def per_layer(self) -> bool:
        """Whether single layers may differ from what is said of all."""
        return any(claim.value for claim in self.all(*_PER_LAYER))

    def expect(self, name: str, what: str, value: object, *keys: str) -> None:
        """Raise `SourceError` if a file says another value than the one that a tensor's shape gives."""
        if self.per_layer:
            return
        for claim in self.all(*keys):
            if claim.value != value or isinstance(claim.value, bool) is not isinstance(value, bool):
                raise contradiction(name, f"{what} {value}", claim)

    def weights(self) -> list[Mapping[str, Any]]:
        """Return what compressed-tensors says of weights, for each of its groups of layers."""
        found = []
        for claim in self.all("config_groups"):
            for group in claim.value.values() if isinstance(claim.value, Mapping) else ():
                weights = group.get("weights") if isinstance(group, Mapping) else None
                if isinstance(weights, Mapping):
                    found.append(weights)
        return found


def contradiction(name: str, found: str, claim: Claim) -> SourceError:
    """Return the error of a tensor that is not as a file says."""
    return SourceError(f"tensor {name!r}: its shape means {found}, but {claim}; correct the one that is wrong")
