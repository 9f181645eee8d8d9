"""Entropy coding of bytes: streams of symbols (spec/codecs.md, "Streams")."""
