"""Hugging Face models exported to GGUF, read back by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qformat import safe_open
from qformat.converters.convert import convert
from qformat.converters.exports.described import Description
from qformat.converters.exports.export import export
from qformat.converters.exports.gguf_config import Hyperparameters
from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
}
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def tokenizer() -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return made


CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama with biases and wide heads": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=24, attention_bias=True),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=4, head_dim=16, rope_theta=1e6, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = getattr(transformers, {"l": "Llama", "m": "Mistral", "q": "Qwen2"}[request.param[0]] + "ForCausalLM")(
        config
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def exported(source: Path, folder: Path, type_: str | None, **options: Any) -> tuple[Path, Path]:
    path = folder / "m.qf"
    convert(open_checkpoint(source), path, Recipe.parse(type_), overwrite=True)
    export(path, folder / "m.gguf", "gguf", overwrite=True, **options)
    return path, folder / "m.gguf"


def tensors_of(path: Path, source: Path) -> dict[str, torch.Tensor]:
    config = transformers.AutoConfig.from_pretrained(source)
    if config.model_type == "mistral":  # GGUF has no other name for it than llama
        config = LlamaConfig(**SIZES)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    found: dict[str, torch.Tensor] = loaded["tensors"]
    return found


@pytest.mark.parametrize("type_", [None, "q8_0", "q4_1:coded=true", "bf16", "nlm"])
def test_transformers_reads_the_same_weights_from_exported_gguf(source, tmp_path, type_):
    path, out = exported(source, tmp_path, type_, dtype="f32")
    found = tensors_of(out, source)
    with safe_open(path) as file:
        assert set(found) >= set(file.keys())
        for name in file.keys():  # noqa: SIM118  it is no mapping
            assert torch.equal(found[name], torch.from_numpy(file.get_tensor(name, np.float32))), name
    if type_ in ("q8_0", "q4_1:coded=true"):
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(out).tensors if len(tensor.shape) > 1}
        assert kinds == {type_[:4].upper()}


def test_exported_gguf_metadata_describes_model_and_tokenizer(source, tmp_path):
    _, out = exported(source, tmp_path, "q8_0")
    fields = {key: field.contents() for key, field in GGUFReader(out).fields.items()}
    config = json.loads((source / "config.json").read_bytes())
    arch = fields["general.architecture"]
    assert arch == ("qwen2" if config["model_type"] == "qwen2" else "llama")
    assert fields["general.file_type"] == 7
    read = load_gguf_checkpoint(str(out))["config"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert read[key] == config[key]
    for key in ("max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id"):
        assert read[key] == (config[key] if "token" not in key else {"bos_token_id": 0, "eos_token_id": 1}[key])
    assert read["rms_norm_eps"] == pytest.approx(config["rms_norm_eps"])
    assert read["rope_theta"] == pytest.approx(config["rope_parameters"]["rope_theta"])
    if config.get("head_dim") not in (None, 16):
        assert fields[f"{arch}.attention.key_length"] == config["head_dim"]
    assert fields[f"{arch}.rope.dimension_count"] == (config.get("head_dim") or 16)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.chat_template"] == TEMPLATE
    made = tokenizer()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert tokens[: made.get_vocab_size()] == [made.id_to_token(i) for i in range(made.get_vocab_size())]
    assert types[:3] == [3, 3, 1]
    assert types[made.token_to_id("<think>")] == 4
    assert (tokens[-1], types[-1]) == ("[PAD299]", 5)
    # and the tokenizer that transformers makes of it
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for line in TEXT:
        assert again(line, add_special_tokens=False)["input_ids"] == made.encode(line).ids


def test_exported_llama_3_frequencies_are_those_of_transformers():
    config = CONFIGS["llama 3"]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    unscaled = 1 / (50000.0 ** (torch.arange(0, 16, 2) / 16))
    found = Hyperparameters(Description({"config.json": _config(config)}, "x")).frequencies()
    assert found is not None
    assert found == pytest.approx((unscaled / expected).numpy(), rel=1e-5)
    assert found[0] == 1
    assert found[-1] == 8


def _config(config: Any, **changes: Any) -> bytes:
    values = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]} | changes
    return json.dumps(values).encode()


def test_biases_of_rotated_matrices_are_rotated_in_gguf(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["llama with biases and wide heads"])
    bias = torch.arange(48.0)
    model.model.layers[0].self_attn.k_proj.bias.data = bias
    model.model.layers[0].self_attn.k_proj.weight.data = bias[:, None].repeat(1, 64)
    model.save_pretrained(tmp_path / "hf")
    tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    found = {tensor.name: tensor.data for tensor in GGUFReader(exported(tmp_path / "hf", tmp_path, None)[1]).tensors}
    assert np.array_equal(found["blk.0.attn_k.bias"], found["blk.0.attn_k.weight"][:, 0])
    assert list(found["blk.0.attn_k.bias"][:4]) == [0, 12, 1, 13]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"config.json": None}, "there is no config.json"),
    ({"config.json": b"{"}, "its config.json is not valid"),
    ({"config.json": {"architectures": ["T5Model"]}}, r"of architecture \['T5Model'\], and only LlamaForCausalLM"),
    ({"config.json": {"architectures": 3}}, "of architecture 3"),
    ({"config.json": {"num_hidden_layers": "2"}}, "num_hidden_layers of config.json is '2'"),
    ({"config.json": {"num_hidden_layers": 1}}, "a llama model has no tensor 'model.layers.1."),
    ({"config.json": {"num_attention_heads": 7}}, r"q_proj.weight' is of shape \[64, 64\], and not \[112, 64\] as config"),
    ({"config.json": {"rms_norm_eps": None}}, "rms_norm_eps of config.json is None"),
    ({"config.json": {"rope_parameters": {"rope_type": "dynamic"}}}, "type 'dynamic' are not supported for a llama model"),
    ({"config.json": {"rope_parameters": [1]}}, "rope_parameters"),
    ({"tokenizer.json": None}, "there is no tokenizer.json"),
    ({"tokenizer.json": {"model": {"type": "Unigram"}}}, "not byte-level BPE"),
    ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 300}, "merges": []}}}, "is invalid, or has more tokens"),
    ({"tokenizer.json": {"model": {"type": "BPE", "vocab": 3, "merges": []}}}, "is invalid"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_unsupported_models_are_refused_for_gguf(tmp_path, changes, message):
    torch.manual_seed(0)
    source = tmp_path / "hf"
    transformers.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(source)
    tokenizer().save(str(source / "tokenizer.json"))
    for name, change in changes.items():
        file = source / name
        if change is None:
            file.unlink()
        else:
            new = json.dumps(json.loads(file.read_bytes()) | change).encode() if isinstance(change, dict) else change
            file.write_bytes(new)
    with pytest.raises(SourceError, match=message) as caught:
        exported(source, tmp_path, None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


CONFIGURATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"logit_scale": 0.5}, "config.json has 'logit_scale', which may change what the model computes, and which"),
    ("Llama", {"model_type": "granite"}, "model_type of config.json is 'granite', which is not that of its architecture"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act of config.json is 'gelu', which a llama model of GGUF has no word for"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor of config.json is 0.5, which a llama model of GGUF"),
    ("Llama", {"rope_interleaved": True}, "rope_interleaved of config.json is True, which a llama model of GGUF has no"),
    ("Llama", {"sliding_window": 32}, "it has a sliding window of 32 tokens, which a llama model of GGUF has no word for"),
    ("Mistral", {}, "it has a sliding window of 4096 tokens, which a llama model of GGUF has no word for"),
    ("Mistral", {"sliding_window": None, "attention_bias": True}, "attention_bias of config.json is True, which a mistral"),
    ("Qwen2", {"attention_bias": False}, "attention_bias of config.json is False, which a qwen2 model never is"),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        "it has a sliding window of 32 tokens, which a qwen2 model of GGUF has no word for",
    ),
    ("Qwen2", {"layer_types": ["full_attention", "x"]}, "layer_types of config.json are not all 'full_attention'"),
    ("Qwen2", {"rope_parameters": LLAMA3}, "rotary embeddings of type 'llama3' are not supported for a qwen2 model"),
    ("Llama", {"rope_scaling": {"type": "longrope"}}, "rotary embeddings of type 'longrope' are not supported for a llama"),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "'x' of rotary embeddings of type 'linear' has no"),
    (
        "Llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "'full_attention' of rotary embeddings of type 'default' has no word in GGUF",
    ),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "only a part of each head is rotated (partial_rotary_factor 0.5)",
    ),
    (
        "Llama",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters of config.json differ",
    ),
    ("Llama", {"rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, "config.json has two values of rope_theta: 5 and 6"),
    (
        "Llama",
        {"rope_scaling": {"type": "yarn", "rope_type": "linear"}},
        "config.json has two types of rotary embeddings: 'linear' and 'yarn'",
    ),
    *(
        ("Llama", {"rope_scaling": YARN | change}, f"{said} of rotary embeddings of type 'yarn' is {what}")
        for change, said, what in (
            ({"beta_fast": 64}, "beta_fast", "64, and GGUF's is 32"),
            ({"beta_slow": 2}, "beta_slow", "2, and GGUF's is 1"),
            ({"truncate": False}, "truncate", "False, and GGUF's is 1"),
            ({"attention_factor": 1.5}, "attention_factor", "1.5, and GGUF's is 1.13863"),
            ({"mscale": 0.7, "mscale_all_dim": 1.0}, "attention_factor", "0.963"),
            ({"factor": 0.5}, "factor", "0.5, less than 1"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "message"), CONFIGURATIONS)
def test_keys_of_a_configuration_that_gguf_has_no_word_for_are_refused(architecture, changes, message):
    sizes = SIZES | {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "architectures": [f"{architecture}ForCausalLM"],
    }
    with pytest.raises(SourceError) as caught:
        Hyperparameters(Description({"config.json": json.dumps(sizes | changes).encode()}, "x")).values()
    assert f"x: cannot become a GGUF file: {message}" in str(caught.value)


def test_keys_of_a_configuration_that_change_nothing_are_accepted_for_gguf():
    sizes = SIZES | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "architectures": ["Qwen2ForCausalLM"]}
    neutral = {
        "logit_scale": None, "hidden_act": "silu", "partial_rotary_factor": 1.0, "use_sliding_window": True, "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2, "attention_dropout": 0.1, "torch_dtype": "bfloat16", "attention_bias": True,
        "rope_scaling": YARN | {"attention_factor": 0.1 * np.log(4) + 1, "beta_fast": 32.0, "mscale": 0.7},
    }  # fmt: skip
    found = Hyperparameters(Description({"config.json": json.dumps(sizes | neutral).encode()}, "x")).values()
    assert {key: value for key, value in found.items() if "rope" in key} == {
        "qwen2.rope.dimension_count": 16,
        "qwen2.rope.freq_base": 10000.0,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
    }


def changed(folder: Path, change: Any, architecture: Any = LlamaConfig, **config: Any) -> Path:
    """Return a directory with a model whose tensors were changed."""
    torch.manual_seed(0)
    kind = {LlamaConfig: transformers.LlamaForCausalLM, Qwen2Config: transformers.Qwen2ForCausalLM}[architecture]
    kind(architecture(**SIZES, **config)).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


LAYER = "model.layers.0."
TENSORS: list[tuple[Any, str]] = [
    (lambda t: t.update({LAYER + "mlp.up_proj.bias": torch.ones(96)}), "a llama model has no tensor 'model.layers.0.mlp.up_proj."),
    (lambda t: t.update({LAYER + "mlp.act.scales": torch.ones(96)}), "a llama model has no tensor 'model.layers.0.mlp.act.scales'"),
    (lambda t: t.pop(LAYER + "self_attn.q_proj.weight"), "tensor 'model.layers.0.self_attn.q_proj.weight' is missing"),
    (lambda t: t.pop("model.embed_tokens.weight"), "there is no token embedding"),
    (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing, and tie_word_embeddings of config.json is not true"),
    (
        lambda t: t.update({LAYER + "mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)}),
        "tensor 'model.layers.0.mlp.up_proj.weight' holds integers of type i8",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_gguf_has_no_place_for_are_refused(tmp_path, change, message):
    with pytest.raises(SourceError) as caught:
        exported(changed(tmp_path / "hf", change), tmp_path, None)
    assert f"m.qf: cannot become a GGUF file: {message}" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_layers_that_are_quantized_in_an_unknown_way_are_refused_for_gguf(tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER + "mlp.up_proj.weight"] = torch.randint(-128, 127, (96, 64), dtype=torch.int8)
        tensors[LAYER + "mlp.up_proj.weight_scales"] = torch.rand(96).half()

    source = changed(tmp_path / "hf", change)
    config = json.loads((source / "config.json").read_bytes()) | {"quantization_config": {"quant_method": "eetq"}}
    (source / "config.json").write_text(json.dumps(config))
    message = "quantization_config of config.json says that weights are quantized, in a way that is not known"
    with pytest.raises(SourceError, match=message):
        exported(source, tmp_path, None)


def test_zero_biases_and_scales_of_activations_are_left_out_of_gguf(tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            tensors.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensors[name])))
            tensors[name.replace("weight", "input_scale")] = torch.ones(1)

    source = changed(tmp_path / "hf", change, Qwen2Config, num_key_value_heads=2)
    convert(open_checkpoint(source), tmp_path / "m.qf", Recipe())
    result = export(tmp_path / "m.qf", tmp_path / "m.gguf", "gguf")
    assert result.warnings == [
        "tensor 'model.layers.0.mlp.down_proj.input_scale' and 13 more only scales activations: left out",
        "tensor 'model.layers.0.mlp.down_proj.bias' and 7 more is zero: left out",
    ]
    biases = [tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors if tensor.name.endswith("bias")]
    assert biases == [f"blk.{layer}.attn_{kind}.bias" for layer in range(2) for kind in "qkv"]


def test_an_output_matrix_beside_tied_embeddings_has_to_be_the_embedding(tmp_path):
    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    source = changed(tmp_path / "same", same, tie_word_embeddings=True)
    convert(open_checkpoint(source), tmp_path / "m.qf", Recipe())
    assert export(tmp_path / "m.qf", tmp_path / "m.gguf", "gguf").warnings == [
        "tensor 'lm_head.weight' is the embedding again: left out"
    ]
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    source = changed(tmp_path / "other", other, tie_word_embeddings=True)
    with pytest.raises(
        SourceError, match=r"tensor 'lm_head.weight' is not the embedding, as tie_word_embeddings of config.json says"
    ):
        exported(source, tmp_path, None)


def test_rows_that_are_no_whole_blocks_are_exported_in_the_requested_dtype(tmp_path):
    sizes = SIZES | {"hidden_size": 40, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "hf")
    tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    _, out = exported(tmp_path / "hf", tmp_path, "q4_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(out).tensors}
    assert kinds["blk.0.attn_q.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.Q4_0
