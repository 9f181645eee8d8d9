"""Layers that other tools have quantized, as tensors whose codes are copied; `recognize` finds them."""
