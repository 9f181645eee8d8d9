"""A byte-level BPE tokenizer of Hugging Face as GGUF describes it.

llama.cpp has its own code for tokenizers, chosen by a name. So every key of tokenizer.json has to be one whose effect that code
has, and all others are refused. Special tokens are found as llama.cpp's converter finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_letters, digits
from typing import Any

from qformat.converters.exports.described import Description, JsonObject

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_MORE, _MAP = "added_tokens.json", "special_tokens_map.json"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# How the tokenizers of GPT-4, Llama 3 and Qwen 2 split a text; they differ in the number of digits that stay together
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UP_TO_3_DIGITS, _ONE_DIGIT = _CUT.replace("DIGITS", "{1,3}"), _CUT.replace("DIGITS", "")
#: llama.cpp's names, by how a text is split and whether whole words are looked up before their parts are merged
CUTS = {(_UP_TO_3_DIGITS, True): "llama-bpe", (_UP_TO_3_DIGITS, False): "dbrx", (_ONE_DIGIT, False): "qwen2"}

# Keys of tokenizer.json beside the values with which they do nothing; None: whatever the value
_TOP: Mapping[str, Sequence[Any] | None] = {
    "version": None, "truncation": None, "padding": None, "added_tokens": None, "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "model": None,
}  # fmt: skip
_MODEL: Mapping[str, Sequence[Any] | None] = {
    "type": None, "vocab": None, "merges": None, "ignore_merges": None, "unk_token": None, "fuse_unk": None,
    "dropout": (None, 0, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}  # fmt: skip
_ADDED: Mapping[str, Sequence[Any] | None] = {
    "id": None, "content": None, "special": None, "normalized": None, "__type": None,
    "single_word": (None, False), "lstrip": (None, False), "rstrip": (None, False),
}  # fmt: skip
_BYTES: Mapping[str, Sequence[Any] | None] = {
    "type": ("ByteLevel",), "add_prefix_space": (False,), "trim_offsets": None, "use_regex": None,
}  # fmt: skip
_DIGITS: Mapping[str, Sequence[Any] | None] = {"type": None, "individual_digits": (True,)}
_SPLIT: Mapping[str, Sequence[Any] | None] = {
    "type": None, "pattern": None, "behavior": ("Isolated",), "invert": (None, False),
}  # fmt: skip

# Kinds of special tokens, and GGUF's names of them
_KINDS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "", "mask": "mask", "eot": "eot",
}  # fmt: skip
# Such tokens are special, whatever tokenizer.json says
_SPECIAL = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def tokenizer_values(description: Description, architecture: str, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """Return the value of each key of GGUF about the tokenizer, given the number of tokens, and warnings.

    Raises `SourceError` if there is none, or it does something that llama.cpp does not.
    """
    return _Tokenizer(description, architecture, vocabulary).values()


class _Tokenizer:
    def __init__(self, description: Description, architecture: str, vocabulary: int) -> None:
        self._description = description
        self._refuse = description.refuse
        self._architecture = architecture
        self._vocabulary = vocabulary
        self._warnings: list[str] = []
        self._tokenizer = description.json(_FILE) or self._refuse(f"there is no {_FILE}")
        self._settings = dict(description.json(_SETTINGS) or {})
        self._added: dict[str, JsonObject] = {}
        self._ids: dict[str, int] = {}

    def values(self) -> tuple[dict[str, Any], list[str]]:
        model = self._tokenizer.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
            self._refuse("its tokenizer is not byte-level BPE, and no other is supported")
        try:
            self._ids = {str(token): int(number) for token, number in model["vocab"].items()}
            self._added = {str(token["content"]): token for token in self._tokenizer.get("added_tokens") or []}
            self._ids |= {content: int(token["id"]) for content, token in self._added.items()}
            tokens = self._tokens()
            merges = [_merge(merge) for merge in model["merges"]]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._refuse(f"its {_FILE} is invalid, or has more tokens than the embedding has rows")
        self._check(_TOP, self._tokenizer, _FILE)
        self._check(_MODEL, model, f"the model of {_FILE}")
        self._check_vocabulary(model)
        self._check_settings()
        self._check_added()
        self._check_normalizer(self._tokenizer.get("normalizer"))
        self._check_decoder(self._tokenizer.get("decoder"))
        values: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre(),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": self._types(tokens),
            "tokenizer.ggml.merges": merges,
        }
        values |= self._special_tokens()
        return values | self._templates(), self._warnings

    def pre(self) -> str:
        """Return llama.cpp's name for how the tokenizer splits a text before merging tokens."""
        pre = self._tokenizer.get("pre_tokenizer") or {}
        steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
        steps = steps if isinstance(steps, list) and all(isinstance(step, dict) for step in steps) else []
        whole = bool(self._tokenizer["model"].get("ignore_merges"))
        kinds = [step.get("type") for step in steps]
        name = None
        if kinds[-1:] == ["ByteLevel"]:
            self._check(_BYTES, steps[-1], f"the pre_tokenizer of {_FILE}", required=("add_prefix_space",))
            cut = steps[-1].get("use_regex", True)
            if kinds == ["ByteLevel"] and cut and not whole:
                name = "gpt-2"
            elif kinds == ["Digits", "ByteLevel"] and cut and not whole:
                self._check(_DIGITS, steps[0], f"the pre_tokenizer of {_FILE}", required=("individual_digits",))
                name = "smollm"
            elif kinds == ["Split", "ByteLevel"] and not cut:
                self._check(_SPLIT, steps[0], f"the pre_tokenizer of {_FILE}", required=("behavior",))
                pattern = steps[0].get("pattern")
                name = CUTS.get((str(pattern.get("Regex")), whole)) if isinstance(pattern, dict) else None
        if name is None:
            self._refuse(f"its {_FILE} splits texts in a way that GGUF has no name for")
        return name

    def _check(
        self, table: Mapping[str, Sequence[Any] | None], values: JsonObject, where: str, required: Iterable[str] = ()
    ) -> None:
        """Refuse keys that are not in a table, and values other than those of the table."""
        for key in (*values, *required):
            value = values.get(key)
            allowed = table.get(key, ())
            if key not in table and value is not None:
                self._refuse(f"{key!r} of {where} is not known")
            if allowed is not None and key in table and not any(value == x and type(value) is type(x) for x in allowed):
                self._refuse(f"{key} of {where} is {value!r}, which llama.cpp does not have")

    def _tokens(self) -> list[str]:
        tokens = [f"[PAD{number}]" for number in range(self._vocabulary)]
        if len(set(self._ids.values())) < len(self._ids):
            self._refuse(f"its {_FILE} has two tokens with the same number")
        for token, number in self._ids.items():
            if number < 0:
                raise ValueError(number)
            tokens[number] = token
        if len(set(tokens)) < len(tokens):
            self._refuse(f"its {_FILE} has a token with the name of a padding token")
        return tokens

    def _types(self, tokens: Sequence[str]) -> list[int]:
        special = {token for token, entry in self._added.items() if entry.get("special") or _looks_special(token)}
        special |= self._named()
        types = []
        for token in tokens:
            kind = _NORMAL if token in self._ids else _UNUSED
            kind = _USER_DEFINED if token in self._added else kind
            types.append(_CONTROL if token in special and token in self._ids else kind)
        return types

    def _named(self) -> set[str]:
        """Return the special tokens that the settings name; refuse those that the vocabulary does not have."""
        named = {f"{kind}_token": self._content(self._settings.get(f"{kind}_token")) for kind in _KINDS}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = self._settings.get(key) or []
            tokens = more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
            named |= {f"{key}[{number}]": self._content(token) for number, token in enumerate(tokens)}
        for key, token in named.items():
            if token is not None and token not in self._ids:
                self._refuse(f"{key} of {_SETTINGS} is {token!r}, a token that {_FILE} does not have")
        return {token for token in named.values() if token is not None}

    @staticmethod
    def _content(token: Any) -> str | None:
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) and content else None

    def _check_vocabulary(self, model: JsonObject) -> None:
        """Refuse a token for the unknown if there can be unknown bytes: llama.cpp leaves them out."""
        if model.get("unk_token") is not None and not self._ids.keys() >= _ALPHABET:
            self._refuse(f"unk_token of {_FILE} stands for bytes that are not in the vocabulary")

    def _check_settings(self) -> None:
        """Refuse settings by which transformers changes what tokenizer.json says."""
        for key in ("add_prefix_space", "do_lower_case"):
            if self._settings.get(key):
                self._refuse(f"{key} of {_SETTINGS} is {self._settings[key]!r}, which llama.cpp does not have")
        decoder = self._settings.get("added_tokens_decoder")
        entries = decoder if isinstance(decoder, dict) else {}
        for entry in entries.values():
            self._check(_ADDED, entry if isinstance(entry, dict) else {}, f"added_tokens_decoder of {_SETTINGS}")
        added = [(_SETTINGS, self._content(entry), number) for number, entry in entries.items()]
        added += [(_MORE, token, number) for token, number in (self._description.json(_MORE) or {}).items()]
        for file, token, number in added:
            if token is not None and str(self._ids.get(token)) != str(number):
                self._refuse(f"{file} has token {token!r} with number {number}, and {_FILE} has not")

    def _check_added(self) -> None:
        """Refuse added tokens that are found in a text in another way than llama.cpp finds them: the longest first."""
        for token, entry in self._added.items():
            self._check(_ADDED, entry, f"token {token!r} of {_FILE}")
            if not token:
                self._refuse(f"{_FILE} has an added token without text")
        # of two that overlap, tokenizers takes the one that begins first
        begins: dict[str, set[str]] = {}
        for token in self._added:
            for length in range(1, len(token)):
                begins.setdefault(token[:length], set()).add(token)
        for token in self._added:
            for start in range(1, len(token)):
                for other in begins.get(token[start:], set()) - {token}:
                    if len(other) >= len(token) and len(set(token + other)) > 1:
                        self._refuse(f"tokens {token!r} and {other!r} of {_FILE} overlap")
        # those that are found before a text is normalized cut up the others
        first = [token for token, entry in self._added.items() if not entry.get("normalized")]
        for token in self._added.keys() - set(first):
            if any(other in token for other in first):
                self._refuse(f"token {token!r} of {_FILE} contains another")

    def _check_normalizer(self, normalizer: Any) -> None:
        kinds = [step.get("type") if isinstance(step, dict) else step for step in _steps(normalizer, "normalizers")]
        other = [kind for kind in kinds if kind != "NFC"]
        if other:
            self._refuse(f"its {_FILE} changes texts first ({other[0]}), which llama.cpp does not")
        if kinds:
            self._warnings.append(
                f"{_FILE} normalizes texts to NFC first, which llama.cpp does not: give it texts that are"
            )

    def _check_decoder(self, decoder: Any) -> None:
        for step in _steps(decoder, "decoders"):
            if not isinstance(step, dict) or step.get("type") != "ByteLevel":
                self._refuse(f"its {_FILE} has a decoder other than ByteLevel")

    def _special_tokens(self) -> dict[str, Any]:
        """Return the numbers of special tokens, and which of them begin and end a text."""
        for kind, other in (("bos", "cls"), ("eos", "sep")):
            if not self._content(self._settings.get(f"{kind}_token")) and self._settings:
                self._settings[f"{kind}_token"] = self._settings.get(f"{other}_token")
        first, last, adds = self._template_ends()
        if last is not None and last != (end := self._content(self._settings.get("eos_token"))):
            if self._settings:
                self._settings["eot_token"] = end
            self._settings["eos_token"] = last
        if adds.get("sep") and self._settings and not self._content(self._settings.get("sep_token")):
            self._settings["sep_token"] = self._settings.get("eos_token")
        if first is not None and not self._content(self._settings.get("bos_token")):
            self._settings["bos_token"] = first
        for kind, token in (("bos", first), ("eos", last)):
            said = self._settings.get(f"add_{kind}_token")
            if isinstance(said, bool) and said != (token is not None):
                self._refuse(f"add_{kind}_token of {_SETTINGS} is {said}, unlike the post_processor of {_FILE}")
        values: dict[str, Any] = {}
        numbers = {kind: self._number(kind) for kind in _KINDS}
        for kind, token in (("bos", first), ("eos", last)):
            if token is not None and numbers[kind] != self._ids[token]:
                self._refuse(f"the post_processor of {_FILE} adds {token!r}, which is not {kind}_token")
        for kind, number in numbers.items():
            if number is not None and 0 <= number < self._vocabulary and _KINDS[kind]:
                values[f"tokenizer.ggml.{_KINDS[kind]}_token_id"] = number
        return values | self._additions(adds)

    def _additions(self, adds: Mapping[str, bool]) -> dict[str, bool]:
        """Return whether tokens are added to a text."""
        said = {kind: self._settings.get(f"add_{kind}_token") for kind in _KINDS}
        adds = dict(adds) | {kind: value for kind, value in said.items() if isinstance(value, bool)}
        if self.pre() == "llama-bpe":
            adds.setdefault("bos", False)  # llama.cpp's default is another
        values = {
            f"tokenizer.ggml.add_{kind}_token": value for kind, value in adds.items() if kind in ("bos", "eos", "sep")
        }
        if self._architecture == "llama" and self._settings.get("add_prefix_space") is False:
            values["tokenizer.ggml.add_space_prefix"] = False
        return values

    def _template_ends(self) -> tuple[str | None, str | None, dict[str, bool]]:
        """Return the tokens that the post_processor adds at the beginning and at the end, and llama.cpp's flags for them."""
        found: tuple[str | None, str | None, dict[str, bool]] = None, None, {}
        templates = 0
        for step in _steps(self._tokenizer.get("post_processor"), "processors"):
            kind = step.get("type") if isinstance(step, dict) else step
            if kind == "TemplateProcessing" and not templates:
                templates += 1
                found = self._ends_of(step)
            elif kind != "ByteLevel":
                self._refuse(f"the post_processor of {_FILE} ({kind}) is not known")
        return found

    def _ends_of(self, template: JsonObject) -> tuple[str | None, str | None, dict[str, bool]]:
        single, pair = (_parts(template.get(key)) for key in ("single", "pair"))
        texts = [i for i, (kind, _) in enumerate(single) if kind == "Sequence"]
        if len(texts) != 1 or texts[0] > 1 or len(single) > texts[0] + 2:
            self._refuse(f"the post_processor of {_FILE} adds several tokens at one end of a text")
        first = single[0][1] if texts[0] else None
        last = single[-1][1] if len(single) > texts[0] + 1 else None
        specials = template.get("special_tokens")
        for token in filter(None, (first, last)):
            entry = specials.get(token) if isinstance(specials, dict) else None
            if not isinstance(entry, dict) or token not in self._ids or entry.get("ids") != [self._ids[token]]:
                self._refuse(f"the post_processor of {_FILE} adds {token!r}, which is not the token of that name")
        adds = {kind: True for kind, token in (("bos", first), ("eos", last)) if token is not None}
        separates = self._separates(pair, first, last)
        return first, last, adds if separates is None else adds | {"sep": separates}

    def _separates(self, pair: Sequence[tuple[str, str]], first: str | None, last: str | None) -> bool | None:
        """Return whether a separator stands between two texts; None if nothing does. llama.cpp's converter finds it so."""
        inner = list(pair)
        if inner and first is not None and inner[0] == ("SpecialToken", first):
            del inner[0]
        if inner and last is not None and inner[-1] == ("SpecialToken", last):
            del inner[-1]
        if len(inner) < 3 or inner[0] != ("Sequence", "A") or inner[-1] != ("Sequence", "B"):
            return None
        ends = {self._content(self._settings.get(f"{kind}_token")) for kind in ("sep", "eos")} | {last}
        between = [kind == "SpecialToken" and name in ends for kind, name in inner[1:-1]]
        return (between[0] and last is None) or (len(between) == 2 and between[1])

    def _number(self, kind: str) -> int | None:
        """Return the number of a special token from the tokenizer, else from the model."""
        content = self._content(self._settings.get(f"{kind}_token"))
        if content is not None:
            return self._ids.get(content)
        number = self._description.config.get(f"{kind}_token_id")
        first = number[0] if isinstance(number, list) and number else number
        if type(first) is int:
            return first
        named = self._content((self._description.json(_MAP) or {}).get(f"{kind}_token"))
        if named is not None and kind in ("bos", "eos"):
            self._warnings.append(
                f"{_MAP} alone names {kind}_token {named!r}, and llama.cpp's converter does not read it: the file has none; add it "
                f"to {_SETTINGS}"
            )
        return None

    def _templates(self) -> dict[str, Any]:
        """Return the templates of chats."""
        file = self._description.assets.get("chat_template.jinja")
        said = self._settings.get("chat_template")
        if file is None:
            other = (self._description.json("chat_template.json") or {}).get("chat_template")
        else:
            other = file.decode("utf-8", "replace")
        if None not in (said, other) and said != other:
            self._refuse(f"chat_template of {_SETTINGS} and that of the file for it differ")
        template = other if said is None else said
        if not isinstance(template, list):
            return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        letters = ascii_letters + digits
        usable = {
            "".join(c if c in letters else "_" for c in name): x for name, x in named.items() if isinstance(x, str)
        }
        default = usable.pop("default", None)
        values: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in usable.items() if name}
        if values:
            values["tokenizer.chat_templates"] = sorted(name for name in usable if name)
        return values | ({} if default is None else {"tokenizer.chat_template": default})


