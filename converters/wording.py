"""Phrases that messages share."""

from __future__ import annotations

from collections.abc import Sized


def and_more(items: Sized, shown: int = 1) -> str:
    """Return `` and 3 more`` after a message has named some items, or nothing if it has named all."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""
