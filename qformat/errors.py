"""The errors that qformat raises on purpose; each is one line that says what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path

PathLike = str | Path


class QFormatError(Exception):
    """Base of every error in this module."""


class FormatError(QFormatError, ValueError):
    """A container file is damaged, incomplete, hostile or not a container file.

    Parameters
    ----------
    cause
        What is wrong.
    path
        The file, if it is known.
    offset
        Position in the file, in bytes, where it is wrong.
    """

    def __init__(self, cause: str, *, path: PathLike | None = None, offset: int | None = None) -> None:
        self.cause = cause
        self.path = None if path is None else str(path)
        self.offset = offset
        where = f"{self.path}: " if self.path is not None else ""
        at = f" (at byte {offset})" if offset is not None else ""
        super().__init__(f"{where}{cause}{at}")


class SourceError(QFormatError):
    """A checkpoint, or a tensor in it, cannot be converted as asked."""


class TypeSpecError(QFormatError, ValueError):
    """A type string such as ``q4_0:search=naive`` is malformed or names something unknown."""


class TargetError(QFormatError, OSError):
    """The output file cannot be written, or must not be."""


class QualityError(QFormatError, ValueError):
    """A quality such as ``max_rmse=0.01`` is malformed, or a layered tensor does not reach it."""


class MissingDecoderError(QFormatError):
    """A tensor, which may be sound, cannot be decoded here: a package is missing, or does not know its type either."""
