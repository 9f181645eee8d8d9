"""The tensors of a GGUF file that llama.cpp's own quantizer leaves as they are, since its programs read them as floats."""

from __future__ import annotations

from collections.abc import Sequence

_QUANTIZED = "weight"  # the end of the names of all others; ssm_a, for one, is a matrix without it

_NEVER = {"position_embd.weight", "token_types.weight"}

# Parts of names
_KEPT = (
    "_norm.weight",
    # small matrices of single architectures
    "altup",
    "laurel",
    "per_layer_model_proj",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "attn_rel_b.weight",
    # which experts are used
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    # convolutions of Mamba and others
    "ssm_conv1d",
    "shortconv.conv.weight",
    # RWKV
    *(f"time_mix_{part}.weight" for part in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused",
    )),
    # images and sound
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)  # fmt: skip


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Return whether llama.cpp's quantizer changes the type of a tensor; what it leaves alone, its programs want as floats."""
    dimensions = len(shape) - next((i for i, length in enumerate(shape) if length != 1), len(shape))
    return (
        dimensions >= 2 and name.endswith(_QUANTIZED) and name not in _NEVER and not any(part in name for part in _KEPT)
    )
