"""Files that torch.save wrote: their pickle, and the places of the bytes of tensors, in a zip archive or in the old format."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from qformat.converters.sources.torch_pickle import DTYPE_SIZES, Storage, machine, storage_dtype
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import open_regular

_ZIP = b"PK"
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins files in the old format of torch.save, after the pickle's version
_FRAME = re.compile(rb"\x80[\x02-\xff](?:\x95.{8})?", re.DOTALL)  # the version, and from 4 on the length of the pickle
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# suffixes of checkpoints that are found in archives
_INSIDE = (".gguf", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_VERSION = 1001
_COUNT = struct.Struct("<q")
_LARGE = 1 << 16  # bytes at once


def is_torch(start: bytes) -> bool:
    """Return whether a file that begins so is a zip archive, or a torch checkpoint in the old format."""
    begins = _FRAME.match(start)
    return start[8:9] != b"{" and (
        start.startswith(_ZIP) or (begins is not None and start[begins.end() :].startswith(_MAGIC))
    )


def load(path: Path) -> object:
    """Return the saved object; the bytes of its tensors stay in the file.

    Raises `SourceError` if it is damaged, or something else; the message does not name the file.
    """
    with open_regular(path) as file:
        zipped = file.read(len(_ZIP)) == _ZIP
        size = file.seek(0, os.SEEK_END)
        if zipped:
            return _load_archive(file, size)
        file.seek(0)
        buffered = _Bounded(file, size)
        try:
            return _load_old(buffered, size)
        finally:
            buffered.detach()


def _load_archive(file: BinaryIO, size: int) -> object:
    records, folder = _records(file)
    places = {name: _place(file, record, size) for name, record in records.items() if name.startswith(folder)}
    order = places.get(f"{folder}byteorder")
    if order and _bytes_at(file, *order).strip() == b"big":
        raise SourceError("was saved on a big-endian machine, which is not supported; save it again on another")

    def find(key: Any) -> object:
        kind, type_, name, _location, elements, *_ = key
        if kind != "storage":
            raise ValueError(f"persistent id {str(kind)[:20]!r}")
        offset, length = places[f"{folder}data/{name}"]
        found = _storage(name, type_, elements, offset)
        if found.nbytes > length:
            raise ValueError(f"storage {name[:40]!r} is cut short")
        return found

    return _unpickled(io.BytesIO(_bytes_at(file, *places[f"{folder}data.pkl"])), find)


def _storage(key: object, type_: object, elements: object, offset: int = -1) -> Storage:
    dtype = storage_dtype(type_)
    if not isinstance(key, str) or type(elements) is not int or not 0 <= elements < 1 << 60:
        raise ValueError("a storage of no length")
    return Storage(key, dtype, elements * DTYPE_SIZES[dtype], offset)


def _records(file: BinaryIO) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the records of an archive, which must be of torch's kind and uncompressed, and the folder that they are in."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise SourceError("is cut short or damaged: not a whole zip archive; download it again") from None
    names = {record.filename for record in records}
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch("[^/]+/data.pkl", name)]
    if len(folders) != 1:
        inside = sorted(name for name in names if name.endswith(_INSIDE))
        if inside and not folders:
            raise SourceError(
                f"is a zip archive with {inside[0][:80]!r}{and_more(inside)} in it; unpack it, and give that"
            )
        some = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
        raise SourceError(
            f"is a zip archive that torch.save did not write: it holds {some or 'nothing'}, and no data.pkl"
        )
    if f"{folders[0]}constants.pkl" in names:
        raise SourceError(
            "is a TorchScript archive, which contains a program; save the module's state_dict() with torch.save"
        )
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SourceError(
            f"was compressed after torch.save ({packed[0][:80]!r}); unpack it and zip it without compression (zip -0)"
        )
    return {record.filename: record for record in records}, folders[0]


def _place(file: BinaryIO, record: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Return the offset and length of the content of a record."""
    header = _bytes_at(file, record.header_offset, _LOCAL_HEADER.size)
    signature, name, extra = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    offset = record.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\x03\x04" or offset + record.file_size > size:
        raise SourceError(f"is cut short or damaged at {record.filename[:80]!r}; download it again")
    return offset, record.file_size


def _bytes_at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _load_old(file: BinaryIO, size: int) -> object:
    """Load the old format: three small pickles, the object, the keys of storages, and for each its length and its bytes."""
    storages: dict[str, Storage] = {}

    def find(key: Any) -> object:
        kind, type_, *rest = key
        if kind == "module":  # a class, with its source code
            return type_
        if kind != "storage":
            raise ValueError(f"persistent id {str(kind)[:20]!r}")
        name, _location, elements, *view = rest
        storage = storages.setdefault(name, _storage(name, type_, elements))
        if view and view[0] is not None:
            view_name, start, length = view[0]
            return storage.part(_storage(view_name, type_, length), start * DTYPE_SIZES[storage.dtype])
        return storage if storage.dtype == storage_dtype(type_) else storage.part(_storage(name, type_, elements))

    _magic, version, system = (_unpickled(file, find) for _ in range(3))
    if version != _VERSION:
        raise SourceError("is of an unknown version of torch's old format; save it again with a newer torch")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise SourceError("was saved on a big-endian machine, which is not supported; save it again on another")
    root = _unpickled(file, find)
    keys = _unpickled(file, find)
    at = file.tell()
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key)
        (elements,) = _COUNT.unpack(_bytes_at(file, at, _COUNT.size).ljust(_COUNT.size, b"\xff"))
        if storage is None or elements * DTYPE_SIZES[storage.dtype] != storage.nbytes:
            raise SourceError("is damaged: a length does not fit its pickle, or is missing; download it again")
        storage.offset = at + _COUNT.size
        at = storage.offset + storage.nbytes
    if at > size or any(storage.offset < 0 for storage in storages.values()):
        raise SourceError(f"is cut short: it has {size} bytes of at least {at}; download it again")
    return root


class _Bounded(io.BufferedReader):
    """A file that claims of its content cannot make it allocate more than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._size = size

    def read(self, length: int | None = -1, /) -> bytes:
        if length is None or not 0 <= length <= _LARGE:
            left = max(0, self._size - self.tell())
            length = left if length is None or length < 0 else min(length, left)
        return super().read(length)


def _unpickled(file: BinaryIO, find: Any) -> object:
    try:
        return machine(find).load(file)
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001  damaged bytes can make the machine raise anything
        raise SourceError(f"is damaged, or no version of torch wrote it ({_brief(error)}); download it again") from None


def _brief(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])
