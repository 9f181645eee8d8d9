"""Read a container file into torch tensors."""

from __future__ import annotations

import os
from typing import BinaryIO

import torch

from qformat.container.reader import ContainerReader
from qformat.errors import FormatError
from qformat.parallel import default_jobs
from qformat.quality import Quality
from qformat.readers.decoder import Decoders
from qformat.readers.torch_model import Placement, load_model
from qformat.readers.torch_tensors import TORCH_DTYPES, decode, parse_dtype, target_of


def load_file(
    path: str | bytes | os.PathLike[str] | BinaryIO,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    quality: float | str | Quality | None = None,
    verify: bool = True,
    jobs: int | None = None,
    root: str | None = None,
    max_bytes: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return all tensors of a file.

    Parameters
    ----------
    path
        The file; or an open binary file object that can seek (one of ``fsspec``, say), of which no more is read than is needed.
    device
        Device of the tensors.
    dtype
        float16, bfloat16, float32 or float64 for the floating tensors, as a dtype or by name; None is the dtype that each had in
        the source.
    quality
        How much to read of layered tensors: bits for each weight, a bound for an error, or ``"lossless"``, as for `safe_open`.
    verify
        Compare all bytes with their SHA-256.
    jobs
        Threads that decode; None is one for each processor.
    root
        The root that the file must have: that of a file which was verified before, as for `safe_open`.
    max_bytes
        The most bytes that all tensors may take in memory. None is 256 MiB, or 256 times the bytes that they have in the file if
        that is more: a small file cannot ask for all memory.

    Returns
    -------
    dict
        Tensors by name.

    Raises
    ------
    FormatError
        If the file is damaged, or needs a newer version, or its tensors take too much memory.
    IntegrityError
        If its root is not `root`, or it is changed meanwhile.
    QualityError
        If the quality is malformed, the file has no layered tensors, or a tensor's layers do not reach it.
    SourceError
        If a value is too large for the dtype.
    TypeError
        If `dtype` is not one of those above.
    """
    wanted = parse_dtype(dtype)
    chosen = Quality.parse(quality)
    jobs = jobs or default_jobs()
    with ContainerReader(path, root=root) as container:
        decoders = Decoders(container, chosen, verify=verify, max_bytes=max_bytes)
        every = list(decoders)
        nbytes = sum(decoder.matrix.elements * target_of(decoder, wanted).size for decoder in every)
        decoders.check_amount("its tensors", nbytes, sum(decoder.record.nbytes for decoder in every))
        return {decoder.record.name: decode(decoder, wanted, jobs).to(device) for decoder in every}


__all__ = ["TORCH_DTYPES", "FormatError", "Placement", "load_file", "load_model"]
