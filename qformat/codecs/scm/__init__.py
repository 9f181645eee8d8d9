"""Significance coding in layers: `codec` (what a file holds), `encoder` (what can be asked for), and their parts."""

from qformat.codecs.scm.codec import Scm
from qformat.codecs.scm.encoder import ScmEncoder

__all__ = ["Scm", "ScmEncoder"]
