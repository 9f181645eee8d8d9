"""The keys of config.json: those that GGUF has words for, those that change nothing, and the refusal of all others.

A key with the value null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.converters.exports.described import CONFIG, Description, JsonObject

# Read here or elsewhere in the export
_READ = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "cls_token_id", "mask_token_id",
}  # fmt: skip

# Training, generation, bookkeeping, and how a program computes
_NEUTRAL = {
    "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop", "embedding_dropout",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range",
    "is_llama_config", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache", "use_flash_attention_2", "use_flash_attn", "_attn_implementation", "_attn_implementation_autoset",
    "_commit_hash", "_flash_attn_2_enabled", "_name_or_path",
}  # fmt: skip

# Left in by `exports.quantization` only if tensors are what another tool made of them
_QUANTIZED = {"quantization_config", "compression_config", "quantization"}

# The values with which such a key changes nothing
_ONLY: Mapping[str, Sequence[Any]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}

_ROPE = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
_LLAMA3 = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
_ROPE_KEYS = {
    "default": _ROPE,
    "linear": _ROPE | {"factor"},
    "yarn": _ROPE | _YARN | {"mscale_all_dim", "truncate"},
    "llama3": _ROPE | _LLAMA3,
}
_THETA = 10000.0  # if nothing is said
# What llama.cpp computes with if a file says nothing else
_BETAS = {"beta_fast": 32, "beta_slow": 1}
_CLOSE = 1e-6


@dataclass(frozen=True)
class Architecture:
    """An architecture in GGUF, and what transformers' class of that name does if config.json says nothing.

    Attributes
    ----------
    name
        GGUF's name of it.
    model_type
        Its name in config.json.
    permuted
        Whether GGUF has the rows of query and key matrices in another order.
    biases
        The matrices with a bias, by the flag of config.json that says so; the flag "" is always set.
    key_heads
        Heads of keys and values; None is as many as of queries.
    window
        Length of the sliding window.
    llama3
        Whether llama.cpp reads the frequencies of Llama 3 for it.
    """

    name: str
    model_type: str
    permuted: bool
    biases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    key_heads: int | None = None
    window: int | None = None
    llama3: bool = False


_ATTENTION = ("attn_q", "attn_k", "attn_v")
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        "llama",
        "llama",
        permuted=True,
        biases={"attention_bias": (*_ATTENTION, "attn_output"), "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")},
        llama3=True,
    ),
    "MistralForCausalLM": Architecture("llama", "mistral", permuted=True, key_heads=8, window=4096, llama3=True),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", "qwen2", permuted=False, biases={"": _ATTENTION}, key_heads=32, window=4096
    ),
}


class Hyperparameters:
    """What config.json says about a model's computation.

    Raises `SourceError` if the architecture is not supported, or a key says something that GGUF has no word for.
    """

    def __init__(self, description: Description) -> None:
        self._description = description
        self._config = description.config
        names = self._config.get("architectures")
        known = [name for name in names if name in ARCHITECTURES] if isinstance(names, list) else []
        if not isinstance(names, list) or len(names) != 1 or not known:
            description.refuse(f"it is of architecture {names}, and only {', '.join(ARCHITECTURES)} are supported")
        self.architecture = ARCHITECTURES[known[0]]
        self._check_keys()
        self._check_window()
        self.rotation, self._rope = self._read_rope()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._description.number("num_hidden_layers")

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self._description.number("hidden_size")

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self._description.number("num_attention_heads")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self._description.number("num_key_value_heads", self.architecture.key_heads or self.heads)

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self._description.number("head_dim", self.width // self.heads or 1)

    @property
    def tied(self) -> bool:
        """Whether the output is computed with the embedding."""
        return self._config.get("tie_word_embeddings") is True

    @property
    def biases(self) -> set[str]:
        """The matrices that have a bias, by GGUF's name without the layer."""
        flags = self.architecture.biases
        return {name for flag, names in flags.items() if not flag or self._config.get(flag) is True for name in names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a layer, and of the norm after them."""
        width, inner = self.width, self._description.number("intermediate_size")
        queries, keys = self.heads * self.head, self.key_heads * self.head
        return {
            "attn_norm": (width,),
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, queries),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
            "output_norm": (width,),
        }

    def values(self) -> dict[str, Any]:
        """Return the value of each key of GGUF."""
        arch, number = self.architecture.name, self._description.number
        values: dict[str, Any] = {
            "general.architecture": arch,
            "general.type": "model",
            f"{arch}.block_count": self.layers,
            f"{arch}.context_length": number("max_position_embeddings"),
            f"{arch}.embedding_length": self.width,
            f"{arch}.feed_forward_length": number("intermediate_size"),
            f"{arch}.attention.head_count": self.heads,
            f"{arch}.attention.head_count_kv": self.key_heads,
            f"{arch}.attention.layer_norm_rms_epsilon": self._description.real("rms_norm_eps", self._config),
        }
        if self.head * self.heads != self.width:
            values |= {f"{arch}.attention.{kind}_length": self.head for kind in ("key", "value")}
        values |= {f"{arch}.rope.dimension_count": self.head, f"{arch}.rope.freq_base": self._real("rope_theta")}
        if self.rotation in ("linear", "yarn"):
            values |= {f"{arch}.rope.scaling.type": self.rotation, f"{arch}.rope.scaling.factor": self._real("factor")}
        if self.rotation == "yarn":
            length = self._real("original_max_position_embeddings")
            values[f"{arch}.rope.scaling.original_context_length"] = int(length)
        return values

    def frequencies(self) -> NDArray[np.float32] | None:
        """Return the divisors of the frequencies of Llama 3's rotary embeddings, a tensor in GGUF; None for other models."""
        if self.rotation != "llama3":
            return None
        factor, low, high = (self._real(f"{key}factor") for key in ("", "low_freq_", "high_freq_"))
        length = self._real("original_max_position_embeddings")
        if low >= high:
            self._description.refuse(f"low_freq_factor of {CONFIG} is not below high_freq_factor")
        turns = length / (2 * np.pi * self._real("rope_theta") ** (np.arange(0, self.head, 2) / self.head))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

    def _real(self, key: str) -> float:
        return self._description.real(key, self._rope)

    def _check_keys(self) -> None:
        refuse = self._description.refuse
        type_ = self._config.get("model_type")
        if type_ not in (None, self.architecture.model_type):
            refuse(f"model_type of {CONFIG} is {type_!r}, which is not that of its architecture")
        for key, value in self._config.items():
            if value is None or key in _READ or key in _NEUTRAL:
                continue
            if key in _QUANTIZED:
                refuse(f"{key} of {CONFIG} says that weights are quantized, in a way that is not known")
            if key not in _ONLY:
                refuse(
                    f"{CONFIG} has {key!r}, which may change what the model computes, and which this export does not know"
                )
            if value not in _ONLY[key]:
                refuse(
                    f"{key} of {CONFIG} is {value!r}, which a {self.architecture.name} model of GGUF has no word for"
                )
        for flag, values in (("attention_bias", _ATTENTION), ("mlp_bias", ("ffn_up",))):
            has = any(values[0] in names for names in self.architecture.biases.values())
            if flag not in self.architecture.biases and self._config.get(flag) not in (None, has):
                refuse(
                    f"{flag} of {CONFIG} is {self._config[flag]!r}, which a {self.architecture.model_type} model never is"
                )

    def _check_window(self) -> None:
        """Refuse sliding windows that are shorter than the context, unless no layer has one."""
        window = self._config.get("sliding_window", self.architecture.window)
        kinds = self._config.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
            self._description.refuse(f"layer_types of {CONFIG} are not all 'full_attention'")
        if window is None or self._description.number("max_position_embeddings") <= window:
            return
        if self.architecture.model_type == "qwen2":
            first = self._config.get("max_window_layers", 28)
            if kinds is not None or not self._config.get("use_sliding_window") or self.layers <= first:
                return
        self._description.refuse(
            f"it has a sliding window of {window} tokens, which a {self.architecture.name} model of GGUF has no word for"
        )

    def _read_rope(self) -> tuple[str, JsonObject]:
        """Return the type of rotary embeddings, and their parameters, which are under one of two keys."""
        refuse = self._description.refuse
        found = [self._config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(values, dict) for values in found):
            refuse(f"rope_parameters of {CONFIG} are invalid")
        if all(found) and found[0] != found[1]:
            refuse(f"rope_scaling and rope_parameters of {CONFIG} differ")
        said = {key: value for key, value in (found[0] or found[1]).items() if value is not None}
        theta = self._config.get("rope_theta")
        if None not in (theta, said.get("rope_theta")) and theta != said["rope_theta"]:
            refuse(f"{CONFIG} has two values of rope_theta: {theta} and {said['rope_theta']}")
        rope = {"rope_theta": _THETA if theta is None else theta} | said
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.get("type", kind) != kind:
            refuse(f"{CONFIG} has two types of rotary embeddings: {kind!r} and {rope['type']!r}")
        if not isinstance(kind, str) or kind not in _ROPE_KEYS or (kind == "llama3" and not self.architecture.llama3):
            refuse(f"rotary embeddings of type {kind!r} are not supported for a {self.architecture.name} model")
        unknown = sorted(rope.keys() - _ROPE_KEYS[kind])
        if unknown:
            refuse(f"{unknown[0]!r} of rotary embeddings of type {kind!r} has no word in GGUF")
        if rope.get("partial_rotary_factor", 1) != 1:
            refuse(f"only a part of each head is rotated (partial_rotary_factor {rope['partial_rotary_factor']})")
        if kind == "yarn":
            self._check_yarn(rope)
        return kind, rope

    def _check_yarn(self, rope: JsonObject) -> None:
        """Refuse parameters that differ from those that llama.cpp derives from the factor."""
        real = self._description.real
        factor = real("factor", rope)
        scale = 0.1 * math.log(factor) + 1
        scaled = [0.1 * real(key, rope) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim") if rope.get(key)]
        usual = {**_BETAS, "attention_factor": scale, "truncate": True}
        if "attention_factor" not in rope and len(scaled) == 2:
            rope = rope | {"attention_factor": scaled[0] / scaled[1]}
        for key, value in usual.items():
            said = rope.get(key, value)
            if isinstance(said, bool) is not isinstance(value, bool) or not _is_close(said, value):
                self._description.refuse(
                    f"{key} of rotary embeddings of type 'yarn' is {said}, and GGUF's is {value:g}"
                )
        if factor < 1:
            self._description.refuse(f"factor of rotary embeddings of type 'yarn' is {factor:g}, less than 1")


def _is_close(value: Any, other: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, other, rel_tol=_CLOSE)
