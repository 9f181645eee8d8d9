"""A Hugging Face model as GGUF describes it: hyperparameters from config.json, the tokenizer, and names of tensors.

For models like Llama with a byte-level BPE tokenizer. Keys and names are those that llama.cpp reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.converters.exports.described import CONFIG, Description
from qformat.converters.exports.gguf_config import Hyperparameters
from qformat.converters.exports.gguf_tokenizer import tokenizer_values
from qformat.converters.exports.roles import is_activation_scale
from qformat.converters.wording import and_more
from qformat.dtypes import F32
from qformat.pipeline.source import SourceTensor, StoredSource

# In the order of the file
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EMBEDDING, _OUTPUT, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm"
_COMPUTED = re.compile(r"(model\.layers\.[0-9]+\.self_attn|model)\.rotary_emb\.(inv_freq|\w+_cached)")


@dataclass(frozen=True)
class Place:
    """The name of a tensor in GGUF, and the number of its heads if their rows are permuted."""

    name: str
    heads: int = 0


@dataclass
class Places:
    """The place of each tensor in GGUF by its name, in the order of the file, and warnings about tensors that have none."""

    places: dict[str, Place] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Model:
    """A Hugging Face model, described by its files (config.json, tokenizer.json and others); `label` names it in messages.

    Raises `SourceError` if there is no description, or the model is not supported.
    """

    def __init__(self, assets: Mapping[str, bytes], label: str) -> None:
        self._description = Description(assets, label)
        self._hyperparameters = Hyperparameters(self._description)

    def places(self, tensors: Mapping[str, SourceTensor]) -> Places:
        """Return the places of tensors, leaving out those that are computed, or that do nothing.

        Raises `SourceError` if such a model has no tensor of some name, or lacks one, or has one of another shape.
        """
        found = Places()
        left = {name: tensor for name, tensor in tensors.items() if not _COMPUTED.fullmatch(name)}
        self._place_embedding(found, left)
        for layer in range(self._hyperparameters.layers):
            for theirs, ours in _LAYER.items():
                self._place(found, left, f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}")
        self._place(found, left, _NORM, "output_norm")
        self._place_output(found, left, tensors[_EMBEDDING])
        self._leave_out(found, left, [name for name in left if is_activation_scale(name)], "only scales activations")
        zeros = [name for name in left if name.endswith(".bias") and _is_zero(left[name])]
        self._leave_out(found, left, zeros, "is zero")
        if left:
            self._description.refuse(f"a {self._architecture} model has no tensor {min(left)!r}")
        return found

    def values(self, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
        """Return the value of each key, including the tokenizer's, given the number of rows of the embedding; and warnings.

        Raises `SourceError` if something is missing or not supported.
        """
        values = self._hyperparameters.values() | {f"{self._architecture}.vocab_size": vocabulary}
        tokenizer, warnings = tokenizer_values(self._description, self._architecture, vocabulary)
        return values | tokenizer, warnings

    def frequencies(self) -> NDArray[np.float32] | None:
        """Return the divisors of the frequencies of Llama 3's rotary embeddings, a tensor in GGUF; None for other models."""
        return self._hyperparameters.frequencies()

    @property
    def _architecture(self) -> str:
        return self._hyperparameters.architecture.name

    def _place(self, found: Places, left: dict[str, SourceTensor], theirs: str, ours: str) -> None:
        """Place the weight of a module, and its bias if it has one."""
        kind = ours.rpartition(".")[2]
        shape = self._hyperparameters.shapes[kind]
        heads = self._heads(kind)
        self._take(found, left, f"{theirs}.weight", shape, Place(f"{ours}.weight", heads))
        if kind in self._hyperparameters.biases:
            self._take(found, left, f"{theirs}.bias", shape[:1], Place(f"{ours}.bias", heads))

    def _take(
        self, found: Places, left: dict[str, SourceTensor], name: str, shape: tuple[int, ...], place: Place
    ) -> None:
        if name not in left:
            self._description.refuse(f"tensor {name!r} is missing")
        tensor = left.pop(name)
        if tensor.shape != shape:
            self._description.refuse(
                f"tensor {name!r} is of shape {[*tensor.shape]}, and not {[*shape]} as {CONFIG} says"
            )
        if not tensor.dtype.floating:
            self._description.refuse(f"tensor {name!r} holds integers of type {tensor.dtype.name}")
        found.places[name] = place

    def _place_embedding(self, found: Places, left: dict[str, SourceTensor]) -> None:
        embedding = left.get(_EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            self._description.refuse("there is no token embedding")
        self._take(
            found, left, _EMBEDDING, (embedding.shape[0], self._hyperparameters.width), Place("token_embd.weight")
        )

    def _place_output(self, found: Places, left: dict[str, SourceTensor], embedding: SourceTensor) -> None:
        """Place the output matrix, which is missing in models that use the embedding for it; some have it all the same."""
        tied = self._hyperparameters.tied
        if tied and _OUTPUT not in left:
            pass
        elif tied and _same(left[_OUTPUT], embedding):
            self._leave_out(found, left, [_OUTPUT], "is the embedding again")
        elif tied and not (_is_lossy(left[_OUTPUT]) or _is_lossy(embedding)):
            self._description.refuse(
                f"tensor {_OUTPUT!r} is not the embedding, as tie_word_embeddings of {CONFIG} says"
            )
        elif not tied and _OUTPUT not in left:
            self._description.refuse(f"tensor {_OUTPUT!r} is missing, and tie_word_embeddings of {CONFIG} is not true")
        else:
            self._take(found, left, _OUTPUT, embedding.shape, Place("output.weight"))

    def _leave_out(self, found: Places, left: dict[str, SourceTensor], names: list[str], reason: str) -> None:
        for name in names:
            del left[name]
        if names:
            found.warnings.append(f"tensor {names[0]!r}{and_more(names)} {reason}: left out")

    def _heads(self, kind: str) -> int:
        hyperparameters = self._hyperparameters
        if not hyperparameters.architecture.permuted or kind not in ("attn_q", "attn_k"):
            return 0
        return hyperparameters.heads if kind == "attn_q" else hyperparameters.key_heads


def _same(one: SourceTensor, other: SourceTensor) -> bool:
    if one.shape != other.shape:
        return False
    chunks = one.matrix.chunks(1)
    return all(
        np.array_equal(one.read_chunk(c).cast(F32), other.read_chunk(c).cast(F32), equal_nan=True) for c in chunks
    )


def _is_lossy(tensor: SourceTensor) -> bool:
    return isinstance(tensor, StoredSource) and bool(tensor.record.error)


def _is_zero(tensor: SourceTensor) -> bool:
    return not any(np.any(tensor.read_chunk(chunk).cast(F32)) for chunk in tensor.matrix.chunks(1))
