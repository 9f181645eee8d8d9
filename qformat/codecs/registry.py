"""Find codecs: by id, by type string, by a record of the index."""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import qformat.codecs
from qformat.codecs.base import CHUNK_DENSITY, Codec, Matrix
from qformat.dtypes import DTYPES, F32
from qformat.errors import FormatError, TypeSpecError
from qformat.records import TensorRecord

_codecs: dict[str, type[Codec]] = {}
_C = TypeVar("_C", bound=type[Codec])


def register(codec: _C) -> _C:
    """Make a codec known under its id, for ever.

    Raises
    ------
    ValueError
        If the id is taken.
    """
    if codec.id in _codecs:
        raise ValueError(f"codec id {codec.id!r} is already taken by {_codecs[codec.id].__name__}")
    _codecs[codec.id] = codec
    return codec


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(qformat.codecs.__path__):
        import_module(f"qformat.codecs.{module.name}")


def codecs() -> dict[str, type[Codec]]:
    """Return every codec by its id."""
    _import_all()
    return dict(_codecs)


def types_for_weights() -> dict[str, type[Codec]]:
    """Return every codec that can be asked for and that takes float32, by its id."""
    return {name: codec for name, codec in codecs().items() if not codec.copied_only and codec().accepts(F32)}


def parse_type(text: str) -> Codec:
    """Return the codec that a type string ``id`` or ``id:key=value,key=value`` describes.

    Raises
    ------
    TypeSpecError
        If there is no such codec or parameter, or a value is not allowed.
    """
    id_, colon, rest = text.partition(":")
    codec = _lookup(id_, text)
    values: dict[str, Any] = {}
    hints = get_type_hints(codec)
    allowed = [field.name for field in fields(codec) if not field.metadata.get("found")]
    for item in rest.split(",") if colon else []:
        key, equals, value = item.partition("=")
        if key not in allowed:
            known = f"it knows {', '.join(allowed)}" if allowed else "it has none"
            raise TypeSpecError(f"type {text!r}: {id_} has no parameter {key!r}; {known}")
        if not equals or key in values:
            raise TypeSpecError(f"type {text!r}: give {key} once, as {key}=VALUE")
        values[key] = _parse_value(text, key, value, hints[key])
    try:
        return codec(**values)
    except ValueError as error:
        raise TypeSpecError(f"type {text!r}: {error}") from None


def _lookup(id_: str, text: str) -> type[Codec]:
    codec = codecs().get(id_)
    if codec is not None and not codec.copied_only:
        return codec
    cause = f"{id_} holds only tensors that are quantized already" if codec else f"there is no codec {id_!r}"
    raise TypeSpecError(f"type {text!r}: {cause}; the types for weights are {', '.join(sorted(types_for_weights()))}")


def _parse_value(text: str, key: str, value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        allowed = {str(choice): choice for choice in get_args(kind)}
        if value not in allowed:
            raise TypeSpecError(f"type {text!r}: {key} may be {' or '.join(allowed)}, not {value!r}")
        return allowed[value]
    words: Any = None
    if get_origin(kind) is Union:  # a number or a word
        words, kind = next(choice for choice in get_args(kind) if get_origin(choice) is Literal), int
        if value in get_args(words):
            return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[value]
        return kind(value)
    except (KeyError, ValueError):
        choices = "true or false" if kind is bool else " or ".join(["a number", *get_args(words)])
        raise TypeSpecError(f"type {text!r}: {key} may be {choices}, not {value!r}") from None


def codec_of(record: TensorRecord) -> Codec:
    """Return the codec of a tensor in a file, after checking everything that its decoder relies on.

    Raises
    ------
    FormatError
        If this version cannot decode the tensor, or its segments are not those that its shape needs.
    """
    where = f"tensor {record.name!r}"
    if record.refusal:
        raise FormatError(record.refusal)
    codec_class = codecs().get(record.codec)
    if codec_class is None:
        raise FormatError(f"{where}: unknown codec {record.codec[:40]!r}: use a newer qformat to read it")
    dtype = DTYPES.get(record.dtype)
    if dtype is None:
        raise FormatError(f"{where}: unknown dtype {record.dtype[:40]!r}: use a newer qformat to read it")
    codec = _from_params(codec_class, record, where)
    if not codec.accepts(dtype):
        raise FormatError(f"{where}: codec {codec.id} cannot hold {dtype.name}")
    if (record.error is None) != codec.is_lossless(dtype):
        raise FormatError(f"{where}: an error is recorded where none can be, or missing")
    expected = codec.segments(Matrix.of(record.shape))
    found = tuple((segment.name, segment.length) for segment in record.segments)
    fits = len(expected) == len(found) and all(
        name == other and length in (None, actual)
        for (name, length), (other, actual) in zip(expected, found, strict=True)
    )
    if fits and not codec.sized:
        first = found[1][1] if codec.layered else found[0][1]
        fits = record.elements <= CHUNK_DENSITY * first and (record.elements > 0 or first == 0)
    if not fits:
        raise FormatError(
            f"{where}: {codec.id} needs segments {expected} for this shape, found {len(found)}: {str(found)[:200]}"
        )
    _check_layers(record, codec, where)
    return codec


def _check_layers(record: TensorRecord, codec: Codec, where: str) -> None:
    """Check that errors of layers, and the range they are compared with, are there exactly if there are layers."""
    if codec.layered != (record.range is not None):
        raise FormatError(f"{where}: a range is recorded where none can be, or missing")
    layers = record.params["layers"] if codec.layered else 0
    errors = [segment.error for segment in record.segments if segment.error]
    nothing = record.nbytes == 0 and not record.range and not any(e.rmse or e.maximum or e.mean for e in errors)
    if codec.layered and not record.elements and not nothing:
        raise FormatError(f"{where}: it has no elements, but segments, errors or a range")
    for number, segment in enumerate(record.segments):
        if (segment.error is not None) != (0 < number <= int(layers)):
            raise FormatError(
                f"{where}: an error of segment {segment.name!r} is recorded where none can be, or missing"
            )
    if record.error is not None and layers:
        last = record.layers[-1].error
        if (record.error.rmse, record.error.maximum) != (last.rmse, last.maximum):
            raise FormatError(f"{where}: its error is not that of its last layer")


def _is_a(kind: Any, value: object) -> bool:
    """Return whether a parameter has a type, where 1 is no True."""
    if get_origin(kind) is Union:
        return any(_is_a(choice, value) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    return type(value) is kind


def _from_params(codec: type[Codec], record: TensorRecord, where: str) -> Codec:
    known = {field.name: field for field in fields(codec) if not field.metadata.get("encoder")}
    hints = get_type_hints(codec)
    needed = {name for name, field in known.items() if not field.metadata.get("optional")}
    if not needed <= set(record.params) <= set(known):
        names = sorted(needed - set(record.params) | set(record.params) - set(known))
        raise FormatError(f"{where}: codec {codec.id}: parameter {names[0][:40]!r} is unknown or missing")
    for key, value in record.params.items():
        kind = hints[key]
        metadata = known[key].metadata
        left_out = (metadata.get("optional") or metadata.get("found")) and value == known[key].default
        if not _is_a(kind, value) or left_out:
            raise FormatError(f"{where}: codec {codec.id}: parameter {key} has an impossible value")
    try:
        return codec(**record.params)
    except ValueError as error:
        raise FormatError(f"{where}: codec {codec.id}: {error}") from None
