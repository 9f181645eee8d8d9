"""What a run has finished of a file, so that another one can go on if it is killed.

The journal stands beside the partial file: a line of JSON that tells what was asked for, then one for each asset and tensor,
written after all of its bytes. Each line begins with a digest of the rest. Nothing in it is believed before the bytes have been
compared with their digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qformat.container.index import parse_asset, parse_tensor
from qformat.container.target import journal_draft
from qformat.errors import FormatError, TargetError
from qformat.records import AssetRecord, TensorRecord

Record = AssetRecord | TensorRecord


class Journal:
    """The journal of one run; whoever holds the lock of the partial file may use it.

    Parameters
    ----------
    path
        The journal's file.
    request
        Identifies everything that decides the bytes of the file that is written.
    """

    def __init__(self, path: Path, request: str) -> None:
        self._path = path
        self._request = request
        self._fd: int | None = None

    def records(self) -> Iterator[Record]:
        """Yield what an earlier run with the same request has finished, as far as the journal can be read."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError:
            return
        if not lines or _parse(lines[0]) != {"request": self._request}:
            return
        for line in lines[1:]:
            record = _record(_parse(line))
            if record is None:
                return
            yield record

    def begin(self, done: list[Record]) -> None:
        """Start anew, with what was done already.

        Raises
        ------
        TargetError
            If it cannot be written.
        """
        new = journal_draft(self._path)
        try:
            self._fd = os.open(
                new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            self._write({"request": self._request})
            for record in done:
                self.add(record)
            new.replace(self._path)
        except OSError as error:
            raise TargetError(f"{self._path}: cannot be written: {error.strerror}") from None

    def add(self, record: Record) -> None:
        """Note that all bytes of an asset or a tensor were written.

        Raises
        ------
        TargetError
            If it cannot be written.
        """
        key = "asset" if isinstance(record, AssetRecord) else "tensor"
        try:
            self._write({key: record.to_json()})
        except OSError as error:
            raise TargetError(f"{self._path}: cannot be written: {error.strerror}") from None

    def _write(self, line: dict[str, Any]) -> None:
        assert self._fd is not None
        text = json.dumps(line).encode()
        os.write(self._fd, _digest(text) + b" " + text + b"\n")

    def close(self) -> None:
        """Close it, and leave it to a run that goes on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Close it, and remove it."""
        self.close()
        for path in (self._path, journal_draft(self._path)):
            path.unlink(missing_ok=True)


def _parse(line: bytes) -> Any:
    """Return what a line says, or None for one that was not finished or is damaged."""
    digest, _, text = line.removesuffix(b"\n").partition(b" ")
    try:
        return json.loads(text) if line.endswith(b"\n") and digest == _digest(text) else None
    except ValueError:
        return None


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def _record(value: Any) -> Record | None:
    try:
        if isinstance(value, dict) and "tensor" in value:
            return parse_tensor(value["tensor"])
        if isinstance(value, dict) and "asset" in value:
            return parse_asset(value["asset"])
    except FormatError:
        pass
    return None
