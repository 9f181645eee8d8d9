"""Open a container file: find and check the index, hand out the bytes of segments and assets."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from qformat.container.access import PathFile, open_access
from qformat.container.index import MAX_INDEX_BYTES, Index, check_sorted
from qformat.container.layout import HEADER_SIZE, MINOR, TRAILER_SIZE, Header, Trailer, align, check_records
from qformat.errors import FormatError, IntegrityError
from qformat.files import beside
from qformat.records import AssetRecord, Segment, ShardRecord, TensorRecord

MAX_RECORDS_BYTES = 16 << 20


class ContainerReader:
    """A container file opened for reading.

    Opening checks the header, the trailer, the digest of the index and every record in it, and nothing else: it takes time and
    memory in proportion to the index. The bytes of segments are read when they are needed.

    Parameters
    ----------
    path
        The file; or an open binary file object that can seek, one of ``fsspec`` say, of which only what is needed is read.
    alone
        Do not open the shards that the file names, if it is the head of some.
    root
        The root that the file must have, as `root` returned it before; that of a head covers its shards.
    one_of_many
        As in `qformat.local_file.LocalFile`.

    Attributes
    ----------
    header, trailer, index
        The parsed parts of the file.
    file_size
        Its length in bytes.
    shards
        The files that hold its tensors, in order; empty if it holds them itself.

    Raises
    ------
    FormatError
        If the file is damaged or not a container.
    IntegrityError
        If its root is another one.
    OSError
        If it cannot be opened.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | BinaryIO,
        *,
        alone: bool = False,
        root: str | None = None,
        one_of_many: bool = False,
    ) -> None:
        wanted = None if root is None else _parse_root(root)
        self._access = open_access(path, one_of_many=one_of_many)
        self.path = self._access.name
        self.shards: list[ContainerReader] = []
        try:
            self._open(wanted)
            if self.index.shards and not alone:
                self._open_shards()
        except FormatError as error:
            self.close()
            raise type(error)(error.cause, path=error.path or self.path, offset=error.offset) from None
        except BaseException:
            self.close()
            raise
        # by the number of the shard rather than the shard: without a reference to this object it is freed with its last user
        self._tensors = {
            record.name: (record, number)
            for number, home in enumerate(self.shards or [self])
            for record in home.index.tensors
        }
        self._assets = {asset.name: asset for asset in self.index.assets}

    def _open_shards(self) -> None:
        """Open the shards, which stand beside the file, and check that they are the ones that it names."""
        if not self.has_path:
            raise FormatError(f"its tensors are in {len(self.index.shards)} other files: open it by its path")
        for shard in self.index.shards:
            path = beside(Path(self.path), shard.name)
            try:
                self.shards.append(ContainerReader(path, alone=True, one_of_many=True))
            except OSError as error:
                raise FormatError(f"shard {shard.name} cannot be read: {error.strerror or error}") from None
            self.shards[-1].check_is(shard)
        check_sorted("tensor", (record.name for home in self.shards for record in home.index.tensors))

    def check_is(self, shard: ShardRecord) -> None:
        """Compare the file with what the head of several says of it; raise `FormatError` if it is another one."""
        if (self.root, self.file_size) != (shard.root, shard.nbytes) or self.index.shards:
            raise FormatError("is not the shard that its head names: it was replaced or made again", path=self.path)

    def _open(self, root: str | None) -> None:
        self.file_size = self._access.size
        self.header = Header.parse(self._access.read(0, HEADER_SIZE))
        at = max(0, self.file_size - TRAILER_SIZE)
        self.trailer = Trailer.parse(self._access.read(at, TRAILER_SIZE), self.file_size)
        trailer = self.trailer
        if root not in (None, self.root):
            raise IntegrityError(f"its root is {self.root}, not {root}: it is not the file that was verified")
        if trailer.index_length > MAX_INDEX_BYTES:
            raise FormatError(f"the index claims {trailer.index_length} bytes, more than an index may have")
        if align(trailer.index_offset) != trailer.index_offset or trailer.index_offset < self.header.header_size:
            raise FormatError("the index does not lie where an index may", offset=trailer.index_offset)
        data = self._access.read(trailer.index_offset, trailer.index_length)
        if hashlib.sha256(data).digest() != trailer.index_sha256:
            raise FormatError("the index is damaged: its SHA-256 does not match", offset=trailer.index_offset)
        self._check_records(trailer)
        self.index = Index.parse(data)
        if hashlib.sha256(self._access.read(0, self.header.header_size)).hexdigest() != self.index.header_sha256:
            raise FormatError("the header is damaged: its SHA-256 does not match", offset=0)
        self.index.check_segments(self.header.header_size, trailer.index_offset)

    def _check_records(self, trailer: Trailer) -> None:
        base = trailer.index_offset + trailer.index_length
        if trailer.records_length > MAX_RECORDS_BYTES:
            raise FormatError(
                f"the trailer records claim {trailer.records_length} bytes, more than they may have", offset=base
            )
        records = self._access.read(base, trailer.records_length)
        if hashlib.sha256(records).digest() != trailer.records_sha256:
            raise FormatError("the trailer records are damaged: their SHA-256 does not match", offset=base)
        check_records(records, base)

    @property
    def root(self) -> str:
        """SHA-256 of the index in hexadecimal: it identifies the content."""
        return self.trailer.index_sha256.hex()

    @property
    def has_path(self) -> bool:
        """Whether it was opened by its path rather than as a file object."""
        return isinstance(self._access, PathFile)

    @property
    def outdated(self) -> bool:
        """Whether an older writer made the file, so that making it again may give a better one."""
        return self.trailer.minor < MINOR

    @property
    def tensors(self) -> list[TensorRecord]:
        """The records of all tensors, those in shards too, sorted by name."""
        return [record for record, _ in self._tensors.values()]

    @property
    def total_size(self) -> int:
        """Bytes of the file and its shards."""
        return self.file_size + sum(shard.file_size for shard in self.shards)

    def tensor(self, name: str) -> TensorRecord:
        """Return the record of a tensor; raise `KeyError` if there is none of this name."""
        try:
            return self._tensors[name][0]
        except KeyError:
            raise KeyError(f"{self.path} holds no tensor {name!r}") from None

    def home(self, name: str) -> ContainerReader:
        """Return the file that holds the bytes of a tensor: this one, or a shard."""
        number = self._tensors[name][1]
        return self.shards[number] if self.shards else self

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on; raise `IntegrityError` if the file ends before."""
        self._access.fill(buffer, offset)

    def check_unchanged(self) -> None:
        """Raise `IntegrityError` if the file is known to have changed since it was opened."""
        if self._access.is_changed():
            raise IntegrityError("the file was changed while it was open: open it again", path=self.path)

    def segments(self, segments: Sequence[Segment]) -> list[memoryview]:
        """Return the bytes of some segments of one owner."""
        return self._access.segments(segments)

    def check(self, segment: Segment, data: memoryview, owner: str) -> None:
        """Compare a segment's bytes with its digest; raise `FormatError` if they differ; it names `owner` and the segment."""
        self.check_digest(segment, hashlib.sha256(data).hexdigest(), owner)

    def check_digest(self, segment: Segment, digest: str, owner: str) -> None:
        """Compare the digest of a segment's bytes with the recorded one, as `check` does."""
        if digest != segment.sha256:
            self.check_unchanged()
            raise FormatError(
                f"{owner}, segment {segment.name!r} is damaged: its SHA-256 does not match",
                path=self.path,
                offset=segment.offset,
            )

    def asset_record(self, name: str) -> AssetRecord:
        """Return the record of an asset; raise `KeyError` if there is none of this name."""
        try:
            return self._assets[name]
        except KeyError:
            raise KeyError(f"{self.path} holds no asset {name!r}") from None

    def asset(self, name: str) -> bytes:
        """Return the decoded bytes of an asset, checked against its digests.

        Raises
        ------
        KeyError
            If there is none of this name.
        FormatError
            If it is damaged.
        """
        record = self.asset_record(name)
        if record.refusal:
            raise FormatError(record.refusal, path=self.path)
        (stored,) = self.segments([record.segment])
        self.check(record.segment, stored, f"asset {name!r}")
        data = self._decode_asset(record, bytes(stored))
        if hashlib.sha256(data).hexdigest() != record.content_sha256:
            raise FormatError(f"asset {name!r} is damaged: its content's SHA-256 does not match", path=self.path)
        return data

    def _decode_asset(self, record: AssetRecord, stored: bytes) -> bytes:
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
        """Close the file, unless it was given open. The bytes of segments that are still in use stay valid."""
        for shard in self.shards:
            shard.close()
        self._access.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse_root(root: object) -> str:
    if not isinstance(root, str) or not re.fullmatch("[0-9a-fA-F]{64}", root):
        raise IntegrityError(f"root {root!r} is not a SHA-256 in hexadecimal; give the one that inspect shows")
    return root.lower()
