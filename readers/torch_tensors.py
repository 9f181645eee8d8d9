"""Tensors of a container as torch tensors."""

from __future__ import annotations

import numpy as np
import torch

from qformat.codecs.layout import Chunk
from qformat.dtypes import DTYPES, DType
from qformat.parallel import for_each
from qformat.readers.decoder import TensorDecoder

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
_FLOATS = {name: TORCH_DTYPES[name] for name in ("f16", "bf16", "f32", "f64")}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS.values()} | _FLOATS


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a user gives, also by its name; raise `TypeError` if floating tensors cannot be given as it."""
    wanted = _NAMES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    found = wanted if wanted in _FLOATS.values() else None
    if dtype is not None and found is None:
        raise TypeError(f"dtype {dtype} is not one of float16, bfloat16, float32, float64")
    return found


def target_of(decoder: TensorDecoder, dtype: torch.dtype | None) -> DType:
    """Return the dtype that `decode` gives."""
    source = DTYPES[decoder.record.dtype]
    target = _BY_TORCH[dtype] if source.floating and dtype in _BY_TORCH else source
    return target if target.name in TORCH_DTYPES else DTYPES["f32"]


def decode(decoder: TensorDecoder, dtype: torch.dtype | None, jobs: int) -> torch.Tensor:
    """Return a tensor in `dtype` if it is floating, else in the dtype of the source.

    Raises
    ------
    FormatError
        If it is damaged.
    SourceError
        If one of its values is too large for the dtype.
    """
    target = target_of(decoder, dtype)
    tensor = torch.empty(decoder.matrix.elements, dtype=TORCH_DTYPES[target.name], device="cpu")
    if target is decoder.decoded or target.size > 1:
        flat = tensor.view(torch.uint8).numpy().view(target.storage) if tensor.numel() else np.empty(0, target.storage)
        decoder.decode_all(flat, target, jobs)
    else:  # a float8 source that was stored as something else: torch rounds it
        _ = decoder.segments  # compares digests, also those of a tensor without elements

        def work(chunk: Chunk) -> None:
            values = torch.from_numpy(decoder.decode(chunk).cast(DTYPES["f32"]).reshape(-1))
            rounded = values.to(tensor.dtype)
            if not bool((rounded.float().isfinite() | ~values.isfinite()).all()):
                raise decoder.too_large(target)
            tensor[chunk.elements(decoder.matrix)] = rounded

        for_each(work, decoder.chunks(), jobs)
    return tensor.reshape(decoder.record.shape)
