"""Significance coding in layers: see `qformat.codecs.scm.codec`."""

from qformat.codecs.scm.codec import Scm

__all__ = ["Scm"]
