"""Checks of a checkpoint's content: that it holds weights, and not the placeholders or the state of a parallel training run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from qformat.converters.sources.parallel_parts import Format, part_error
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.pipeline.source import Checkpoint, SourceTensor

# The key of the values beside a state dict of DeepSpeed that says how many processes have parts of each matrix
_WORLD_SIZE = "mp_world_size"
_EXTRAS = "checkpoint.json"


_LONGEST = 1 << 14  # bytes of the state of a generator of random numbers


def check_elements(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint; raise `SourceError` if it holds no weights, or placeholders of some."""
    tensors = checkpoint.tensors
    empty = [tensor.name for tensor in tensors if _is_placeholder(tensor)]
    if empty:
        raise SourceError(
            f"{path}: no elements in tensor {empty[0]!r}{and_more(empty)}, which DeepSpeed's ZeRO-3 leaves in place of weights; "
            "join them with python zero_to_fp32.py CHECKPOINT_FOLDER merged, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if tensors and not any(math.prod(tensor.shape) for tensor in tensors):
        raise SourceError(f"{path}: holds no weights: none of its {len(tensors)} tensors has an element")
    if tensors and all(
        tensor.dtype.name == "u8" and len(tensor.shape) == 1 <= tensor.shape[0] < _LONGEST for tensor in tensors
    ):
        raise SourceError(
            f"{path}: holds no weights, only bytes such as the state of random numbers ({tensors[0].name!r}{and_more(tensors)})"
        )
    return checkpoint


def _is_placeholder(tensor: SourceTensor) -> bool:
    return tensor.shape == (0,) and tensor.name.rpartition(".")[2] == "weight"


def check_alone(path: Path, parts: Format, checkpoint: Checkpoint) -> None:
    """Raise `SourceError` unless a file that is a part by its name says that there are no others."""
    try:
        world = json.loads(checkpoint.assets[_EXTRAS]()).get(_WORLD_SIZE)
    except (KeyError, ValueError):
        world = None
    if world != 1:
        raise part_error(path, parts)
