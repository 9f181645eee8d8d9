"""Entropy coding of bytes: streams of letters (spec/codecs.md, "Streams")."""
