"""What the header of a GGUF file that a container was made from says of its tensors, for exports to other formats."""

from __future__ import annotations

import io

from qformat.converters.exports.outputs import Job
from qformat.converters.sources.gguf import REST, original_shape
from qformat.converters.sources.gguf_file import parse
from qformat.dtypes import DTYPES
from qformat.errors import SourceError


def shapes_before_gguf(job: Job) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that were reshaped to fit GGUF; nothing if the container was not made from a GGUF file.

    Raises `SourceError` if a tensor is of a type that is not known.
    """
    if all(asset.name != REST for asset in job.container.index.assets):
        return {}
    rest = job.container.asset(REST)
    header = parse(io.BytesIO(rest), len(rest), f"{job.container.path}: asset {REST!r}")
    for tensor in job.tensors.values():
        if tensor.dtype is DTYPES["u8"]:  # which GGUF does not have
            raise SourceError(
                f"tensor {tensor.name!r} is of a GGUF type that is not known here, and cannot be decoded; use --to gguf"
            )
    return {info.name: shape for info in header.tensors if (shape := original_shape(header, info)) != info.shape}
