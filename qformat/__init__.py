"""qformat: model checkpoints in one small, versioned, checksummed container file.

The names below are imported on first use, so that ``import qformat`` and the commands that only look at files stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qformat.errors import (
    FormatError,
    IntegrityError,
    QFormatError,
    QualityError,
    SourceError,
    TargetError,
    TypeSpecError,
)

if TYPE_CHECKING:
    from qformat.converters.arrays import save_file
    from qformat.readers.arrays import safe_open

__version__ = "0.7.0"

__all__ = [
    "FormatError",
    "IntegrityError",
    "QFormatError",
    "QualityError",
    "SourceError",
    "TargetError",
    "TypeSpecError",
    "__version__",
    "safe_open",
    "save_file",
]

_LAZY = {"safe_open": "qformat.readers.arrays", "save_file": "qformat.converters.arrays"}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
