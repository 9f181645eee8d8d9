"""Checkpoints of every kind as tensors that can be read chunk by chunk; `detect` finds out which one it is."""
