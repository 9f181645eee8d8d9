"""Names of parameters that training wrappers have changed, such as those of torch.compile and DistributedDataParallel.

One rule holds for every kind of source. A component that only wrappers use is removed wherever it stands, since parts of a model
can be wrapped as well. ``module``, which models use too, is removed only if every name begins with it; beside an averaged model's
counter, which is no parameter of the model, if every other name does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from qformat.converters.wording import and_more
from qformat.pipeline.source import Checkpoint, SourceTensor

# Of torch.compile, FSDP, activation checkpointing, Lightning Fabric, and fairscale's FSDP
_ALWAYS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
_MODULE = "module."  # of DataParallel, DistributedDataParallel, DeepSpeed and AveragedModel
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def plain_names(names: Collection[str]) -> Mapping[str, str]:
    """Return the name of each parameter without wrappers; the names themselves if two would become equal."""
    plain = {name: ".".join(part for part in name.split(".") if part not in _ALWAYS) or name for name in names}
    while _all_within_module(plain.values()):
        plain = {name: text.removeprefix(_MODULE) for name, text in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in names}


def _all_within_module(names: Collection[str]) -> bool:
    others = [name for name in names if name != _COUNTER]
    return bool(others) and all(name.startswith(_MODULE) and name != _MODULE for name in others)


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the names that its tensors have without wrappers, and a warning if there were any."""
    plain = plain_names([tensor.name for tensor in checkpoint.tensors])
    changed = [name for name, text in plain.items() if name != text]
    if not changed:
        return checkpoint
    tensors = {plain[tensor.name]: tensor for tensor in checkpoint.tensors}
    words = sorted({part for name in changed for part in name.split(".")[:-1] if part in (*_ALWAYS, _MODULE[:-1])})
    example = f"{changed[0]!r} is {plain[changed[0]]!r} here{and_more(changed)}"
    warnings = [*checkpoint.warnings, f"{', '.join(words)} of training wrappers left out of names: {example}"]
    metadata = dict(checkpoint.metadata)
    averaged = tensors.get(_COUNTER)
    if averaged is not None and any(name.startswith(_MODULE) for name in changed) and _is_count(averaged):
        metadata.setdefault(_COUNTER, str(int(tensors.pop(_COUNTER).read(slice(0, 1)).data[0])))
        warnings.append(f"{_COUNTER!r}, the counter of an averaged model, is stored in the metadata")
    return replace(
        checkpoint,
        tensors=[tensor.renamed(name) for name, tensor in tensors.items()],
        warnings=warnings,
        metadata=metadata,
    )


def _is_count(tensor: SourceTensor) -> bool:
    return tensor.dtype.name == "i64" and math.prod(tensor.shape) == 1
