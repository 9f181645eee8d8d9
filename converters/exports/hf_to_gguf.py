"""What a GGUF file says of a Hugging Face model: hyperparameters from config.json, the tokenizer, other names of tensors.

For models like Llama whose tokenizer is byte-level BPE. Keys and names are those that llama.cpp reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qformat.errors import SourceError

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How GGUF calls an architecture, and whether the rows of its query and key matrices are in another order there."""

    name: str
    permuted: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permuted=True),
    "MistralForCausalLM": Architecture("llama", permuted=True),
    "Qwen2ForCausalLM": Architecture("qwen2", permuted=False),
}

# In the order in which they stand in the file
_BEFORE = {"model.embed_tokens": "token_embd"}
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
_AFTER = {"model.norm": "output_norm", "lm_head": "output"}
_COMPUTED = re.compile(r"(model\.layers\.[0-9]+\.self_attn|model)\.rotary_emb\.(inv_freq|\w+_cached)")

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# The tokenizers of GPT-4, Llama 3 and Qwen 2 cut a text like this; the number of digits that stay together differs
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {_CUT.replace("DIGITS", "{1,3}"): "llama-bpe", _CUT.replace("DIGITS", ""): "qwen2"}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its name there, and how many heads its rows belong to if they get another order."""

    name: str
    heads: int = 0


class Model:
    """A Hugging Face model as its files describe it.

    Parameters
    ----------
    assets
        The files: config.json, tokenizer.json and what else there is.
    label
        What messages call it.

    Raises
    ------
    SourceError
        If there is no description, or it is of a model that is not supported.
    """

    def __init__(self, assets: Mapping[str, bytes], label: str) -> None:
        self._label = label
        self._assets = assets
        self._config = self._json("config.json") or self._refuse("there is no config.json")
        names = self._config.get("architectures")
        known = [name for name in names if name in ARCHITECTURES] if isinstance(names, list) else []
        if not known:
            self._refuse(f"it is of architecture {names}, and only {', '.join(ARCHITECTURES)} are supported")
        self.architecture = ARCHITECTURES[known[0]]

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Return where each tensor goes, in the order of the file; those that are computed anyway are left out.

        Raises `SourceError` if one is none that such a model has.
        """
        left = {name for name in names if not _COMPUTED.fullmatch(name)}
        layers = self._number("num_hidden_layers")
        table = dict(_BEFORE)
        for layer in range(layers):
            table |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}" for theirs, ours in _LAYER.items()}
        table |= _AFTER
        found: dict[str, Place] = {}
        for theirs, ours in table.items():
            for kind in ("weight", "bias"):
                if (name := f"{theirs}.{kind}") in left:
                    left.remove(name)
                    found[name] = Place(f"{ours}.{kind}", self._heads(ours))
        if left:
            self._refuse(f"a {self.architecture.name} model has no tensor {min(left)!r}")
        return found

    def _heads(self, name: str) -> int:
        if not self.architecture.permuted or not name.endswith(("attn_q", "attn_k")):
            return 0
        return self._number("num_attention_heads") if name.endswith("q") else self._key_heads

    @property
    def _key_heads(self) -> int:
        return self._number("num_key_value_heads", self._number("num_attention_heads"))

    def values(self, vocabulary: int) -> dict[str, Any]:
        """Return the value of each key, the tokenizer's among them; there are as many tokens as rows of the embedding.

        Raises `SourceError` if something is missing or not supported.
        """
        arch = self.architecture.name
        heads, width = self._number("num_attention_heads"), self._number("hidden_size")
        values: dict[str, Any] = {
            "general.architecture": arch,
            "general.type": "model",
            f"{arch}.block_count": self._number("num_hidden_layers"),
            f"{arch}.context_length": self._number("max_position_embeddings"),
            f"{arch}.embedding_length": width,
            f"{arch}.feed_forward_length": self._number("intermediate_size"),
            f"{arch}.attention.head_count": heads,
            f"{arch}.attention.head_count_kv": self._key_heads,
            f"{arch}.attention.layer_norm_rms_epsilon": self._real("rms_norm_eps", self._config),
            f"{arch}.vocab_size": vocabulary,
        }
        if self._head != width // heads:
            values |= {f"{arch}.attention.{kind}_length": self._head for kind in ("key", "value")}
        return values | self._rope(arch) | self._tokenizer(vocabulary)

    @property
    def _head(self) -> int:
        """Elements of a head."""
        return self._number("head_dim", self._number("hidden_size") // self._number("num_attention_heads"))

    @property
    def _rotation(self) -> tuple[str, JsonObject]:
        """How positions are encoded: a type, and parameters, which stand in one of two places."""
        old, new = self._config.get("rope_scaling") or {}, self._config.get("rope_parameters") or {}
        if not isinstance(old, dict) or not isinstance(new, dict):
            self._refuse("rope_parameters of config.json make no sense")
        rope = {"rope_theta": self._config.get("rope_theta", 10000.0)} | old | new
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "linear", "yarn", "llama3"):
            self._refuse(f"rotary embeddings of type {kind!r} are not supported")
        return str(kind), rope

    def _rope(self, arch: str) -> dict[str, Any]:
        kind, rope = self._rotation
        values: dict[str, Any] = {
            f"{arch}.rope.dimension_count": self._head,
            f"{arch}.rope.freq_base": self._real("rope_theta", rope),
        }
        if kind in ("linear", "yarn"):
            values[f"{arch}.rope.scaling.type"] = kind
            values[f"{arch}.rope.scaling.factor"] = self._real("factor", rope)
        if kind == "yarn":
            length = self._real("original_max_position_embeddings", rope)
            values[f"{arch}.rope.scaling.original_context_length"] = int(length)
        return values

    def frequencies(self) -> NDArray[np.float32] | None:
        """Return what Llama 3 divides the frequencies of its rotary embeddings by, a tensor of its own in GGUF; or None."""
        kind, rope = self._rotation
        if kind != "llama3":
            return None
        factor, low, high = (self._real(f"{key}factor", rope) for key in ("", "low_freq_", "high_freq_"))
        length = self._real("original_max_position_embeddings", rope)
        if low >= high:
            self._refuse("low_freq_factor of config.json is not below high_freq_factor")
        turns = length / (2 * np.pi * self._real("rope_theta", rope) ** (np.arange(0, self._head, 2) / self._head))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

    def _tokenizer(self, vocabulary: int) -> dict[str, Any]:
        tokenizer = self._json("tokenizer.json") or self._refuse("there is no tokenizer.json")
        settings = self._json("tokenizer_config.json") or {}
        model = tokenizer.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
            self._refuse("its tokenizer is not byte-level BPE, and no other is supported")
        try:
            ids = {str(token): int(number) for token, number in model["vocab"].items()}
            added = {str(token["content"]): token for token in tokenizer.get("added_tokens") or []}
            ids |= {content: int(token["id"]) for content, token in added.items()}
            tokens, types = _tokens(ids, added, vocabulary)
            merges = [_merge(merge) for merge in model["merges"]]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._refuse("its tokenizer.json makes no sense, or has more tokens than the embedding has rows")
        values: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self._pre(tokenizer),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        }
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self._special(key, settings, ids)
            if number is not None and 0 <= number < vocabulary:
                values[f"tokenizer.ggml.{name}_token_id"] = number
        for key, name in (("add_bos_token", "add_bos_token"), ("add_eos_token", "add_eos_token")):
            if isinstance(settings.get(key), bool):
                values[f"tokenizer.ggml.{name}"] = settings[key]
        template = self._template(settings)
        return values | ({"tokenizer.chat_template": template} if template else {})

    def _special(self, key: str, settings: JsonObject, ids: Mapping[str, int]) -> int | None:
        """Return the number of a special token: the one that the tokenizer names, or else the model."""
        token = settings.get(f"{key}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in ids:
            return ids[content]
        number = self._config.get(f"{key}_token_id")
        first = number[0] if isinstance(number, list) and number else number
        return int(first) if isinstance(first, int) else None

    def _template(self, settings: JsonObject) -> str | None:
        file = self._assets.get("chat_template.jinja")
        if file is not None:
            return file.decode("utf-8", "replace")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _pre(self, tokenizer: JsonObject) -> str:
        """Return llama.cpp's name for how a text is cut before tokens are merged."""
        pre = tokenizer.get("pre_tokenizer") or {}
        steps: list[Any] = pre.get("pretokenizers") or [] if pre.get("type") == "Sequence" else [pre]
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            cut = (steps[0].get("pattern") or {}).get("Regex")
            if cut in _CUTS:
                return _CUTS[cut]
        return self._refuse("its tokenizer.json cuts texts in a way that is not known to GGUF by a name")

    def _number(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 1 << 31:
            self._refuse(f"{key} of config.json is {value!r}, and not a positive integer")
        return value

    def _real(self, key: str, values: JsonObject) -> float:
        value = values.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
            self._refuse(f"{key} of config.json is {value!r}, and not a positive number")
        return float(value)  # type: ignore[arg-type]

    def _json(self, name: str) -> JsonObject | None:
        if name not in self._assets:
            return None
        try:
            value = json.loads(self._assets[name])
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._refuse(f"its {name} is not valid")
        return value

    def _refuse(self, cause: str) -> NoReturn:
        raise SourceError(
            f"{self._label}: cannot become a GGUF file: {cause}; export it --to hf and use llama.cpp's convert_hf_to_gguf.py"
        )


def _tokens(ids: Mapping[str, int], added: Mapping[str, JsonObject], count: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = [_UNUSED] * count
    for token, number in ids.items():
        if number < 0:
            raise ValueError(number)
        tokens[number] = token
        types[number] = _NORMAL
        if token in added:
            special = added[token].get("special") or (token.startswith("<|") and token.endswith("|>"))
            types[number] = _CONTROL if special else _USER_DEFINED
    return tokens, types


def _merge(merge: str | Sequence[str]) -> str:
    """Return a pair as GGUF has it, where spaces inside of tokens are written as byte-level BPE does."""
    if isinstance(merge, str):
        return merge
    left, right = merge
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
