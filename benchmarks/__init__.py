"""Measurements of qformat against peers and the machine's own limits; ``python -m benchmarks``."""
