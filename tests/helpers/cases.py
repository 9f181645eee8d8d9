"""Edits of a small file, and the check that both readers respond to each of them as expected."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.helpers.files import VOCABULARY, Draft, Edit, small_draft, trailer_record, zstd_asset
from tests.helpers.hostile import compare_readers, read_reference

NAMES = [tensor["name"] for tensor in small_draft().tensors]
ASSETS = [asset["name"] for asset in small_draft().assets]
TWO_53 = 2**53
FRAME = zstandard.ZstdCompressor(level=9).compress(VOCABULARY)
SKIPPED = trailer_record(b"a signature, say")
# paths of tensors in the index of the small file
A, B, LAST = ("tensors", "a.weight"), ("tensors", "b.weight"), ("tensors", "zhalf")


@dataclass(frozen=True)
class Case:
    """A change of the small file, and how readers have to respond.

    Attributes
    ----------
    refused
        Whether opening fails.
    lost
        Names of the tensors and assets that cannot be read; all others can.
    says
        A part of the message.
    verified
        Whether `verify` finds no error; by default that follows from `refused` and `lost`.
    """

    name: str
    edit: Edit
    refused: bool = False
    lost: tuple[str, ...] = ()
    says: str = ""
    verified: bool | None = None


def edits(*steps: Edit) -> Edit:
    def edit(draft: Draft) -> bytes | None:
        done = None
        for step in steps:
            done = step(draft)
        return done

    return edit


def add_tensor(record: dict[str, Any]) -> Edit:
    """Add a tensor where its name belongs."""

    def edit(draft: Draft) -> None:
        draft.tensors.append(deepcopy(record))
        draft.tensors.sort(key=lambda tensor: tensor["name"])

    return edit


def add_asset(record: dict[str, Any]) -> Edit:
    def edit(draft: Draft) -> None:
        draft.assets.append(deepcopy(record))
        draft.assets.sort(key=lambda asset: asset["name"])

    return edit


def before_placing(change: Callable[[Draft], object]) -> Edit:
    def edit(draft: Draft) -> None:
        change(draft)

    return edit


class Cases(list[Case]):
    """Cases that both readers have to agree on."""

    def fine(self, name: str, edit: Edit) -> None:
        """Expect everything to be readable."""
        self.append(Case(name, edit))

    def refused(self, name: str, edit: Edit, says: str = "") -> None:
        """Expect that the file cannot be opened."""
        self.append(Case(name, edit, refused=True, says=says))

    def loses(self, names: str | tuple[str, ...], name: str, edit: Edit, says: str = "") -> None:
        """Expect that only these tensors and assets cannot be read."""
        self.append(Case(name, edit, lost=(names,) if isinstance(names, str) else names, says=says))

    def damaged(self, names: str | tuple[str, ...], name: str, edit: Edit, says: str = "") -> None:
        """Expect the same, and that `verify` finds an error."""
        lost = (names,) if isinstance(names, str) else names
        self.append(Case(name, edit, lost=lost, says=says, verified=False))

    @property
    def each(self) -> pytest.MarkDecorator:
        """A test of each case, by name."""
        names = [case.name.encode("unicode_escape").decode() for case in self]
        assert len(set(names)) == len(names), "two cases have the same name"
        return pytest.mark.parametrize("case", self, ids=names)


def check(case: Case, path: Path) -> None:
    """Assert that both readers and `verify` respond to a case as expected."""
    small, draft = small_draft().pack(), small_draft()
    data = case.edit(draft) or draft.pack()
    content, report = compare_readers(path, data)
    if case.refused:
        assert content.refused is not None
        assert case.says in content.refused
        assert not report.ok
        return
    assert content.refused is None
    assert {name for _, name in content.errors} == set(case.lost)
    for (_, name), message in content.errors.items():
        assert case.says in message
        assert name in message
    if case.verified is not None:
        assert report.ok == case.verified
    else:  # verify decodes assets, for that needs no codec
        refused = "needs" in case.says or "unknown encoding" in case.says or "must" in case.says
        assert report.ok or ("x.bin" in case.lost and not refused)
    original = read_reference(small)
    touched = {*case.lost, "a.weight", "bool"}
    for key in content.values.keys() & original.values.keys():
        if key[1] not in touched:
            assert content.values[key] == original.values[key]


def handmade(
    claim: int, *, descriptor: int = 0xE0, extra: bytes = b"", kind: int = 1, content: bytes = b"r", block: int = 100
) -> bytes:
    """Return a frame that says `claim` bytes, of one block: by default a hundred times the letter r, run-length encoded.

    The default descriptor is that of a single segment with eight bytes of content size.
    """
    head = (0xFD2FB528).to_bytes(4, "little") + bytes([descriptor]) + extra + claim.to_bytes(8, "little")
    return head + (block << 3 | kind << 1 | 1).to_bytes(3, "little") + content


def stored(frame: bytes, content: bytes = VOCABULARY, **fields: Any) -> Edit:
    """Store an asset `x.bin` as this frame."""
    return add_asset(zstd_asset("x.bin", content, frame) | fields)
