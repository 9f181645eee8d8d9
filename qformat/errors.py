"""The exceptions of qformat: every message is one line that names the cause, the place and a way out."""

from __future__ import annotations

from pathlib import Path

PathLike = str | Path

#: name of the distribution on the package index; the import name is ``qformat``
DISTRIBUTION = "qformat-models"


def install_hint(extra: str) -> str:
    """Return the command that installs the dependencies of an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def printable(text: str) -> str:
    """Return text that may come from a file with everything escaped that is not printable, such as a terminal's control codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class QFormatError(Exception):
    """Base class of all exceptions that qformat raises on purpose. Names in the message are escaped: they may be hostile."""

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(QFormatError, ValueError):
    """A file is damaged, incomplete, malicious or no container file.

    Parameters
    ----------
    cause
        Description of the defect.
    path
        Path of the file, if known.
    offset
        Position of the defect in the file, in bytes.
    """

    def __init__(self, cause: str, *, path: PathLike | None = None, offset: int | None = None) -> None:
        self.cause = cause
        self.path = None if path is None else str(path)
        self.offset = offset
        where = f"{self.path}: " if self.path is not None else ""
        at = f" (at byte {offset})" if offset is not None else ""
        super().__init__(f"{where}{cause}{at}")


class IntegrityError(FormatError):
    """A file is another one than was asked for, or was changed while it was open."""


class SourceError(QFormatError):
    """A checkpoint, or a tensor in it, cannot be read or converted with the given options."""


class TypeSpecError(QFormatError, ValueError):
    """A type string such as ``q4_0:search=naive`` is malformed, or names an unknown type or parameter."""


class TargetError(QFormatError, OSError):
    """An output file cannot be written or must not be replaced."""


class QualityError(QFormatError, ValueError):
    """A quality such as ``max_rmse=0.01`` is malformed, or the layers of a tensor do not reach it."""


class MissingDecoderError(QFormatError):
    """No decoder for the type of a tensor is installed; the file itself may be intact."""
