"""The container file: layout, index, writing, reading, verification. Knows nothing of codecs' insides."""
