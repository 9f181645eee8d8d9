"""Find codecs by id or by a record of the index, and encoders by type string."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import qformat.codecs
from qformat.codecs.base import Codec, Encoder
from qformat.codecs.layout import CHUNK_DENSITY, Chunks, Matrix
from qformat.dtypes import DTYPES, F32
from qformat.errors import FormatError, TypeSpecError
from qformat.records import TensorRecord

_codecs: dict[str, type[Codec]] = {}
_encoders: dict[str, type[Encoder]] = {}

# Other names of types, without their punctuation; and types by bits of a code
_OTHER_NAMES = {"fp16": "f16", "float16": "f16", "half": "f16", "bfloat16": "bf16", "fp32": "f32", "float32": "f32", "float": "f32",
                "fp64": "f64", "float64": "f64", "double": "f64", "nf4": "lut", "zstd": "lossless"}  # fmt: skip
_BY_BITS = {1: "ternary", 2: "affine:bits=2", 3: "affine:bits=3", 4: "q4_0", 5: "q5_0", 6: "q8_0", 7: "q8_0", 8: "q8_0"}
_C = TypeVar("_C", bound=type[Codec] | type[Encoder])


def register(class_: _C) -> _C:
    """Make a codec, an encoder, or a class that is both known under its id, for ever; raise `ValueError` if the id is taken."""
    kinds: tuple[tuple[type, dict[str, Any]], ...] = ((Codec, _codecs), (Encoder, _encoders))
    for table in (table for kind, table in kinds if issubclass(class_, kind)):
        if class_.id in table:
            raise ValueError(f"codec id {class_.id!r} is already taken by {table[class_.id].__name__}")
        table[class_.id] = class_
    return class_


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(qformat.codecs.__path__):
        import_module(f"qformat.codecs.{module.name}")


def codecs() -> dict[str, type[Codec]]:
    """Return every codec by its id."""
    _import_all()
    return dict(_codecs)


def encoders() -> dict[str, type[Encoder]]:
    """Return every encoder by its id."""
    _import_all()
    return dict(_encoders)


def types_for_weights() -> dict[str, type[Encoder]]:
    """Return every encoder that accepts float32, by its id."""
    return {name: encoder for name, encoder in encoders().items() if encoder().accepts(F32)}


def parameters(encoder: type[Encoder]) -> Sequence[Field[Any]]:
    """Return the fields of an encoder that a type string may set."""
    return [field for field in fields(encoder) if not field.metadata.get("copied")]  # type: ignore[arg-type]


def parse_type(text: str) -> Encoder:
    """Return the encoder that a type string ``id`` or ``id:key=value,key=value`` describes.

    Raises
    ------
    TypeSpecError
        If there is no such encoder or parameter, or a value is not allowed.
    """
    id_, colon, settings = text.partition(":")
    encoder = _lookup(id_, text)
    values: dict[str, Any] = {}
    hints = get_type_hints(encoder)
    allowed = [field.name for field in parameters(encoder)]
    for item in settings.split(",") if colon else []:
        key, equals, value = item.partition("=")
        if key not in allowed:
            known = f"it knows {', '.join(allowed)}" if allowed else "it has none"
            raise TypeSpecError(f"type {text!r}: {id_} has no parameter {key!r}; {known}")
        if not equals or key in values:
            raise TypeSpecError(f"type {text!r}: give {key} once, as {key}=VALUE")
        values[key] = _parse_value(text, key, value, hints[key])
    try:
        return encoder(**values)
    except ValueError as error:
        raise TypeSpecError(f"type {text!r}: {error}") from None


def _lookup(id_: str, text: str) -> type[Encoder]:
    encoder = encoders().get(id_)
    if encoder is not None:
        return encoder
    known = id_ in codecs()
    cause = f"{id_} holds only tensors that are quantized already" if known else f"there is no codec {id_!r}"
    near = _nearest(id_)
    hint = f"did you mean {near}? " if near else ""
    raise TypeSpecError(
        f"type {text!r}: {cause}; {hint}the types for weights are {', '.join(sorted(types_for_weights()))}"
    )


def _nearest(id_: str) -> str:
    """Return the type that is meant by a misspelt one, by another name of a float, or by a type that only llama.cpp makes."""
    lower = id_.lower()
    types = types_for_weights()
    plain = re.sub(r"[^a-z0-9]", "", lower)
    for name in types:
        if re.sub(r"[^a-z0-9]", "", name) == plain:
            return name
    if plain in _OTHER_NAMES:
        return _OTHER_NAMES[plain]
    if match := re.fullmatch(r"(?:i?q|tq|int)([1-8])(?:_.*|)", lower):  # q4_K_M, iq3_xxs, int8
        return _BY_BITS[int(match[1])]
    return next(iter(get_close_matches(lower, types, 1)), "")


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
    matrix = Matrix.of(record.shape)
    expected = codec.segments(matrix)
    found = tuple((segment.name, segment.length) for segment in record.segments)
    if [name for name, _ in expected] != [name for name, _ in found] or any(
        length not in (None, actual) for (_, length), (_, actual) in zip(expected, found, strict=True)
    ):
        raise _wrong_segments(codec, expected, found, where)
    # of a variable length, the first one bounds the elements: see CHUNK_DENSITY
    first = next((actual for (_, length), (_, actual) in zip(expected, found, strict=True) if length is None), None)
    if first is not None and (record.elements > CHUNK_DENSITY * first or (first and not record.elements)):
        raise _wrong_segments(codec, expected, found, where)
    _check_layers(record, codec, where)
    return codec


def _wrong_segments(codec: Codec, expected: Any, found: Any, where: str) -> FormatError:
    return FormatError(
        f"{where}: {codec.id} needs segments {expected} for this shape, found {len(found)}: {str(found)[:200]}"
    )


def _check_layers(record: TensorRecord, codec: Codec, where: str) -> None:
    """Check that a range and the errors of layers are recorded exactly if there are layers."""
    layout = codec.layout(Matrix.of(record.shape))
    layers = {part.name for part in layout if isinstance(part, Chunks) and part.layer}
    if bool(layers) != (record.range is not None):
        raise FormatError(f"{where}: a range is recorded where none can be, or missing")
    errors = [segment.error for segment in record.segments if segment.error]
    nothing = record.nbytes == 0 and not record.range and not any(e.rmse or e.maximum or e.mean for e in errors)
    if layers and not record.elements and not nothing:
        raise FormatError(f"{where}: it has no elements, but segments, errors or a range")
    for segment in record.segments:
        if (segment.error is not None) != (segment.name in layers):
            raise FormatError(
                f"{where}: an error of segment {segment.name!r} is recorded where none can be, or missing"
            )
    if record.error is not None and layers:
        last = record.layers[-1].error
        if (record.error.rmse, record.error.maximum) != (last.rmse, last.maximum):
            raise FormatError(f"{where}: its error is not that of its last layer")


def _is_a(kind: Any, value: object) -> bool:
    """Return whether a parameter is of a type; 1 is not True."""
    if get_origin(kind) is Union:
        return any(_is_a(choice, value) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    return type(value) is kind


def _from_params(codec: type[Codec], record: TensorRecord, where: str) -> Codec:
    known = {field.name: field for field in fields(codec) if not field.metadata.get("option")}
    hints = get_type_hints(codec)
    needed = {name for name, field in known.items() if not field.metadata.get("optional")}
    if not needed <= set(record.params) <= set(known):
        names = sorted(needed - set(record.params) | set(record.params) - set(known))
        raise FormatError(f"{where}: codec {codec.id}: parameter {names[0][:40]!r} is unknown or missing")
    for key, value in record.params.items():
        kind = hints[key]
        left_out = known[key].metadata.get("optional") and value == known[key].default
        if not _is_a(kind, value) or left_out:
            raise FormatError(f"{where}: codec {codec.id}: parameter {key} has an impossible value")
    try:
        return codec(**record.params)
    except ValueError as error:
        raise FormatError(f"{where}: codec {codec.id}: {error}") from None