def _steps(value: Any, key: str) -> list[Any]:
    """Return the steps of a part of tokenizer.json, which may be one step or several."""
    if value is None:
        return []
    if not isinstance(value, dict) or value.get("type") != "Sequence":
        return [value]
    steps = value.get(key)
    return steps if isinstance(steps, list) else [None]


def _parts(template: Any) -> list[tuple[str, str]]:
    """Return the parts of a template, each (kind, name)."""
    found = []
    for part in template if isinstance(template, list) else []:
        ((kind, value),) = part.items() if isinstance(part, dict) and len(part) == 1 else ((None, None),)
        found.append((str(kind), str(value.get("id")) if isinstance(value, dict) else ""))
    return found


def _looks_special(token: str) -> bool:
    return token in _SPECIAL or any(token.startswith(start) and token.endswith(end) for start, end in _SPECIAL_ENDS)


def _merge(merge: str | Sequence[str]) -> str:
    """Return a pair in GGUF's notation, with spaces inside tokens as in byte-level BPE."""
    if isinstance(merge, str):
        return merge
    left, right = merge
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"


def _alphabet() -> set[str]:
    """Return the characters that stand for bytes: a printable one for itself, others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte) for byte in printable} | {chr(256 + i) for i in range(len(others))}


_ALPHABET = _alphabet()
