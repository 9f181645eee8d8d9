"""Export to GGUF: the original file, byte for byte or with other tensor types, or a new one from a Hugging Face model."""

from __future__ import annotations

import io
import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qformat.codecs.base import Codec
from qformat.codecs.blocks import plain
from qformat.codecs.ggml import Ggml
from qformat.codecs.raw import Raw, raw
from qformat.container.partial import PartialFile
from qformat.converters.arrays import ArrayTensor
from qformat.converters.exports.hf_to_gguf import Model
from qformat.converters.exports.outputs import Export, Job, Output
from qformat.converters.exports.quantization import stated
from qformat.converters.exports.rotated import RotatedOutput, check_heads
from qformat.converters.llama_cpp import is_quantizable
from qformat.converters.sources.container import ContainerTensor
from qformat.converters.sources.gguf import REST, original_shape
from qformat.converters.sources.gguf_file import (
    TYPE_NUMBERS,
    TYPES,
    UINT32,
    Header,
    align,
    build,
    check_layout,
    parse,
    type_number,
    unknown_type,
)
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES, F16, F32, Elements
from qformat.errors import SourceError

_FILE_TYPE = "general.file_type"
# general.file_type by the type of most weights
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15, "q5_k": 17,
    "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30,
    "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38, "nvfp4": 39, "q1_0": 40,
}  # fmt: skip
_GUESSED = 1024
_QUANTIZATION_VERSION = 2
_MAX_NAME_BYTES = 63


def export_gguf(job: Job, output: Path) -> Export:
    """Write a GGUF file. Tensors of types that GGUF has are copied; the others become what `Job.dtype` says, float16 by default."""
    path = job.container.path
    if any(asset.name == REST for asset in job.container.index.assets):
        done = _again(job, output, f"{path}: asset {REST!r}")
        return replace(done, warnings=[*done.warnings, *_too_long(job.tensors)])
    header, outputs, warnings = _anew(job, str(path))
    warnings += _unchanged(outputs, job.dtype)
    return Export(output, {output.name: _write(job, output, header, outputs)}, outputs, warnings)


def _again(job: Job, output: Path, label: str) -> Export:
    """Write the file that the container was made from, or one with other tensor types."""
    rest = job.container.asset(REST)
    others = [asset.name for asset in job.container.index.assets if asset.name != REST]
    header = _sized(parse(io.BytesIO(rest), len(rest), label), job)
    size = len(rest) + sum(tensor.nbytes for tensor in header.tensors)
    check_layout(header, size, label)
    outputs = _outputs(job, header, label)
    warnings = _unchanged(outputs, job.dtype)
    if others:
        warnings.append(f"left out, as a GGUF file holds none: {others[0]}{and_more(others)}")
    before = [type_number(tensor.type.name) for tensor in header.tensors]
    types = [
        number if info.is_opaque else TYPE_NUMBERS[type_name(output.codec)]
        for output, info, number in zip(outputs, header.tensors, before, strict=True)
    ]
    if types != before:
        size = _write(job, output, retyped(header, types), outputs)
        return Export(output, {output.name: size}, outputs, warnings)
    with PartialFile(job.folder / output.name, output) as file:
        _write_tensors(job, file, header, outputs)
        at = len(rest)
        for start, stop in reversed([*header.gaps(size)]):
            at -= stop - start
            file.write(rest[at : at + stop - start], start)
    return Export(output, {output.name: size}, outputs, warnings)


def _write(job: Job, output: Path, header: Header, outputs: Sequence[Output]) -> int:
    """Write a file with zeros between the tensors and after the last, and return its length."""
    end = max((tensor.stop for tensor in header.tensors), default=header.data_start)
    size = align(end, header.alignment)
    with PartialFile(job.folder / output.name, output) as file:
        _write_tensors(job, file, header, outputs)
        if size > max(end, len(header.data)):
            file.write(b"\0", size - 1)  # what is not written in between is zero
        file.write(header.data, 0)
    return size


def _write_tensors(job: Job, file: PartialFile, header: Header, outputs: Sequence[Output]) -> None:
    job.write(file, [(output, info.offset) for output, info in zip(outputs, header.tensors, strict=True)])


def _anew(job: Job, label: str) -> tuple[Header, list[Output], list[str]]:
    """Return the header of a new file from a Hugging Face model, its tensors, and warnings."""
    assets = {asset.name: job.container.asset(asset.name) for asset in job.container.index.assets}
    # what another tool has quantized has to be plain numbers now
    true = stated(job.container.path, assets, job.container.index.metadata, job.tensors.values())
    model = Model(true.assets, label)
    named: dict[str, Output] = {}
    frequencies = model.frequencies()
    if frequencies is not None:
        named["rope_freqs.weight"] = Output(ArrayTensor("rope_freqs.weight", Elements(F32, frequencies)), raw(F32))
    placed = model.places(job.tensors)
    for name, place in placed.places.items():
        tensor = job.tensors[name]
        codec = codec_for(tensor, job.dtype, place.name) if len(tensor.shape) > 1 else raw(F32)
        if place.heads:
            check_heads(tensor, place.heads)
        named[place.name] = RotatedOutput(tensor, codec, place.heads) if place.heads else Output(tensor, codec)
    values, warnings = model.values(named["token_embd.weight"].shape[0])
    entries = [(name, type_name(tensor.codec), tensor.shape) for name, tensor in named.items()]
    most = _most((kind, math.prod(shape)) for _, kind, shape in entries)
    values[_FILE_TYPE] = _FILE_TYPES.get(most, _GUESSED)
    values["general.quantization_version"] = _QUANTIZATION_VERSION
    data = build(values, entries)
    return parse(io.BytesIO(data), len(data), label), list(named.values()), [*placed.warnings, *warnings]


