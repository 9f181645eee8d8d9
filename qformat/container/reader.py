"""Open a container file: find and check the index, hand out the bytes of segments and assets."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from qformat.container.index import MAX_INDEX_BYTES, Index
from qformat.container.layout import HEADER_SIZE, MINOR, TRAILER_SIZE, Header, Trailer, align, check_records
from qformat.errors import FormatError
from qformat.files import open_regular
from qformat.records import AssetRecord, Segment, TensorRecord

MAX_RECORDS_BYTES = 16 << 20
_MOST_AT_ONCE = 1 << 30  # the system reads no more than 2 GiB in one call


class ContainerReader:
    """A container file opened for reading.

    Opening checks the header, the trailer, the digest of the index and every record in it, and nothing else: it takes time and
    memory in proportion to the index. The bytes of segments are memory-mapped.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    header, trailer, index
        The parsed parts of the file.
    file_size
        Its length in bytes.

    Raises
    ------
    FormatError
        If the file is damaged or not a container.
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._file = open_regular(self.path)
        try:
            self._open()
        except FormatError as error:
            self._file.close()
            raise FormatError(error.cause, path=self.path, offset=error.offset) from None
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        self.file_size = os.fstat(self._file.fileno()).st_size
        self.header = Header.parse(self._read(0, HEADER_SIZE))
        at = max(0, self.file_size - TRAILER_SIZE)
        self.trailer = Trailer.parse(self._read(at, TRAILER_SIZE), self.file_size)
        trailer = self.trailer
        if trailer.index_length > MAX_INDEX_BYTES:
            raise FormatError(f"the index claims {trailer.index_length} bytes, more than an index may have")
        if align(trailer.index_offset) != trailer.index_offset or trailer.index_offset < self.header.header_size:
            raise FormatError("the index does not lie where an index may", offset=trailer.index_offset)
        data = self._read(trailer.index_offset, trailer.index_length)
        if hashlib.sha256(data).digest() != trailer.index_sha256:
            raise FormatError("the index is damaged: its SHA-256 does not match", offset=trailer.index_offset)
        self._check_records(trailer)
        self.index = Index.parse(data)
        if hashlib.sha256(self._read(0, self.header.header_size)).hexdigest() != self.index.header_sha256:
            raise FormatError("the header is damaged: its SHA-256 does not match", offset=0)
        self.index.check_segments(self.header.header_size, trailer.index_offset)
        self._tensors = {tensor.name: tensor for tensor in self.index.tensors}
        self._assets = {asset.name: asset for asset in self.index.assets}

    def _check_records(self, trailer: Trailer) -> None:
        base = trailer.index_offset + trailer.index_length
        if trailer.records_length > MAX_RECORDS_BYTES:
            raise FormatError(
                f"the trailer records claim {trailer.records_length} bytes, more than they may have", offset=base
            )
        records = self._read(base, trailer.records_length)
        if hashlib.sha256(records).digest() != trailer.records_sha256:
            raise FormatError("the trailer records are damaged: their SHA-256 does not match", offset=base)
        check_records(records, base)

    def _read(self, offset: int, length: int) -> bytes:
        parts = []
        while length and (part := os.pread(self._file.fileno(), min(length, _MOST_AT_ONCE), offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    @property
    def root(self) -> str:
        """SHA-256 of the index in hexadecimal: it identifies the content."""
        return self.trailer.index_sha256.hex()

    @property
    def outdated(self) -> bool:
        """Whether an older writer made the file, so that making it again may give a better one."""
        return self.trailer.minor < MINOR

    def tensor(self, name: str) -> TensorRecord:
        """Return the record of a tensor.

        Raises
        ------
        KeyError
            If there is none of this name.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} holds no tensor {name!r}") from None

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file.fileno()

    def segment(self, segment: Segment) -> memoryview:
        """Return the bytes of a segment, without a copy."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.file_size, access=mmap.ACCESS_READ)
        return memoryview(self._map)[segment.offset : segment.stop]

    def check(self, segment: Segment, owner: str) -> None:
        """Compare a segment's bytes with its digest.

        Raises
        ------
        FormatError
            If they differ; it names `owner` and the segment.
        """
        if hashlib.sha256(self.segment(segment)).hexdigest() != segment.sha256:
            raise FormatError(
                f"{owner}, segment {segment.name!r} is damaged: its SHA-256 does not match",
                path=self.path,
                offset=segment.offset,
            )

    def asset(self, name: str) -> bytes:
        """Return the decoded bytes of an asset, checked against its digests.

        Raises
        ------
        KeyError
            If there is none of this name.
        FormatError
            If it is damaged.
        """
        try:
            record = self._assets[name]
        except KeyError:
            raise KeyError(f"{self.path} holds no asset {name!r}") from None
        if record.refusal:
            raise FormatError(record.refusal, path=self.path)
        self.check(record.segment, f"asset {name!r}")
        data = self._decode_asset(record)
        if hashlib.sha256(data).hexdigest() != record.content_sha256:
            raise FormatError(f"asset {name!r} is damaged: its content's SHA-256 does not match", path=self.path)
        return data

    def _decode_asset(self, record: AssetRecord) -> bytes:
        stored = bytes(self.segment(record.segment))
        if record.encoding == "raw":
            return stored
        import zstandard

        try:
            # frame_content_size is -1 if the frame does not state it.
            if zstandard.frame_content_size(stored) != record.size:
                raise FormatError(
                    f"asset {record.name!r}: its zstd frame does not hold {record.size} bytes", path=self.path
                )
            decoder = zstandard.ZstdDecompressor()
            data = decoder.decompress(stored, max_output_size=record.size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"asset {record.name!r} does not decompress: {error}", path=self.path) from None
        if len(data) != record.size:
            raise FormatError(f"asset {record.name!r} does not decompress to {record.size} bytes", path=self.path)
        return data

    def close(self) -> None:
        """Close the file. Views of segments that are still in use keep their memory mapped."""
        self._map = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
