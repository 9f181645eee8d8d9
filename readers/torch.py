"""Read a container file into torch tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from qformat.codecs.layout import Chunk
from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES
from qformat.errors import FormatError, SourceError
from qformat.parallel import default_jobs, for_each
from qformat.quality import Quality
from qformat.readers.decoder import Decoders, TensorDecoder
from qformat.records import TensorRecord

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "u16": torch.uint16,
    "i16": torch.int16,
    "u32": torch.uint32,
    "i32": torch.int32,
    "u64": torch.uint64,
    "i64": torch.int64,
    "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since 2.7
    TORCH_DTYPES["f8_e8m0"] = torch.float8_e8m0fnu
_BY_TORCH = {dtype: DTYPES[name] for name, dtype in TORCH_DTYPES.items()}


def load_file(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quality: float | str | Quality | None = None,
    verify: bool = True,
    jobs: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return all tensors of a file.

    Parameters
    ----------
    path
        The file; or an open binary file object that can seek (one of ``fsspec``, say), of which no more is read than is needed.
    device
        Device of the tensors.
    dtype
        float16, bfloat16, float32 or float64 for the floating tensors; None is the dtype that each had in the source.
    quality
        How much to read of layered tensors: bits for each weight, a bound for an error, or ``"lossless"``, as for `safe_open`.
    verify
        Compare all bytes with their SHA-256.
    jobs
        Threads that decode; None is one for each processor.

    Returns
    -------
    dict
        Tensors by name.

    Raises
    ------
    FormatError
        If the file is damaged, or needs a newer version.
    QualityError
        If the quality is malformed, or a tensor's layers do not reach it.
    TypeError
        If `dtype` is not one of those above.
    """
    _check_dtype(dtype)
    chosen = Quality.parse(quality)
    jobs = jobs or default_jobs()
    with ContainerReader(path) as container:
        decoders = Decoders(container, chosen, verify=verify)
        return {decoder.record.name: _decode(decoder, dtype, jobs).to(device) for decoder in decoders}


def load_model(
    model: torch.nn.Module,
    path: str | os.PathLike[str] | BinaryIO,
    *,
    strict: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quality: float | str | Quality | None = None,
    verify: bool = True,
    jobs: int | None = None,
) -> tuple[list[str], list[str]]:
    """Put a file's tensors into a model, one after the other, in the dtypes that the model has.

    Parameters
    ----------
    model
        The model. Its tensors are overwritten in place, so tied weights stay tied.
    path
        The file, or an open file object, as in `load_file`.
    strict
        Raise if the file lacks a tensor of the model or holds one that the model has not.
    device, dtype
        Move or cast the model first.
    quality, verify, jobs
        As in `load_file`.

    Returns
    -------
    (list of str, list of str)
        Missing names, without those tied to a tensor that the file holds; and unexpected names, without buffers that the model
        computes by itself and leaves out of its state. Both are sorted.

    Raises
    ------
    SourceError
        If model and file do not fit: with `strict`, or if a shape differs, or only one of two tensors is floating.
    QualityError
        If the quality is malformed, or a tensor's layers do not reach it. In both cases the model is unchanged.
    FormatError
        If the file is damaged; some tensors of the model may have been replaced.
    """
    _check_dtype(dtype)
    chosen, jobs = Quality.parse(quality), jobs or default_jobs()
    with ContainerReader(path) as container:
        records = {record.name: record for record in container.tensors}
        own = _tensors(model)
        missing, unexpected = _compare(model, own, records)
        if strict and (missing or unexpected):
            raise _misfit(container, missing, unexpected)
        decoders = Decoders(container, chosen, verify=verify)
        shared = {name: decoders.of(records[name]) for name in sorted(set(own) & set(records))}
        if device is not None or dtype is not None:
            model.to(device=device, dtype=dtype)
            own = _tensors(model)
        with torch.no_grad():
            for name, decoder in shared.items():
                floating = own[name].dtype if own[name].dtype.is_floating_point else None
                own[name].copy_(_decode(decoder, floating, jobs))
    return missing, unexpected


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's state, which may hold other things too."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _compare(
    model: torch.nn.Module, own: dict[str, torch.Tensor], records: dict[str, TensorRecord]
) -> tuple[list[str], list[str]]:
    """Return the missing and the unexpected names; raise `SourceError` for a tensor that does not fit."""
    for name in sorted(set(own) & set(records)):
        if own[name].is_meta:
            raise SourceError(f"model tensor {name!r} is on the meta device; call model.to_empty(device=...) first")
        if tuple(own[name].shape) != records[name].shape:
            raise SourceError(
                f"tensor {name!r}: the model has shape {tuple(own[name].shape)}, the file {records[name].shape}"
            )
        if own[name].is_floating_point() != _is_floating(records[name]):
            raise SourceError(f"tensor {name!r}: the model has {own[name].dtype}, the file {records[name].dtype}")
    loaded = {_place(own[name]) for name in set(own) & set(records) if own[name].numel()}
    missing = sorted(name for name in set(own) - set(records) if _place(own[name]) not in loaded)
    computed = {name for name, _ in model.named_buffers()}  # and left out of its state
    return missing, sorted(set(records) - set(own) - computed)


def _is_floating(record: TensorRecord) -> bool:
    return record.dtype in DTYPES and DTYPES[record.dtype].floating


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what is equal for two tensors exactly if they are tied: the same memory, seen in the same way."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _misfit(container: ContainerReader, missing: list[str], unexpected: list[str]) -> SourceError:
    lists = [_list(what, names) for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    return SourceError(f"{container.path}: does not fit the model: {'; '.join(lists)}")


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"dtype {dtype} is not one of float16, bfloat16, float32, float64")


def _decode(decoder: TensorDecoder, dtype: torch.dtype | None, jobs: int) -> torch.Tensor:
    """Return a tensor in `dtype` if it is floating, else in the dtype of the source."""
    target = DTYPES[decoder.record.dtype]
    if target.floating and dtype in _BY_TORCH:
        target = _BY_TORCH[dtype]
    if target.name not in TORCH_DTYPES:
        target = DTYPES["f32"]
    _ = decoder.segments  # compares digests, also those of a tensor without elements
    tensor = torch.empty(decoder.matrix.elements, dtype=TORCH_DTYPES[target.name])
    if target is decoder.decoded or target.size > 1:
        flat = tensor.view(torch.uint8).numpy().view(target.storage) if tensor.numel() else np.empty(0, target.storage)
        work: Callable[[Chunk], Any] = lambda chunk: decoder.decode_into(flat, target, chunk)  # noqa: E731
    else:  # a float8 source that was stored as something else: torch rounds it

        def work(chunk: Chunk) -> None:
            values = torch.from_numpy(decoder.decode(chunk).cast(DTYPES["f32"]).reshape(-1))
            tensor[chunk.elements(decoder.matrix)] = values.to(tensor.dtype)

    for_each(work, decoder.chunks(), jobs)
    return tensor.reshape(decoder.record.shape)


__all__ = ["TORCH_DTYPES", "FormatError", "load_file", "load_model"]
