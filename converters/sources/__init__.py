"""Checkpoints of every kind as tensors that can be read piece by piece; `detect` finds out which one it is."""
