"""Checkpoints into containers, one module for each kind of source. Imported as ``qformat.converters``."""
