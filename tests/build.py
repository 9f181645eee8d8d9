"""Builders of container files, under the name by which scripts outside the suite import them."""

from __future__ import annotations

from tests.helpers.files import Draft, raw_tensor

__all__ = ["Draft", "raw_tensor"]
