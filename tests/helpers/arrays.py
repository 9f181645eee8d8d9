"""Measures of arrays."""

from __future__ import annotations

import numpy as np


def distance(x: np.ndarray, entries: np.ndarray) -> float:
    """Return the root mean square of the distances to the nearest entries."""
    entries = np.asarray(entries, np.float64)
    borders = (entries[1:] + entries[:-1]) / 2
    return float(np.sqrt(np.mean((x - entries[np.searchsorted(borders, x)]) ** 2)))
