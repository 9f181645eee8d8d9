"""Read the tensors of a .safetensors file chunk by chunk, without mapping it into memory.

The format's own library validates the file; since its numpy interface cannot read bfloat16, and only whole tensors, the data are
read here.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qformat.converters.sources.files import FileTensor, SharedFile
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.files import open_regular, reading
from qformat.pipeline.source import Checkpoint, FixedSource, SourceTensor

#: our names of the format's dtypes
DTYPE_NAMES = {
    "BOOL": "bool",
    "F8_E4M3": "f8_e4m3",
    "F8_E5M2": "f8_e5m2",
    "F8_E8M0": "f8_e8m0",
    "BF16": "bf16",
} | {name.upper(): name for name in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f16", "f32", "f64")}

#: the key of the header under which there are strings instead of a tensor
METADATA = "__metadata__"
#: the string of nearly all headers, which exports write by themselves
FORMAT = ("format", "pt")
# the string with the positions of the parts in the tensors
_PARTS = "DCP_SHARDING_INFO"
#: the format's other dtypes, and their bits; bytes of such tensors are stored, for their numbers cannot be used
OPAQUE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}
#: the beginning of the keys of metadata that tell dtype and shape of such a tensor, before its name
OPAQUE = "safetensors.dtype."
_NEVER_WEIGHTS = ("C64",)
# a container's index has at most 64 MiB for everything
_MAX_METADATA = 16 << 20
MAX_HEADER = 100_000_000  # the limit of the library


def is_safetensors(start: bytes) -> bool:
    """Return whether a file that begins so is a .safetensors file."""
    return start[8:9] == b"{"


def open_safetensors(path: Path) -> Checkpoint:
    """Return the tensors of a .safetensors file, with the strings in its header as metadata.

    Raises `SourceError` if it is missing, cut short or damaged.
    """
    header, length = _header(path)
    if _PARTS in header.get(METADATA, {}):
        raise SourceError(
            f"{path}: holds a part of each tensor ({_PARTS} in its header), as PyTorch's HuggingFaceStorageWriter saves them; join "
            "them with torch.distributed.checkpoint's consolidate_safetensors_files, or save with enable_consolidation=True"
        )
    shared = SharedFile(path)
    tensors: list[SourceTensor] = []
    opaque: dict[str, list[str]] = {}
    metadata, dropped = _bounded({key: text for key, text in header.get(METADATA, {}).items() if (key, text) != FORMAT})
    for name, entry in header.items():
        if name == METADATA:
            continue
        begin, end = entry["data_offsets"]
        stored, shape = DTYPE_NAMES.get(entry["dtype"]), tuple(entry["shape"])
        if stored:
            tensors.append(FileTensor(name, DTYPES[stored], shape, shared, 8 + length + begin))
            continue
        tensor = FileTensor(name, DTYPES["u8"], _shape_of_bytes(shape, end - begin), shared, 8 + length + begin)
        because = f"is of dtype {entry['dtype']}, which is stored as bytes"
        tensors.append(tensor if entry["dtype"] in _NEVER_WEIGHTS else FixedSource(tensor, because))
        opaque.setdefault(entry["dtype"], []).append(name)
        metadata[OPAQUE + name] = json.dumps([entry["dtype"], entry["shape"]])
    warnings = [
        f"{path.name}: tensor {names[0]!r}{and_more(names)}: of dtype {dtype}, whose numbers are not known here; stored as bytes"
        for dtype, names in opaque.items()
    ]
    if dropped:
        what = f"metadata {dropped[0][:60]!r}{and_more(dropped)}"
        warnings.append(f"{path.name}: {what} left out, since all together is more than {_MAX_METADATA >> 20} MiB")
    return Checkpoint(tensors, files=[path], metadata=metadata, warnings=warnings)


def _bounded(metadata: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the metadata without its longest strings, if it is too long, and the keys of these."""
    left = sum(len(key) + len(text) for key, text in metadata.items())
    dropped = []
    for key in sorted(metadata, key=lambda key: (-len(metadata[key]), key)):
        if left <= _MAX_METADATA:
            break
        left -= len(key) + len(metadata[key])
        dropped.append(key)
    return {key: text for key, text in metadata.items() if key not in set(dropped)}, dropped


def _shape_of_bytes(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the shape of the bytes of a tensor: its own, with the bytes of a row as the last dimension."""
    rows = prod(shape[:-1])
    return (*shape[:-1], count // rows) if shape and rows and count % rows == 0 else (count,)


def opaque_entries(metadata: Mapping[str, str]) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of the tensors of which a container stores the bytes, by name."""
    found = {}
    for key, text in metadata.items():
        with suppress(ValueError, RecursionError):
            if key.startswith(OPAQUE) and isinstance(entry := json.loads(text), list) and len(entry) == 2:
                dtype, shape = entry
                if dtype in OPAQUE_BITS and isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape):
                    found[key.removeprefix(OPAQUE)] = (dtype, shape)
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file and its length, after the library has validated it with the offsets and the file's length."""
    with reading(path), open_regular(path) as file:
        size = path.stat().st_size
        data = file.read(8)
        data += file.read(min(int.from_bytes(data, "little"), MAX_HEADER))
    if size == 0:
        raise SourceError(f"{path}: the file is empty; download it again")
    try:
        # Not the file itself, which the library would map: it may be cut short meanwhile, or be on a file system that cannot map
        with _sparse(data, size, path) as copy, safe_open(copy, framework="np"):
            pass
    except SafetensorError as error:
        expected = _expected_size(data)
        cause = f"not a valid safetensors file: {error}"
        if expected > size:
            cause = f"is cut short: it has {size} bytes of at least {expected}; download it again"
        elif 0 < expected < size:
            cause = f"has {size} bytes, but {expected} by its header; download it again"
        raise SourceError(f"{path}: {cause}") from None
    return json.loads(data[8:]), len(data) - 8


@contextmanager
def _sparse(start: bytes, size: int, original: Path) -> Iterator[str]:
    """Yield the name of a file in memory, or a temporary one, that begins so, has this size, and takes no room for the rest.

    If the process may not make files of this size, it is the original.
    """
    with ExitStack() as stack:
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").exists():
            file = stack.enter_context(os.fdopen(os.memfd_create("header"), "wb", buffering=0))
            name = f"/proc/self/fd/{file.fileno()}"
        else:
            file = stack.enter_context(tempfile.NamedTemporaryFile(buffering=0))  # type: ignore[assignment]
            name = file.name
        try:
            file.write(start[:size])
            file.truncate(size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            name = str(original)
        yield name


def _expected_size(start: bytes) -> int:
    """Return the length of a file by its beginning, with a header that may be cut short, or 0 if the header is invalid."""
    length = int.from_bytes(start[:8].ljust(8, b"\0"), "little")
    if length > MAX_HEADER:
        return 0
    header = start[8:]
    if len(header) < length or not header:
        return 8 + max(length, 2)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != METADATA]
        return 8 + length + max([0, *map(int, ends)])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0
