"""Codecs, one file for each family, and their registry. Knows nothing of files.

``base`` says what a codec is. A new codec is one new module here: it is found and imported by ``registry``.
"""
