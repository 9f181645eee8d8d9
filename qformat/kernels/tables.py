"""Tables shared by the numba and the numpy kernels."""

from __future__ import annotations

import numpy as np

# Q4_0: |d| = largest magnitude / c for these c, the few of many tried that together lose least.
DIVISORS = np.array([8, 8.6, 7.2, 8.3, 7.7, 8.9, 6.9, 6.2, 7.4, 8.15, 7.05, 8.45], np.float32)

# Q4_1: inverse scales to try for a given minimum, times the distance of the largest weight from it.
FEW_LEVELS = np.array((15, 14, 13, 12, 11, 10, 9, 8), np.float32)
MORE_LEVELS = np.arange(7, 17, 0.25).astype(np.float32)

# Q4_1: first lines to try, (slope, offset), for weights scaled to the range 0 to 15. They were picked one by one from a fine grid:
# each reduced the error of samples of many distributions most. (The last of FEW is for nine equally spaced values.)
# fmt: off
FEW = np.array((
    (1.02, -0.025), (0.84, 2.7), (1.02, -0.4), (0.96, 0.8), (1.02, -0.15), (1.02, 0.225), (0.88, -0.1),
    (1.02, -0.275), (1.02, 0.1), (1.02, -0.525), (0.94, -0.175), (0.6, 4), (0.9333, 0.125), (0.98, 0.15), (0.7333, 0),
    (1.06, -0.45), (0.88, 0.65), (0.98, 0), (1.06, -0.575), (1.06, -0.2), (0.98, 0.3), (0.66, 4.05), (0.94, 0.7),
    (0.9333, 1.25), (0.5333, 3),
), np.float32)
MORE = np.array((
    (1.04, -0.675), (0.88, 1.15), (0.9333, 0), (0.54, 6.9), (1.06, -0.325), (1.04, 0.075), (0.98, 0.525),
    (0.98, -0.1), (0.82, 0.975), (1.04, -0.55), (0.88, 1.8), (0.98, 0.15), (0.98, 0.4), (0.96, -0.075), (1.04, -0.3),
    (0.9, 0.125), (1.06, -0.075), (1.04, -0.425), (1, -0.375), (1, 0.125), (0.98, 0.025), (0.78, 0.775), (1, 0.375),
    (0.88, 0.65),
), np.float32)
# fmt: on

# NLM: the upper half of each mapping's integers T (spec/codecs.md); T[15 - q] is 16384 - T[q].
NLM_UPPER = np.array(
    [
        [8738, 9830, 10923, 12015, 13107, 14199, 15292, 16384],
        [8647, 9564, 10503, 11481, 12520, 13650, 14913, 16384],
        [8590, 9395, 10230, 11117, 12092, 13207, 14563, 16384],
        [8526, 9205, 9914, 10683, 11554, 12604, 14009, 16384],
    ]
)
