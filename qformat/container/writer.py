"""Write a container file as a stream: assets first, then tensors, then index and trailer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from qformat.container.index import (
    MAX_ASSET_BYTES,
    MAX_INDEX_BYTES,
    Index,
    check_asset_name,
    check_folders,
    check_shape,
    check_tensor_name,
)
from qformat.container.journal import Journal
from qformat.container.layout import HEADER_SIZE, TRAILER_SIZE, Header, Trailer, align
from qformat.container.target import Nowhere, Target
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


def predict_size(
    assets: Iterable[tuple[str, bytes]],
    records: Sequence[TensorRecord],
    metadata: Mapping[str, str] | None = None,
    shards: Sequence[ShardRecord] = (),
) -> int:
    """Return how many bytes a file will have, exactly, before anything is encoded.

    Parameters
    ----------
    assets
        Names and contents of the files to take along, sorted by name.
    records
        The tensors, with the lengths of their segments. The errors that will be measured only have to be there or not, for they
        are all written in the same number of digits.
    metadata
        The strings.
    shards
        The files that hold the tensors, if it is their head.
    """
    position = HEADER_SIZE
    asset_records = []
    for name, data in assets:
        encoding, stored = compress_asset(data)
        segment = Segment(name, position, len(stored), _NO_DIGEST)
        asset_records.append(AssetRecord(encoding, segment, len(data), _NO_DIGEST))
        position = align(segment.stop)
    placed = []
    for record in records:
        record, position = _place(record, position)  # noqa: PLW2901
        placed.append(record)
    index = Index(_NO_DIGEST, tuple(placed), tuple(asset_records), metadata or {}, tuple(shards))
    return position + len(index.encode()) + TRAILER_SIZE


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

    def __init__(self, target: Target | Nowhere, record: TensorRecord, position: int, unknown: Collection[int]) -> None:
        self.record, _ = _place(record, position)
        self._target = target
        self._unknown = unknown
        # What follows a segment of unknown length has no place in the file before the end
        self._placed = min(unknown, default=len(record.segments))
        self._waiting: list[list[Bytes]] = [[] for _ in record.segments]
        self._hashes = [hashlib.sha256() for _ in record.segments]
        self._written = [0] * len(record.segments)

    def write(self, parts: Sequence[Bytes]) -> None:
        """Append bytes to the segments: one buffer for each, in the order of the record."""
        for i, part in enumerate(parts):
            segment = self.record.segments[i]
            if self._written[i] + len(part) > segment.length and i not in self._unknown:
                raise ValueError(f"{self.record.name}: more bytes than announced for segment {segment.name}")
            self._hashes[i].update(part)
            if i > self._placed:
                self._waiting[i].append(part)
            else:
                self._target.write(part, segment.offset + self._written[i])
            self._written[i] += len(part)

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
            for segment, content in zip(self.record.segments, self._waiting, strict=True):
                self._target.write(b"".join(content), segment.offset)
        if any(written != segment.length for written, segment in zip(self._written, self.record.segments, strict=True)):
            raise ValueError(f"{self.record.name}: fewer bytes than announced")
        digests = [digest.hexdigest() for digest in self._hashes]
        if any(s.sha256 not in (_NO_DIGEST, d) for s, d in zip(self.record.segments, digests, strict=True)):
            raise FormatError(f"{self.record.label} is damaged: its SHA-256 does not match")
        segments = tuple(replace(s, sha256=d) for s, d in zip(self.record.segments, digests, strict=True))
        return replace(self.record, segments=segments, error=error)


class ContainerWriter:
    """A container file being written.

    Used as a context manager: the file appears at its path when the block ends well, and nothing does if it ends in an exception.
    Assets and tensors have to come sorted by name, assets first. With a `request`, a journal is kept, so that after a run that was
    killed another one can go on where it was; that one begins with `assets` and `records` that need not be written again.

    Parameters
    ----------
    path
        Where the file shall stand; None writes nothing, to know how long it would be.
    overwrite
        Whether a file that stands there may be replaced.
    metadata
        Strings for the user.
    request
        Identifies everything that decides the bytes of the file; empty if that is not known.
    resume
        Go on where an earlier run with the same request was, and leave what is done if this one ends in an exception.

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
    TargetError
        If the file cannot be written or must not be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        request: str = "",
        resume: bool = False,
    ) -> None:
        self._metadata = dict(metadata or {})
        texts: list[object] = [text for pair in self._metadata.items() for text in pair]
        for item in texts:
            if not isinstance(item, str) or item != item.encode("utf-8", "replace").decode():
                raise SourceError(f"metadata must be strings of valid Unicode, not {item!r}")
        self._target: Nowhere | Target = Nowhere()
        self._journal: Journal | None = None
        self._request = request
        self._resume = resume and path is not None and bool(request)
        if path is not None:
            self._target = Target(Path(path), overwrite=overwrite, resume=self._resume)
            if request:
                self._journal = Journal(self._target.journal_path, request)
        self._header = Header().pack()
        self._position = len(self._header)
        self.assets: list[AssetRecord] = []
        self.records: list[TensorRecord] = []
        self.shards: list[ShardRecord] = []
        self.root = ""
        self.file_size = 0
        try:
            if self._resume and self._journal:
                self._take_over(self._journal)
            self._target.write(self._header, 0)  # first, so that a partial file can be told from any other
            if self._journal:
                self._journal.begin([*self.assets, *self.records])
        except BaseException:
            self._end()
            raise

    def _take_over(self, journal: Journal) -> None:
        """Take what an earlier run has finished, as far as its bytes are there."""
        assert isinstance(self._target, Target)
        size = len(self._header)
        for record in journal.records():
            segments = (record.segment,) if isinstance(record, AssetRecord) else record.segments
            position = self._position
            for segment in segments:
                if segment.offset != position or self._target.digest(segment.offset, segment.length) != segment.sha256:
                    self._target.cut(size)
                    return
                position = align(segment.stop)
            for segment in segments:  # of what is in between there is no digest
                self._target.write(bytes(align(segment.stop) - segment.stop), segment.stop)
            size, self._position = segments[-1].stop, position
            if isinstance(record, AssetRecord):
                self.assets.append(record)
            else:
                self.records.append(record)
        self._target.cut(size)

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
        tensor.write(segments)
        self.finish(tensor.finish(record.error))

    def _commit(self) -> None:
        check_folders(asset.name for asset in self.assets)
        index = Index(
            hashlib.sha256(self._header).hexdigest(),
            tuple(self.records),
            tuple(self.assets),
            self._metadata,
            tuple(self.shards),
        ).encode()
        if len(index) > MAX_INDEX_BYTES:
            raise SourceError(f"the index would have {len(index)} bytes, more than an index may have")
        digest = hashlib.sha256(index)
        trailer = Trailer(self._position, len(index), digest.digest())
        self._target.write(index + trailer.pack(), self._position)
        if self._request:
            self._target.mark(self._request, digest.hexdigest())
        self._target.commit()
        if self._journal:
            self._journal.remove()
        self.root = digest.hexdigest()
        self.file_size = self._position + len(index) + TRAILER_SIZE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._end()
            return
        try:
            self._commit()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """Leave nothing of a run that failed; or all of it, to go on with."""
        if self._resume and self._journal:
            self._journal.close()
            self._target.keep()
            return
        if self._journal:
            self._journal.remove()
        self._target.discard()
