"""Decode tensors of a container piece by piece: what all readers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qformat.codecs.base import PIECE, Matrix, Piece, pieces
from qformat.codecs.registry import codec_of
from qformat.container.reader import ContainerReader
from qformat.dtypes import F32, DType, Elements
from qformat.errors import FormatError
from qformat.records import Segment, TensorRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TensorDecoder:
    """Decodes one tensor.

    Parameters
    ----------
    container
        The open file.
    record
        The tensor's record.

    Raises
    ------
    FormatError
        If the tensor cannot be decoded by this version, or its record is impossible.
    """

    def __init__(self, container: ContainerReader, record: TensorRecord) -> None:
        self._path = container.path
        self.record = record
        try:
            self.codec = codec_of(record)
        except FormatError as error:
            raise FormatError(error.cause, path=container.path) from None
        self.matrix = Matrix.of(record.shape)
        self._segments = [container.segment(segment) for segment in record.segments]

    @property
    def natural(self) -> DType:
        """What numpy gets if it asks for nothing else: the stored dtype, or float32 where numpy has none or codes were stored."""
        return self.codec.decoded if self.codec.decoded.native else F32

    def pieces(self) -> list[Piece]:
        """Return the pieces of the tensor."""
        return list(pieces(self.matrix, self.codec.grain(self.matrix)))

    def view(self) -> NDArray[Any] | None:
        """Return the stored elements, flat and read-only, without a copy, if that is what the codec stores."""
        stored = self.codec.decoded
        unchecked = stored.name == "bool"  # of which not all bytes are valid
        if self.record.codec != stored.name or not stored.native or unchecked:
            return None
        return np.frombuffer(self._segments[0], stored.storage)

    def decode(self, piece: Piece) -> Elements:
        """Return the values of one piece, two-dimensional."""
        out = np.empty((piece.rows, piece.cols), self.codec.decoded.storage)
        self._decode(piece, out)
        return Elements(self.codec.decoded, out)

    def decode_into(self, flat: NDArray[Any], dtype: DType, piece: Piece) -> None:
        """Put the values of one piece where they belong in the whole tensor.

        Parameters
        ----------
        flat
            The tensor's elements in row-major order, in the storage of `dtype`.
        dtype
            What to give the values as.
        piece
            Which ones.

        Raises
        ------
        TypeError
            If the tensor's values cannot be given as `dtype`.
        """
        target = flat[piece.elements(self.matrix)].reshape(piece.rows, piece.cols)
        if dtype is self.codec.decoded:
            self._decode(piece, target)
        else:
            target[:] = self.decode(piece).cast(dtype)

    def _decode(self, piece: Piece, out: NDArray[Any]) -> None:
        spans = self.codec.spans(self.matrix, piece)
        parts = [segment[span] for segment, span in zip(self._segments, spans, strict=True)]
        try:
            self.codec.decode(parts, out)
        except ValueError as error:
            raise FormatError(f"tensor {self.record.name!r} is damaged: {error}", path=self._path) from None


class SegmentChecker:
    """Compares each segment with its digest once, when it is first used."""

    def __init__(self, container: ContainerReader, *, enabled: bool) -> None:
        self._container = container
        self._enabled = enabled
        self._checked: set[Segment] = set()  # by all of its fields: an empty one has the offset of the next

    def check(self, record: TensorRecord) -> None:
        """Check a tensor's segments.

        Raises
        ------
        FormatError
            If one is damaged.
        """
        if not self._enabled:
            return
        for segment in record.segments:
            if segment not in self._checked:
                self._container.check(segment, record.label)
                self._checked.add(segment)


def runs(indices: NDArray[np.intp], cols: int, grain: int) -> list[tuple[int, Piece]]:
    """Group row numbers into pieces of consecutive rows, which are filled up to whole grains of the codec.

    Returns
    -------
    list of (int, Piece)
        Position of the piece's first row among `indices`, and the piece; of about `PIECE` elements at most.
    """
    longest = max(1, PIECE // max(1, -(-cols // grain) * grain))
    grouped: list[tuple[int, Piece]] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1 or i - start == longest:
            grouped.append((start, Piece(int(indices[start]), i - start, 0, cols)))
            start = i
    return grouped
