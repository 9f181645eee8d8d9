"""Containers into arrays: numpy, torch. Imported as ``qformat.readers``."""
