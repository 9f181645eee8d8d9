"""Header, trailer and alignment: the fixed-size parts of a file (spec/container.md, sections 1, 4 and 5)."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

from qformat.errors import FormatError

MAJOR = 1
MINOR = 5
ALIGNMENT = 64

MAGIC = b"\x89QFM\r\n\x1a\n"
END_MAGIC = b"QFM-END\n"

_HEADER = struct.Struct("<8sHH4xQQ32x")
_TRAILER = struct.Struct("<QQ32sQ32s24xI8sI")
_RECORD = struct.Struct("<IIQ")
_CRC_AT = 112

HEADER_SIZE = _HEADER.size
TRAILER_SIZE = _TRAILER.size
_MUST_UNDERSTAND = 1


def align(offset: int) -> int:
    """Return the smallest aligned offset that is not less than `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Header:
    """The first bytes of a file."""

    header_size: int = HEADER_SIZE
    compatible: int = 0

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(MAGIC, MAJOR, self.header_size, 0, self.compatible)

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Parse and check the first bytes of a file.

        Raises
        ------
        FormatError
            If this is not a qformat file, or one that this version cannot read.
        """
        if not data:
            raise FormatError("the file is empty")
        if not data.startswith(MAGIC):
            raise FormatError(_explain_magic(data), offset=0)
        if len(data) < HEADER_SIZE:
            raise FormatError("the file is truncated: it ends inside its header", offset=len(data))
        _, major, header_size, incompatible, compatible = _HEADER.unpack(data[:HEADER_SIZE])
        if major != MAJOR:
            raise FormatError(
                f"format major version {major}, and this qformat reads {MAJOR}: use a newer one, if that is no damage",
                offset=8,
            )
        if header_size < HEADER_SIZE or header_size % ALIGNMENT:
            raise FormatError(f"impossible header size {header_size}", offset=10)
        if incompatible:
            raise FormatError(
                f"the file needs features {incompatible:#x} that this version does not know: use a newer one, if that is no damage",
                offset=16,
            )
        return cls(header_size, compatible)


def _explain_magic(data: bytes) -> str:
    if MAGIC.startswith(data):
        return "the file is truncated: it ends inside its header"
    damaged = (
        b"\x89QFM\n\x1a\n",
        b"\x89QFM\r\r\n\x1a\r\n",
        b"\x09QFM",
        b"\xc2\x89QFM",
        b"\xef\xbf\xbdQFM",
        b"QFM\r\n",
        b"\x89QFM\r\n\x1a\r\n",
        b"\x89QFM",
    )
    if data.startswith(damaged):
        return "a qformat file damaged in transfer (as text, or with its first bytes changed): copy it again in binary mode"
    if data.startswith((b"GGUF", b"PK")) or data[8:9] == b"{":  # GGUF, torch, safetensors
        return "not a qformat file; qformat convert makes one of it"
    return "not a qformat file"


@dataclass(frozen=True)
class Trailer:
    """The last bytes of a file: where the index is, its digest, and the writer's minor version."""

    index_offset: int
    index_length: int
    index_sha256: bytes
    records_length: int = 0
    records_sha256: bytes = hashlib.sha256(b"").digest()
    minor: int = MINOR

    def pack(self) -> bytes:
        """Return the trailer's bytes."""
        crc = zlib.crc32(self._pack(0))
        return self._pack(crc)

    def _pack(self, crc: int) -> bytes:
        return _TRAILER.pack(
            self.index_offset,
            self.index_length,
            self.index_sha256,
            self.records_length,
            self.records_sha256,
            crc,
            END_MAGIC,
            self.minor,
        )

    @classmethod
    def parse(cls, data: bytes, file_size: int) -> Trailer:
        """Parse and check the last 128 bytes of a file of `file_size` bytes.

        Raises
        ------
        FormatError
            If the trailer is missing, damaged, or does not fit the file's length.
        """
        at = file_size - TRAILER_SIZE
        if at < HEADER_SIZE or len(data) != TRAILER_SIZE:
            raise FormatError("the file is truncated: there is no room for a trailer", offset=file_size)
        fields = _TRAILER.unpack(data)
        index_offset, index_length, index_sha256, records_length, records_sha256, crc, end_magic, minor = fields
        if end_magic != END_MAGIC:
            raise FormatError(
                "the file is truncated, incomplete or overwritten: it does not end in a trailer",
                offset=at + 116,
            )
        if crc != zlib.crc32(data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 :]):
            raise FormatError("the trailer is damaged: its CRC-32 does not match", offset=at + _CRC_AT)
        if index_offset + index_length + records_length + TRAILER_SIZE != file_size:
            raise FormatError(
                f"the file is {file_size} bytes long but its trailer accounts for "
                f"{index_offset + index_length + records_length + TRAILER_SIZE}: bytes are missing or were added",
                offset=at,
            )
        return cls(index_offset, index_length, index_sha256, records_length, records_sha256, minor)


def check_records(data: bytes, base: int) -> None:
    """Walk the trailer records in `data`, which begin at file offset `base`; none is defined yet.

    Raises
    ------
    FormatError
        If they are malformed, or one must be understood.
    """
    position = 0
    while position < len(data):
        if len(data) - position < _RECORD.size:
            raise FormatError("a trailer record is cut short", offset=base + position)
        kind, flags, length = _RECORD.unpack_from(data, position)
        end = position + _RECORD.size + length
        padded = -(-end // 8) * 8
        if padded > len(data):
            raise FormatError("a trailer record is longer than the space for it", offset=base + position)
        if any(data[end:padded]):
            raise FormatError("padding after a trailer record is not zero", offset=base + end)
        if flags & _MUST_UNDERSTAND:
            raise FormatError(
                f"the file needs trailer record {kind} that this version does not know: use a newer one",
                offset=base + position,
            )
        position = padded
