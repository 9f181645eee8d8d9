"""Statements of configuration files about the quantization of a checkpoint, which are not trusted but compared with its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qformat.converters.quantized.layer_options import PER_LAYER, for_layer
from qformat.converters.quantized.statements import Statement, find
from qformat.errors import SourceError

# keys of options for single layers
_PER_LAYER = PER_LAYER
_METHOD = ("quant_method", "method")
#: keys of the labels of layouts that pack codes into words
LABELS = ("checkpoint_format", "format", "packing_format", "version")


@dataclass(frozen=True)
class Claim:
    """A value with its file and key."""

    where: str
    key: str
    value: Any

    def __str__(self) -> str:
        value = repr(self.value)[:60] if isinstance(self.value, (str, int, float)) else f"a {type(self.value).__name__}"
        return f"{self.where} says {self.key} {value}"


@dataclass(frozen=True)
class Claims:
    """All claims about a checkpoint, or about one of its layers.

    Attributes
    ----------
    statements
        What the files say.
    gptq_format
        The user's claim of how GPTQ's zero points are stored.
    metadata
        The strings in the headers of files of weights.
    config
        The model's config.json.
    """

    statements: Sequence[Statement] = ()
    gptq_format: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        configs: Mapping[str, Mapping[str, Any]],
        gptq_format: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Claims:
        """Find the statements in configuration files and headers."""
        return cls(find(configs, metadata), gptq_format, metadata or {}, configs.get("config.json", {}))

    def about(self, layer: str) -> Claims:
        """Return the claims about one layer, given its name: what is said for it alone stands instead of what is said for all."""
        own = [statement for statement in self.statements if _is_part(statement.scope, layer)]
        if not own or len({statement.scope for statement in self.statements}) < 2:
            own = list(self.statements)
        return replace(self, statements=[replace(x, content=for_layer(x.content, layer)) for x in own])

    def all(self, *keys: str) -> Iterator[Claim]:
        """Yield the values of all files under any of some equivalent keys, except null."""
        for statement in self.statements:
            for key in keys:
                if statement.content.get(key) is not None:
                    yield Claim(statement.file, key, statement.content[key])

    def every(self) -> Iterator[Claim]:
        """Yield all values."""
        for statement in self.statements:
            yield from (Claim(statement.file, key, value) for key, value in statement.content.items())

    def get(self, *keys: str) -> Claim | None:
        """Return the value under any of some equivalent keys; raise `SourceError` if files contradict each other."""
        every = list(self.all(*keys))
        for claim in every[1:]:
            if claim.value != every[0].value:
                raise SourceError(f"{every[0]}, but {claim}; correct the one that is wrong")
        return every[0] if every else None

    def text(self, *keys: str) -> str:
        """Return the string under any of some equivalent keys, in lower case, or an empty one."""
        claim = self.get(*keys)
        return claim.value.lower() if claim and isinstance(claim.value, str) else ""

    @property
    def method(self) -> Claim | None:
        """The tool or scheme."""
        return self.get(*_METHOD)

    @property
    def per_layer(self) -> bool:
        """Whether there are options for single layers."""
        return any(claim.value for claim in self.all(*_PER_LAYER))

    def expect(self, name: str, what: str, value: object, *keys: str) -> None:
        """Raise `SourceError` if a file has another value than the one that follows from the shape of a tensor."""
        if self.per_layer:
            return
        for claim in self.all(*keys):
            if claim.value != value or isinstance(claim.value, bool) is not isinstance(value, bool):
                raise contradiction(name, f"{what} {value}", claim)

    def labels(self) -> Iterator[Claim]:
        """Yield the labels of layouts that pack codes into words."""
        yield from self.all(*LABELS)
        for claim in self.all("backend"):  # until AutoRound 0.4
            if isinstance(claim.value, str) and claim.value.startswith("auto_round"):
                yield claim

    def expect_layout(self, name: str, layout: str, methods: Sequence[str], labels: Sequence[str]) -> None:
        """Raise `SourceError` if a file names another method than those of a layout, or another label."""
        for claim in (*self.all(*_METHOD), *self.labels()):
            names = methods if claim.key in _METHOD else labels
            if str(claim.value).lower() not in names:
                raise contradiction(name, f"{layout}'s layout", claim)

    def weights(self) -> list[Mapping[str, Any]]:
        """Return the options for weights of compressed-tensors, for each of its groups of layers."""
        found = []
        for claim in self.all("config_groups"):
            for group in claim.value.values() if isinstance(claim.value, Mapping) else ():
                weights = group.get("weights") if isinstance(group, Mapping) else None
                if isinstance(weights, Mapping):
                    found.append(weights)
        return found


def _is_part(scope: str, layer: str) -> bool:
    """Return whether a layer is in a part of a composite model."""
    return not scope or f".{scope}." in f".{layer}." or f".{scope}_model." in f".{layer}."


def contradiction(name: str, found: str, claim: Claim) -> SourceError:
    """Return the error for a tensor that contradicts a file."""
    return SourceError(f"tensor {name!r}: its shape means {found}, but {claim}; correct the one that is wrong")
