"""Tokenizers of Hugging Face exported to GGUF: judged by tokens that llama.cpp made, and by gguf's own reading of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from qformat.converters.exports.described import Description
from qformat.converters.exports.gguf_tokenizer import CUTS, tokenizer_values
from qformat.errors import SourceError

MADE = json.loads((Path(__file__).parent.parent / "data" / "llama_cpp_tokens.json").read_bytes())
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PREFIXED, UNCUT = BYTES | {"add_prefix_space": True}, BYTES | {"use_regex": False}
VOCABULARY = 320


def described(
    name: str = "gpt-2", settings: Any = SETTINGS, config: Any = None, files: Any = None, **parts: Any
) -> Description:
    """Describe a model with one of the tokenizers, and parts of its tokenizer.json replaced."""
    made = MADE["tokenizers"][name]["tokenizer"]
    made = made | parts | {"model": made["model"] | parts.get("model", {})}
    assets = {"config.json": config or {"model_type": "llama"}, "tokenizer.json": made, **(files or {})}
    if settings is not None:
        assets["tokenizer_config.json"] = settings
    return Description(
        {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in assets.items()}, "x"
    )


def values(description: Description, architecture: str = "llama") -> tuple[dict[str, Any], list[str]]:
    found, warnings = tokenizer_values(description, architecture, VOCABULARY)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in found.items()}, warnings


@pytest.mark.parametrize("name", MADE["tokenizers"])
def test_exported_tokenizers_split_texts_as_llama_cpp_does_under_their_name(name):
    made, ids = MADE["tokenizers"][name]["tokenizer"], MADE["tokenizers"][name]["ids"]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert [tokenizer.encode(text).ids for text in MADE["texts"]] == ids
    found, warnings = values(described(name))
    assert not warnings
    assert (found["model"], found["pre"]) == ("gpt2", name)
    assert found["tokens"][: tokenizer.get_vocab_size()] == [
        tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())
    ]
    assert (len(found["tokens"]), found["tokens"][-1], found["token_type"][-1]) == (VOCABULARY, "[PAD319]", 5)
    assert [found["token_type"][tokenizer.token_to_id(token)] for token in ("<s>", "a", "<think>", "<|im_end|>")] == [
        3,
        1,
        4,
        3,
    ]
    assert found.get("add_bos_token") == (True if name == "llama-bpe" else None)


def split_at(cut: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [step, UNCUT]}


def added(content: str = "new", number: int = 310, **flags: Any) -> list[dict[str, Any]]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entry = {"id": number, "content": content} | usual | flags
    return [*MADE["tokenizers"]["gpt-2"]["tokenizer"]["added_tokens"], entry]


def template(single: str, pair: str = "$A $B", **ids: int) -> dict[str, Any]:
    def parts(text: str) -> list[Any]:
        return [
            {"Sequence": {"id": part[1], "type_id": 0}}
            if part[0] == "$"
            else {"SpecialToken": {"id": part, "type_id": 0}}
            for part in text.split()
        ]

    numbers = {"<s>": 0, "</s>": 1} | ids
    special = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in numbers.items()}
    return {"type": "TemplateProcessing", "single": parts(single), "pair": parts(pair), "special_tokens": special}


CUT, DIGIT = (cut for (cut, whole) in CUTS if not whole)
NO_NAME = "its tokenizer.json splits texts in a way that GGUF has no name for"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"normalizer": {"type": "Lowercase"}}, "its tokenizer.json changes texts first (Lowercase), which llama.cpp does not"),
    (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        "its tokenizer.json changes texts first (NFKC), which llama.cpp does not",
    ),
    ({"pre_tokenizer": PREFIXED}, "add_prefix_space of the pre_tokenizer of tokenizer.json is True, which llama.cpp does not have"),
    ({"pre_tokenizer": BYTES | {"new": 1}}, "'new' of the pre_tokenizer of tokenizer.json is not known"),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "add_prefix_space of the pre_tokenizer of tokenizer.json is None, which"),
    ({"pre_tokenizer": UNCUT}, NO_NAME),
    ({"pre_tokenizer": {"type": "Whitespace"}}, NO_NAME),
    ({"pre_tokenizer": None}, NO_NAME),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, NO_NAME),
    ({"pre_tokenizer": split_at(r"\w+")}, NO_NAME),
    ({"pre_tokenizer": split_at(DIGIT), "model": {"ignore_merges": True}}, NO_NAME),
    ({"pre_tokenizer": split_at(CUT, invert=True)}, "invert of the pre_tokenizer of tokenizer.json is True, which llama.cpp"),
    ({"pre_tokenizer": split_at(CUT, behavior="Removed")}, "behavior of the pre_tokenizer of tokenizer.json is 'Removed', which"),
    (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}},
        "individual_digits of the pre_tokenizer of tokenizer.json is False, which llama.cpp does not have",
    ),
    ({"decoder": {"type": "Metaspace"}}, "its tokenizer.json has a decoder other than ByteLevel"),
    ({"new": 1}, "'new' of tokenizer.json is not known"),
    ({"model": {"type": "Unigram"}}, "its tokenizer is not byte-level BPE, and no other is supported"),
    ({"model": {"byte_fallback": True}}, "its tokenizer is not byte-level BPE, and no other is supported"),
    ({"model": {"dropout": 0.1}}, "dropout of the model of tokenizer.json is 0.1, which llama.cpp does not have"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix of the model of tokenizer.json is '</w>', which"),
    ({"model": {"new": True}}, "'new' of the model of tokenizer.json is not known"),
    ({"model": {"vocab": {"a": 0, "<s>": 1, "?": 2}, "unk_token": "?"}, "added_tokens": []}, "unk_token of tokenizer.json stands"),
    ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "its tokenizer.json has two tokens with the same number"),
    ({"added_tokens": added("[PAD315]")}, "its tokenizer.json has a token with the name of a padding token"),
    *(
        ({"added_tokens": added(**{flag: True})}, f"{flag} of token 'new' of tokenizer.json is True, which llama.cpp does not have")
        for flag in ("single_word", "lstrip", "rstrip")
    ),
    ({"added_tokens": added(new=True)}, "'new' of token 'new' of tokenizer.json is not known"),
    ({"added_tokens": added("")}, "tokenizer.json has an added token without text"),
    ({"added_tokens": added("bar and more")}, "tokens 'foo bar' and 'bar and more' of tokenizer.json overlap"),
    ({"added_tokens": added("a foo bar", normalized=True)}, "token 'a foo bar' of tokenizer.json contains another"),
    ({"post_processor": {"type": "RobertaProcessing"}}, "the post_processor of tokenizer.json (RobertaProcessing) is not known"),
    ({"post_processor": template("<s> <s> $A")}, "the post_processor of tokenizer.json adds several tokens at one end of a text"),
    ({"post_processor": template("<s> $A $B")}, "the post_processor of tokenizer.json adds several tokens at one end of a text"),
    ({"post_processor": template("$A </s> </s>")}, "the post_processor of tokenizer.json adds several tokens at one end of a text"),
    ({"post_processor": template("a $A", a=9)}, "the post_processor of tokenizer.json adds 'a', which is not the token of"),
    ({"post_processor": template("</s> $A")}, "the post_processor of tokenizer.json adds '</s>', which is not bos_token"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), REFUSED)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(parts, message):
    with pytest.raises(SourceError) as caught:
        values(described(**parts))
    assert f"x: cannot become a GGUF file: {message}" in str(caught.value)
    assert str(caught.value).endswith("; export it --to hf and use llama.cpp's convert_hf_to_gguf.py")


SETTINGS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"add_prefix_space": True}, "add_prefix_space of tokenizer_config.json is True, which llama.cpp does not have"),
    ({"do_lower_case": True}, "do_lower_case of tokenizer_config.json is True, which llama.cpp does not have"),
    ({"add_bos_token": True}, "add_bos_token of tokenizer_config.json is True, unlike the post_processor of tokenizer.json"),
    ({"add_eos_token": True}, "add_eos_token of tokenizer_config.json is True, unlike the post_processor of tokenizer.json"),
    ({"pad_token": "<pad>"}, "pad_token of tokenizer_config.json is '<pad>', a token that tokenizer.json does not have"),
    ({"additional_special_tokens": ["<new>"]}, "additional_special_tokens[0] of tokenizer_config.json is '<new>', a token"),
    (
        {"added_tokens_decoder": {"305": {"content": "<new>"}}},
        "tokenizer_config.json has token '<new>' with number 305, and tokenizer.json has not",
    ),
    ({"added_tokens_decoder": {"0": {"content": "<s>", "lstrip": True}}}, "lstrip of added_tokens_decoder of"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), SETTINGS_REFUSED)
def test_settings_that_change_a_tokenizer_are_refused_for_gguf(settings, message):
    with pytest.raises(SourceError) as caught:
        values(described(settings=SETTINGS | settings))
    assert f"x: cannot become a GGUF file: {message}" in str(caught.value)


def test_added_tokens_of_another_file_are_refused_for_gguf():
    with pytest.raises(
        SourceError, match=r"added_tokens\.json has token '<new>' with number 305, and tokenizer\.json has not"
    ):
        values(described(files={"added_tokens.json": {"<new>": 305}}))


def test_a_normalizer_to_nfc_is_warned_of():
    _, warnings = values(described(normalizer={"type": "NFC"}))
    assert warnings == [
        "tokenizer.json normalizes texts to NFC first, which llama.cpp does not: give it texts that are"
    ]


SPECIAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "named": ({}, {"bos_token_id": 0, "eos_token_id": 1}),
    "cls and sep": (
        {"settings": {"cls_token": "<s>", "sep_token": "</s>"}},
        {"bos_token_id": 0, "eos_token_id": 1, "seperator_token_id": 1},
    ),
    "of the configuration": (
        {"settings": {"x": 1}, "config": {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}},
        {"bos_token_id": 7, "eos_token_id": 8, "padding_token_id": 9},
    ),
    "beginning": (
        {"post_processor": template("<s> $A", "<s> $A <s> $B")},
        {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_sep_token": False},
    ),
    "both ends": (
        {"post_processor": template("<s> $A </s>", "<s> $A </s> $B </s>")},
        {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_eos_token": True, "add_sep_token": False},
    ),
    "separated": (
        {"post_processor": template("<s> $A", "<s> $A </s> $B")},
        {"bos_token_id": 0, "eos_token_id": 1, "seperator_token_id": 1, "add_bos_token": True, "add_sep_token": True},
    ),
    "another end in the template": (
        {"settings": {"bos_token": "<s>", "eos_token": "<|im_end|>"}, "post_processor": template("$A </s>")},
        {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 301, "add_eos_token": True},
    ),
    "said and so": (
        {"settings": SETTINGS | {"add_bos_token": False, "add_prefix_space": False}},
        {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": False, "add_space_prefix": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIAL)
def test_special_tokens_are_those_that_llama_cpp_finds(tmp_path, case):
    changes, expected = SPECIAL[case]
    description = described(**changes)
    for name, data in description.assets.items():
        (tmp_path / name).write_bytes(data)
    found = values(description)[0]
    assert {
        key: value for key, value in found.items() if key.endswith("_token_id") or key.startswith("add_")
    } == expected
    theirs = gguf.SpecialVocab(tmp_path, n_vocab=VOCABULARY)
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    numbers = {f"{names.get(kind, kind)}_token_id": i for kind, i in theirs.special_token_ids.items() if kind != "cls"}
    adds = {f"add_{kind}_token": value for kind, value in theirs.add_special_token.items()}
    assert numbers | adds == {key: value for key, value in expected.items() if key != "add_space_prefix"}


def test_the_beginning_of_a_text_is_said_where_llama_cpp_adds_it_by_itself():
    assert values(described("llama-bpe", post_processor=None))[0]["add_bos_token"] is False


def test_special_tokens_of_the_map_alone_are_warned_of():
    found, warnings = values(described(settings={"x": 1}, files={"special_tokens_map.json": {"eos_token": "</s>"}}))
    assert "eos_token_id" not in found
    message = "special_tokens_map.json alone names eos_token '</s>', and llama.cpp's converter does not read it: the file has none"
    assert warnings == [f"{message}; add it to tokenizer_config.json"]


def test_types_of_added_tokens_are_those_of_llama_cpp():
    tokens = ("<\uff5cUser\uff5c>", "<|tool|>", "<pad>", "<unused7>", "<plan>", "special")
    entries = [
        entry for i, token in enumerate(tokens) for entry in added(token, 310 + i, special=token == "special")[-1:]
    ]
    found = values(described(added_tokens=[*added()[:-1], *entries]))[0]
    assert found["token_type"][310:316] == [3, 3, 3, 3, 4, 3]


def test_several_templates_of_chats_are_exported():
    templates = [
        {"name": "default", "template": "D"},
        {"name": "tool use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    found = values(described(settings=SETTINGS | {"chat_template": templates}))[0]
    assert {key: value for key, value in found.items() if "template" in key} == {
        "chat_template": "D",
        "chat_template.tool_use": "T",
        "chat_template.rag": "R",
        "chat_templates": ["rag", "tool_use"],
    }
    for file in ({"chat_template.jinja": b"J"}, {"chat_template.json": {"chat_template": "J"}}):
        assert values(described(files=file))[0]["chat_template"] == "J"
    with pytest.raises(
        SourceError, match=r"chat_template of tokenizer_config\.json and that of the file for it differ"
    ):
        values(described(settings=SETTINGS | {"chat_template": "D"}, files={"chat_template.jinja": b"J"}))
