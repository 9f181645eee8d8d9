"""Write a container file as a stream: assets first, then tensors, then index and trailer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from qformat.container.index import (
    MAX_ASSET_BYTES,
    MAX_ASSETS_BYTES,
    Index,
    check_asset_name,
    check_folders,
    check_index_size,
    check_shape,
    check_tensor_name,
)
from qformat.container.layout import TRAILER_SIZE, Header, Trailer, align
from qformat.container.partial import Journal, NullTarget, PartialFile, Record
from qformat.errors import FormatError, SourceError
from qformat.records import AssetRecord, MeasuredError, Segment, ShardRecord, TensorRecord

Bytes = bytes | bytearray | memoryview

# The level decides the bytes, so it is part of the format (spec/container.md, section 7).
_ZSTD_LEVEL = 9
_NO_DIGEST = "0" * 64


def compress_asset(data: bytes) -> tuple[str, bytes]:
    """Return (encoding, stored bytes) of an asset: zstd if that is smaller."""
    import zstandard

    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(data)
    return ("zstd", packed) if len(packed) < len(data) else ("raw", data)


def _place(record: TensorRecord, position: int) -> tuple[TensorRecord, int]:
    """Return a record with its segments at `position`, and the position after them."""
    segments = []
    for segment in record.segments:
        segments.append(replace(segment, offset=position))
        position = align(position + segment.length)
    return replace(record, segments=tuple(segments)), position


class TensorWriter:
    """Writes the segments of one tensor, each from front to back.

    Made by `ContainerWriter.tensor`.
    """

    def __init__(
        self, target: PartialFile | NullTarget, record: TensorRecord, position: int, unknown: Collection[int]
    ) -> None:
        self.record, _ = _place(record, position)
        self._target = target
        self._unknown = unknown
        # What follows a segment of unknown length has no place in the file before the end
        self._placed = min(unknown, default=len(record.segments))
        self._waiting: list[list[Bytes]] = [[] for _ in record.segments]
        self._hashes = [hashlib.sha256() for _ in record.segments]
        self._written = [0] * len(record.segments)

    def write(self, parts: Sequence[Sequence[Bytes]]) -> None:
        """Append to each segment, in the order of the record, some buffers; those that have to wait are kept as they are."""
        for i, (segment, buffers) in enumerate(zip(self.record.segments, parts, strict=True)):
            for data in buffers:
                if self._written[i] + len(data) > segment.length and i not in self._unknown:
                    raise ValueError(f"{self.record.name}: more bytes than announced for segment {segment.name}")
                self._hashes[i].update(data)
                if i > self._placed:
                    self._waiting[i].append(data)
                else:
                    self._target.write(data, segment.offset + self._written[i])
                self._written[i] += len(data)

    def finish(self, error: MeasuredError | None) -> TensorRecord:
        """Return the completed record.

        Raises
        ------
        FormatError
            If the bytes are not those of digests that the record has already, as that of a copied tensor does.
        """
        if self._unknown:
            segments = tuple(
                replace(segment, length=written) if number in self._unknown else segment
                for number, (segment, written) in enumerate(zip(self.record.segments, self._written, strict=True))
            )
            self.record, _ = _place(replace(self.record, segments=segments), segments[0].offset)
            for segment, buffers in zip(self.record.segments, self._waiting, strict=True):
                position = segment.offset
                for data in buffers:
                    self._target.write(data, position)
                    position += len(data)
        if any(written != segment.length for written, segment in zip(self._written, self.record.segments, strict=True)):
            raise ValueError(f"{self.record.name}: fewer bytes than announced")
        digests = [digest.hexdigest() for digest in self._hashes]
        if any(s.sha256 not in (_NO_DIGEST, d) for s, d in zip(self.record.segments, digests, strict=True)):
            raise FormatError(f"{self.record.label} is damaged: its SHA-256 does not match")
        segments = tuple(replace(s, sha256=d) for s, d in zip(self.record.segments, digests, strict=True))
        return replace(self.record, segments=segments, error=error)


class ContainerWriter:
    """Writes a container file; a context manager, which adds index and trailer when the block ends without an exception.

    Assets and tensors have to come sorted by name, assets first.

    Parameters
    ----------
    target
        The open file, or a stand-in of which only the size counts.
    metadata
        Strings for the user.
    journal
        The journal of the file: the assets and tensors in it whose bytes are intact need not be written again.

    Attributes
    ----------
    assets, records
        The finished assets and tensors.
    shards
        The files that hold the tensors, if this one is to be their head.
    root, file_size
        SHA-256 of the index and length of the file, once it is complete.

    Raises
    ------
    SourceError
        If the metadata cannot be stored.
    TargetError
        If the file cannot be written.
    """

    def __init__(
        self,
        target: PartialFile | NullTarget,
        *,
        metadata: Mapping[str, str] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._metadata = dict(metadata or {})
        texts: list[object] = [text for pair in self._metadata.items() for text in pair]
        for item in texts:
            if not isinstance(item, str) or item != item.encode("utf-8", "replace").decode():
                raise SourceError(f"metadata must be strings of valid Unicode, not {item!r}")
        self._target = target
        self._journal = journal
        self._header = Header().pack()
        self._position = len(self._header)
        self.assets: list[AssetRecord] = []
        self.records: list[TensorRecord] = []
        self.shards: list[ShardRecord] = []
        self.root = ""
        self.file_size = 0
        if isinstance(target, PartialFile):
            self._take_over(target, journal.records if journal else [])
        if journal:
            journal.keep_first(len(self.assets) + len(self.records))
        target.write(self._header, 0)

    def _take_over(self, target: PartialFile, records: Sequence[Record]) -> None:
        """Keep the assets and tensors of an earlier run, up to the first whose bytes are not intact, and nothing after them."""
        size = len(self._header)
        for record in records:
            segments = (record.segment,) if isinstance(record, AssetRecord) else record.segments
            position, intact = self._position, bool(segments)
            for segment in segments:
                intact &= segment.offset == position
                intact = intact and target.digest(segment.offset, segment.length) == segment.sha256
                position = align(segment.stop)
            if not intact:
                break
            for segment in segments:  # no digest covers the padding
                target.write(bytes(align(segment.stop) - segment.stop), segment.stop)
            size, self._position = segments[-1].stop, position
            if isinstance(record, AssetRecord):
                self.assets.append(record)
            else:
                self.records.append(record)
        target.cut(size)

    def asset(self, name: str, data: bytes) -> None:
        """Add a file that belongs to the model.

        Raises
        ------
        SourceError
            If it is too large.
        FormatError
            If its name is not a plain relative path.
        """
        check_asset_name(name)
        if self.records or (self.assets and self.assets[-1].name >= name):
            raise ValueError(f"asset {name!r} does not come in its order")
        if len(data) > MAX_ASSET_BYTES:
            raise SourceError(f"asset {name!r}: {len(data)} bytes are more than an asset may have")
        if len(data) + sum(asset.size for asset in self.assets) > MAX_ASSETS_BYTES:
            raise SourceError(f"asset {name!r}: with it all assets have more than {MAX_ASSETS_BYTES} bytes")
        encoding, stored = compress_asset(data)
        segment = Segment(name, self._position, len(stored), hashlib.sha256(stored).hexdigest())
        self._target.write(stored, segment.offset)
        self._position = align(segment.stop)
        self.assets.append(AssetRecord(encoding, segment, len(data), hashlib.sha256(data).hexdigest()))
        if self._journal:
            self._journal.add(self.assets[-1])

    def tensor(self, record: TensorRecord, *, unknown: Collection[int] = ()) -> TensorWriter:
        """Begin a tensor; the one before must have been ended with `finish`.

        Parameters
        ----------
        record
            Everything but the offsets and digests of its segments and the error, which are filled in.
        unknown
            Numbers of the segments whose length is found by writing. The bytes of all segments after the first of them are kept
            in memory until the end.
        """
        check_tensor_name(record.name)
        check_shape(record.shape, record.label)
        if self.records and self.records[-1].name >= record.name:
            raise ValueError(f"tensor {record.name!r} does not come in its order")
        return TensorWriter(self._target, record, self._position, unknown)

    def finish(self, record: TensorRecord) -> None:
        """Take the record that `TensorWriter.finish` returned into the index."""
        self.records.append(record)
        self._position = align(record.segments[-1].stop)
        if self._journal:
            self._journal.add(record)

    def reserve(self, record: TensorRecord) -> None:
        """Add a tensor without its bytes, to predict the length of the file.

        Its segments have their lengths. The digits of digests and errors do not depend on their values.
        """
        placed, self._position = _place(record, self._position)
        self.records.append(placed)

    def copy(self, record: TensorRecord, segments: Sequence[Bytes]) -> None:
        """Add a tensor of another file as it is.

        Parameters
        ----------
        record
            What that file says of it.
        segments
            The bytes of its segments.

        Raises
        ------
        FormatError
            If they are not those of the record.
        """
        tensor = self.tensor(record)
        tensor.write([[data] for data in segments])
        self.finish(tensor.finish(record.error))

    def _finish_file(self) -> None:
        """Write index and trailer."""
        check_folders(asset.name for asset in self.assets)
        index = Index(
            hashlib.sha256(self._header).hexdigest(),
            tuple(self.records),
            tuple(self.assets),
            self._metadata,
            tuple(self.shards),
        ).encode()
        try:
            check_index_size(index)
        except FormatError as error:
            raise SourceError(str(error)) from None
        digest = hashlib.sha256(index)
        trailer = Trailer(self._position, len(index), digest.digest())
        self._target.write(index + trailer.pack(), self._position)
        self.root = digest.hexdigest()
        self.file_size = self._position + len(index) + TRAILER_SIZE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_file()
