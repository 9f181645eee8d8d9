"""Read containers into numpy arrays and torch tensors. Imported as ``qformat.readers``."""
