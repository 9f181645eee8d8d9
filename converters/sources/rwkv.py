"""The version of RWKV, whose checkpoints have no configuration beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ALWAYS = {"emb.weight", "ln_out.weight", "head.weight", "blocks.0.ln0.weight"}


def rwkv_version(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return the version of RWKV that has tensors of these names and shapes, or None if it is another architecture."""
    if not shapes.keys() >= _ALWAYS:
        return None
    parts = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    if "att.r_k" in parts:
        return "7"
    if any("time_maa" in name for name in parts):
        return "6"
    if not any("ln_x" in name for name in parts):
        return "4"
    if not any("gate" in name for name in parts):
        return "5"
    decay = parts.get("att.time_decay", ())
    return "5.2" if len(decay) > 1 and decay[1] > 1 else "5.1"
