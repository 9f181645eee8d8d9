"""Load weights into inference code.

python examples/load_in_inference.py MODEL.qf
"""

from __future__ import annotations

import json
import sys

import torch

import qformat
from qformat.readers.torch import load_file

path = sys.argv[1]

# All tensors for torch, in one dtype. Their bytes are checked on the way; damage raises qformat.FormatError.
state = load_file(path, dtype=torch.bfloat16)
print(f"{len(state)} tensors, {sum(tensor.numel() for tensor in state.values())} weights")

# Or one at a time with numpy, without torch: here three rows of the largest matrix, and the configuration if there is one.
with qformat.safe_open(path) as f:
    config = json.loads(f.get_asset("config.json")) if "config.json" in f.assets() else {}
    largest = max(f.keys(), key=lambda name: f.info(name).elements)
    rows = f.get_rows(largest, [0, 1, 2])
print(f"model type {config.get('model_type')}, first rows of {largest}: {rows.shape} {rows.dtype}")
