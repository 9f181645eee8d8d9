"""Checkpoints into containers and back. Imported as ``qformat.converters``."""

#: what floating tensors of two or more dimensions become if nothing is said
DEFAULT_TYPE = "q4_0"
