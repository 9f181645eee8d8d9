"""Checkpoints of other libraries, exported to a directory, and loaded by the library that made them: the same outputs.

Those libraries are not installed for the tests; each test is skipped without its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qformat.converters.convert import convert
from qformat.converters.exports.export import export
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": 320,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def round_trip(source: Path, type_: str | None = None, **options: Any) -> Path:
    path, out = source.with_suffix(".qf"), source.with_name("out")
    convert(open_checkpoint(source), path, Recipe.parse(type_))
    export(path, out, "hf", **options)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("shard_size", [5_000_000_000, 200_000])
def test_diffusers_loads_what_it_saved(tmp_path, shard_size):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
    }
    diffusers.UNet2DModel(**sizes, **blocks, norm_num_groups=8).save_pretrained(tmp_path / "unet")
    out = round_trip(tmp_path / "unet", "lossless", shard_size=shard_size)
    before, after = (diffusers.UNet2DModel.from_pretrained(path).eval() for path in (tmp_path / "unet", out))
    loaded = dict(after.named_parameters())
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in before.named_parameters())
    images = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(before(images, 1).sample, after(images, 1).sample, atol=1e-5)


def test_peft_loads_what_it_saved(base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], base_model_name_or_path=str(base), init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    out = round_trip(tmp_path / "adapter", "lossless")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "double", "int8"])
def test_transformers_loads_what_bitsandbytes_quantized(base, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": kind.replace("double", "nf4"), "bnb_4bit_use_double_quant": kind == "double"}
    options = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {"load_in_4bit": True, **four, "bnb_4bit_compute_dtype": torch.float32}
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "quantized")
    out = round_trip(tmp_path / "quantized")
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())
    again = AutoModelForCausalLM.from_pretrained(out)
    if kind != "int8":
        assert torch.equal(logits(model), logits(again))
        return
    # its kernel rounds activations too, so that weights are compared
    loaded = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if getattr(parameter, "SCB", None) is not None:
            expected = parameter.data.float() * (parameter.SCB.float()[:, None] / 127)
            assert torch.allclose(loaded[name].float(), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_transformers_loads_what_torchao_quantized(base, tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quant_type=getattr(quantization, kind)())
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(round_trip(tmp_path / "quantized"))
    loaded = dict(again.named_parameters())
    quantized = {name: x for name, x in model.named_parameters() if "torchao" in str(type(x))}
    assert quantized
    for name, parameter in quantized.items():
        assert torch.equal(loaded[name], parameter.dequantize())