def _outputs(job: Job, header: Header, label: str) -> list[Output]:
    """Return the tensors to write, in the order of the header."""
    listed = {
        tensor.name: {tensor.shape, original_shape(header, tensor)} for tensor in header.tensors if not tensor.is_opaque
    }
    listed |= {tensor.name: {(tensor.nbytes,)} for tensor in header.tensors if tensor.is_opaque}
    there = {name: tensor.shape for name, tensor in job.tensors.items()}
    for name in sorted({*listed, *there}):
        if there.get(name) not in listed.get(name, ()):
            raise SourceError(
                f"{label} does not fit the tensors: {name!r} is missing on one side, or has another shape"
            )
    return [
        Output(
            job.tensors[tensor.name],
            raw(DTYPES["u8"]) if tensor.is_opaque else codec_for(job.tensors[tensor.name], job.dtype, tensor.name),
        )
        for tensor in header.tensors
    ]


def _sized(header: Header, job: Job) -> Header:
    """Return a header in which tensors that the container has as bytes are of unknown types, and as long as those."""
    tensors = []
    for info in header.tensors:
        there = job.tensors.get(info.name)
        if there is not None and there.dtype is DTYPES["u8"]:  # which GGUF does not have
            number = type_number(info.type.name)
            info = replace(info, type=unknown_type(number), size=there.shape[0] if there.shape else 0)  # noqa: PLW2901
        tensors.append(info)
    return replace(header, tensors=tuple(tensors))


def _unchanged(outputs: Iterable[Output], dtype: Codec | None) -> list[str]:
    """Return a warning if tensors keep codes that they have, although another type is asked for."""
    kept = [output for output in outputs if _keeps_codes(output, dtype)]
    if not kept:
        return []
    name, type_ = kept[0].name, kept[0].codec
    return [
        f"tensor {name!r}{and_more(kept)}: stays {type_}, since --dtype does not encode the codes of a GGUF type again"
    ]


def _too_long(names: Iterable[str]) -> list[str]:
    """Return a warning if llama.cpp does not read a file with these names."""
    found = [name for name in names if len(name.encode()) > _MAX_NAME_BYTES]
    if not found:
        return []
    return [f"tensor {found[0]!r}{and_more(found)}: llama.cpp reads no names of more than {_MAX_NAME_BYTES} bytes"]


def _keeps_codes(output: Output, dtype: Codec | None) -> bool:
    codes = output.copied and not isinstance(output.codec, Raw)
    return dtype is not None and codes and type_name(output.codec) != type_name(dtype)


def codec_for(tensor: ContainerTensor, dtype: Codec | None, name: str) -> Codec:
    """Return the type of a tensor in a GGUF file: its own, if GGUF has it, but `dtype` for matrices of plain numbers.

    What llama.cpp's programs read as floats, going by its name there, is left alone by `dtype`, and otherwise of float32.

    Raises `SourceError` if its rows are not a multiple of the blocks of `dtype`.
    """
    quantizable = is_quantizable(name, tensor.shape)
    decoder = tensor.decoder
    own = plain(decoder.codec)
    row = tensor.shape[-1] if tensor.shape else 1
    exact = decoder.record.error is None
    numbers = exact or isinstance(decoder.codec, Raw)  # encoding codes again would lose more
    anew = dtype is not None and numbers and decoder.decoded.floating and quantizable
    if not anew and type_name(own) in TYPE_NUMBERS and row % _block(own) == 0:
        return own
    same = raw(decoder.decoded)
    if not anew and exact and type_name(same) in TYPE_NUMBERS:
        return same
    if not decoder.decoded.floating:
        raise SourceError(f"tensor {tensor.name!r} is of type {own}, which GGUF does not have")
    if not quantizable:
        return raw(F32)
    wanted = dtype or raw(F16)
    if row % _block(wanted):
        raise SourceError(
            f"tensor {tensor.name!r} has rows of {row} elements, not a multiple of the blocks of {wanted}; use --dtype f16"
        )
    return wanted


def type_name(codec: Codec) -> str:
    """Return the GGUF type with the same bytes as a codec, if there is one."""
    return codec.type if isinstance(codec, Ggml) else codec.id


def _block(codec: Codec) -> int:
    return TYPES[TYPE_NUMBERS[type_name(codec)]].block


def retyped(header: Header, numbers: Sequence[int]) -> Header:
    """Return a header with other tensor types and offsets."""
    data = bytearray(header.data)
    offset = header.data_start
    tensors = []
    for tensor, number in zip(header.tensors, numbers, strict=True):
        struct.pack_into("<IQ", data, tensor.at, number, offset - header.data_start)
        type_ = tensor.type if tensor.is_opaque else TYPES[number]
        tensors.append(replace(tensor, type=type_, offset=offset))
        offset = align(tensors[-1].stop, header.alignment)
    before, after = (
        _most((tensor.type.name, tensor.elements) for tensor in every) for every in (header.tensors, tensors)
    )
    value = header.values.get(_FILE_TYPE)
    if value and value.kind == UINT32 and before != after:
        struct.pack_into("<I", data, value.at, _FILE_TYPES.get(after, _GUESSED))
    return Header(bytes(data), header.values, tuple(tensors), header.alignment)


def _most(tensors: Iterable[tuple[str, int]]) -> str:
    """Return the type of most weights."""
    counts: Counter[str] = Counter()
    for name, elements in tensors:
        counts[name] += elements
    return max(counts, key=lambda name: (counts[name], name), default="f32")
