"""Significance coding in layers: the codec, its encoder, and their parts."""

from qformat.codecs.scm.codec import Scm
from qformat.codecs.scm.encoder import ScmEncoder

__all__ = ["Scm", "ScmEncoder"]
